"""A run's folder: whether it may be written, and whether an interrupted run may go on in it. Nothing has been loaded by then."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments

from matrix_llm.checkpoints import last_complete_checkpoint, read_manifest, what_is_missing
from matrix_llm.values import RecipeError

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
        raise RecipeError(f"output_dir={str(output)!r} holds the weights of a finished run. Choose another output_dir, or remove it.")
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
            raise RecipeError(f"resume_from_checkpoint={resume!r}: no such folder. Give true (the last checkpoint) or a checkpoint's path.")
        if (reason := what_is_missing(last)) is not None:
            raise RecipeError(f"resume_from_checkpoint={resume!r} is not whole: {reason}. Give true (the last whole one), or another path.")
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
