"""A run's folder, shared by train.py and ssl/pretrain.py: whether it may be written and gone on in, its files, known failures in a line."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainerState, TrainingArguments

from matrix_llm.base.errors import CheckpointError, PushError, RecipeError, scrub
from matrix_llm.base.files import NON_FINITE, write_text
from matrix_llm.run.checkpoint_files import (
    last_complete_checkpoint,
    not_written,
    read_manifest,
    remove_leftovers,
    what_is_missing,
    why_not_written,
)

PARTIAL = "results.partial.json"

# Settings that may change between a run and its resumption: they say when to look, not what is computed.
MAY_CHANGE = {
    "resume_from_checkpoint", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy",
    "report_to", "run_name", "disable_tqdm", "effective_rank_steps", "accuracy_rows", "accuracy_steps",
    "dataloader_num_workers", "dataset_num_proc", "gpu",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_token",
}  # fmt: skip


def from_last(value: str | bool | None) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("true", "1", "yes"))


def say(text: str) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def check_output_dir(training: TrainingArguments, resolved: Mapping[str, Any]) -> None:
    """Refuse to write over an earlier run, and to resume with settings that would make a different model.

    Args:
        training: where to, and whether to resume.
        resolved: the settings given, as recipe.yaml keeps them.

    Raises:
        RecipeError: the directory holds a finished or interrupted run and resume was not asked for; it is no directory or
            cannot be written; or a setting differs from the one the checkpoint was made with.
    """
    output = Path(str(training.output_dir))
    resume = training.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output_dir={str(output)!r} is a file. Choose another output_dir.")
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as probe:  # os.access is no proof: root, quotas, network file systems
            probe.write(b"x" * 4096)
    except OSError as error:
        raise RecipeError(
            f"output_dir={str(output)!r} cannot be written: {parent}: {error.strerror}. Make it writable, or choose another output_dir."
        ) from None
    last = last_complete_checkpoint(output)
    is_cut_off = (output / PARTIAL).is_file()  # removed last: without it the weights there are those of a finished run
    if [*output.glob("*.safetensors")] and not (resume and is_cut_off):
        raise RecipeError(
            f"output_dir={str(output)!r} holds the weights of a finished run. Choose another output_dir, or remove it."
        )
    if not resume:
        if last is not None:
            raise RecipeError(
                f"output_dir={str(output)!r} holds {last.name} of an earlier run. "
                "Add --resume_from_checkpoint true to go on with it, or choose another output_dir."
            )
        return
    if not from_last(resume):
        last = Path(str(resume))
        if not last.is_dir():
            raise RecipeError(
                f"resume_from_checkpoint={resume!r}: no such folder. Give true (the last checkpoint) or a checkpoint's path."
            )
        if (reason := what_is_missing(last)) is not None:
            raise RecipeError(
                f"resume_from_checkpoint={resume!r} is not whole: {reason}. Give true (the last whole one), or another path."
            )
    if last is None:
        say(f"=> no whole checkpoint in {output}, so the run starts from the beginning")
        return
    processes = read_manifest(last)["processes"]
    if processes != training.world_size:
        raise RecipeError(
            f"cannot resume {str(last)!r} with {training.world_size} processes: it was made with {processes}, and the effective "
            "batch and the shards would change. Launch as many, or start anew in another output_dir."
        )
    stored = last.parent / "recipe.yaml"
    if not stored.is_file():
        return
    before: dict[str, Any] = yaml.safe_load(stored.read_text(encoding="utf-8")) or {}
    changed = [
        f"{key}: {before.get(key, 'not given')!r} then, {resolved.get(key, 'not given')!r} now"
        for key in sorted({*before, *resolved} - MAY_CHANGE)
        if before.get(key) != resolved.get(key)
    ]
    if changed:
        raise RecipeError(
            f"cannot resume {str(last)!r} with other settings than it was started with ({'; '.join(changed)}). "
            "Restore them, or start anew in another output_dir."
        )


def resume_path(training: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one named, or the last whole one; None where the run starts anew."""
    resume = training.resume_from_checkpoint
    if from_last(resume):
        last = last_complete_checkpoint(Path(str(training.output_dir)))
        return str(last) if last else None
    return str(resume) if resume else None


def begin(output: Path, resolved: dict[str, Any], results: Mapping[str, Any]) -> None:
    """By the first process, before training: what a cut-off run left is removed; recipe.yaml and the results so far are written."""
    output.mkdir(parents=True, exist_ok=True)
    (output / NON_FINITE).unlink(missing_ok=True)
    if left := remove_leftovers(output):
        say(f"=> removed what a cut-off run left half-written: {', '.join(left)}")
    resolved.pop("resume_from_checkpoint", None)  # how it was started, not what it is
    write_text(output / "recipe.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    write_text(output / PARTIAL, json.dumps(results))


def say_stopped(state: TrainerState, output: Path, command: str) -> None:
    say(f"=> stopped at step {state.global_step} of {state.max_steps}, saved in {last_complete_checkpoint(output)}")
    say(f"=> go on with: {scrub(command)}")


def move_into_place(staging: Path, output: Path) -> None:
    for item in sorted(staging.iterdir()):
        os.replace(item, output / item.name)
    staging.rmdir()


PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote worker crashing",
    "remote process exited",
)  # gloo, NCCL


def one_line(error: Exception, output: Path) -> str | None:
    """What to print for a failure that has a known way out; "" where the first process says it; None for any other error."""
    from matrix_llm.base.errors import NonFiniteLossError

    if isinstance(error, NonFiniteLossError):  # raised on all processes, with the same words
        return str(error) if int(os.environ.get("RANK", "0")) == 0 else ""
    if isinstance(error, (CheckpointError, PushError)):
        return str(error)
    path = Path(getattr(error, "filename", None) or output)
    if (reason := why_not_written(error)) is not None and output.absolute() in (
        path.absolute(),
        *path.absolute().parents,
    ):
        return str(not_written(path, reason, output))
    if isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_IS_GONE):
        return f"process {os.environ.get('RANK', '0')} lost contact to another one, which has said why or was killed."
    return None


def leave(status: int) -> NoReturn:
    """Exit with `status`. Of several processes, past the interpreter's shutdown where it does harm: on CPUs gloo's threads
    sometimes abort it ("terminate called without an active exception") after everything has been written, and after a failure
    it can wait for processes that wait for this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if status != 0 or not torch.cuda.is_available():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)
