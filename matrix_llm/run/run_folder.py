"""A run's folder: its file names, whether a run can start or resume there, and what is written before training."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from matrix_llm.base.console import say
from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.base.files import write_text
from matrix_llm.base.safe_yaml import read_yaml
from matrix_llm.run.checkpoint_files import (
    DELETING,
    SAVING,
    last_complete_checkpoint,
    last_sound_checkpoint,
    read_manifest,
    what_is_damaged,
    what_is_missing,
)
from matrix_llm.run.lock import LOCK

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

RECIPE = "recipe.yaml"  # the settings that were given
METRICS = "metrics.jsonl"  # one line for each log entry, while the run trains
PLOT = "loss.png"
RESULTS = "results.json"
CARD = "README.md"
DIAGNOSIS = "diagnosis.json"  # what `matrix-llm diagnose RUN --out RUN` measured; it then stands on the card
PARTIAL = "results.partial.json"  # results so far; removed last, so a run that still has it is unfinished
NON_FINITE = "non_finite.txt"  # the error of a run whose loss became NaN or infinite; removed when the run resumes
STAGING = ".saving"  # the final weights, until they are moved into place

# Settings that may change when a run is resumed: they decide what is shown or saved, not what is computed.
MAY_CHANGE = {
    "resume_from_checkpoint", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "eval_steps",
    "eval_strategy", "report_to", "run_name", "disable_tqdm", "effective_rank_steps", "accuracy_rows", "accuracy_steps",
    "accuracy_engine", "accuracy_gpu_memory",
    "dataloader_num_workers", "dataset_num_proc", "gpu",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_token",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- start or resume


def is_last_wanted(resume_from_checkpoint: str | bool | None) -> bool:
    """True if the setting asks for the last checkpoint; false if it names one, or asks for none."""
    return str(resume_from_checkpoint).lower() in ("true", "1", "yes")


def resume_setting(training: TrainingArguments) -> str | bool | None:
    """`resume_from_checkpoint`, with None for everything that says no: false, "false", "none", "no"."""
    resume = training.resume_from_checkpoint
    return None if str(resume).lower() in ("false", "none", "null", "no", "0", "") else resume


def find_resume_checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one named, or the last complete one; None to start from the beginning."""
    resume = resume_setting(training)
    if is_last_wanted(resume):
        last = last_complete_checkpoint(Path(str(training.output_dir)))
        return str(last) if last else None
    return str(resume) if resume else None


def check_output_dir(training: TrainingArguments, resolved: Mapping[str, Any]) -> None:
    """Refuse to overwrite an earlier run, or to resume one with settings that would make a different model.

    Args:
        training: gives the output directory, and whether to resume.
        resolved: the settings given, as recipe.yaml holds them.

    Raises:
        RecipeError: the directory holds a finished run, or an interrupted one and resuming was not asked for; the
            checkpoint is incomplete; or a setting differs from those the checkpoint was made with.
    """
    output, resume = Path(str(training.output_dir)), resume_setting(training)
    # 1. no finished run: its weights would be overwritten
    is_interrupted = (output / PARTIAL).is_file()
    if any(output.glob("*.safetensors")) and not (resume and is_interrupted):
        raise RecipeError(
            f"output_dir={str(output)!r} holds the weights of a finished run. Choose another output_dir, or remove it."
        )
    # 2. an interrupted run, and resuming was not asked for
    last = last_complete_checkpoint(output)
    if last is not None and not resume:
        raise RecipeError(
            f"output_dir={str(output)!r} holds {last.name} of an earlier run. "
            "Add --resume_from_checkpoint true to resume it, or choose another output_dir."
        )
    # 3. the checkpoint to resume from
    if is_last_wanted(resume):  # from now on the one that is found here, which can be read
        sound = last_sound_checkpoint(output)
        training.resume_from_checkpoint = None if sound is None else str(sound)
    checkpoint = find_resume_checkpoint(training)
    if checkpoint is not None and training.save_only_model:
        raise RecipeError(
            f"resume_from_checkpoint={resume!r} with save_only_model=True: {checkpoint} holds no optimizer, so the run "
            "would go on as another one. Start again in another output_dir, without save_only_model."
        )
    if checkpoint is not None:
        _check_resumable(Path(checkpoint), training, resolved, is_sound=is_last_wanted(resume))
    elif resume:
        say(f"=> no complete checkpoint in {output}, so the run starts from the beginning")


def check_writable(output: Path) -> None:
    """Refuse a run whose output directory cannot be written, before it loads anything.

    Raises:
        RecipeError: it is a file, its name is too long, its disk is full or read-only, or it belongs to somebody else.
    """
    parent = output
    try:
        if output.exists() and not output.is_dir():
            raise RecipeError(f"output_dir={str(output)!r} is a file. Choose another output_dir.")
        parent = next(path for path in (output, *output.absolute().parents) if path.exists())
        # Only writing proves it: os.access ignores quotas and full disks, and is always true for root
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise RecipeError(
            f"output_dir={str(output)!r} cannot be written: {parent}: {error.strerror}. "
            "Make it writable, or choose another output_dir."
        ) from None


def _check_resumable(
    checkpoint: Path, training: TrainingArguments, resolved: Mapping[str, Any], *, is_sound: bool
) -> None:
    """Raise a RecipeError if `checkpoint` is absent, incomplete, damaged, or not of the run that `resolved` describes.

    Args:
        is_sound: its files have been read already.
    """
    # 1. complete and readable
    named = f"resume_from_checkpoint={str(training.resume_from_checkpoint)!r}"
    if not checkpoint.is_dir():
        raise RecipeError(f"{named}: no such folder. Give true (the last checkpoint) or the path of a checkpoint.")
    if (reason := what_is_missing(checkpoint)) is not None:
        raise RecipeError(f"{named} is incomplete: {reason}. Give true (the last complete one), or another path.")
    if not is_sound and (reason := what_is_damaged(checkpoint)) is not None:
        raise RecipeError(f"{named} is damaged: {reason}. Give true (the last one that is whole), or another path.")
    # 2. as many processes
    processes = read_manifest(checkpoint)["processes"]
    if processes != training.world_size:
        raise RecipeError(
            f"cannot resume {str(checkpoint)!r} with {training.world_size} processes: it was made with {processes}, "
            "and the effective batch and the shards would change. Launch as many, or start a new run in another "
            "output_dir."
        )
    # 3. the same settings, but for those that do not change what is computed
    stored = checkpoint.parent / RECIPE
    if not stored.is_file():
        return
    try:
        before: Any = read_yaml(stored.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{stored} cannot be read: {one_line(error)}. Restore the file, or start a new run."
        ) from None
    if not isinstance(before, dict) or not all(isinstance(key, str) for key in before):
        raise RecipeError(f"{stored} is not a mapping of settings. Restore the file, or start a new run.")
    changed = [
        f"{key}: {before.get(key, 'not given')!r} then, {resolved.get(key, 'not given')!r} now"
        for key in sorted({*before, *resolved} - MAY_CHANGE)
        if before.get(key) != resolved.get(key)
    ]
    if changed:
        raise RecipeError(
            f"cannot resume {str(checkpoint)!r} with other settings than it was started with ({'; '.join(changed)}). "
            "Restore them, or start a new run in another output_dir."
        )


# --------------------------------------------------------------------------------------------------------- writing


def start_run_folder(output: Path, resolved: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Remove what an interrupted run left half-written, then write recipe.yaml and the results so far.

    Called by the first process, before training.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / NON_FINITE).unlink(missing_ok=True)
    if removed := remove_leftovers(output):
        say(f"=> removed what an interrupted run left half-written: {', '.join(removed)}")
    # resume_from_checkpoint describes how this process was started, not the run
    settings = {key: value for key, value in resolved.items() if key != "resume_from_checkpoint"}
    write_text(output / RECIPE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_text(output / PARTIAL, json.dumps(results))


def remove_leftovers(output: Path) -> list[str]:
    """Remove files and folders that a kill left under temporary names. Returns their names."""
    left = [output / SAVING, output / STAGING, *output.glob(f"{DELETING}*")]
    for name in (RECIPE, METRICS, PLOT, RESULTS, CARD, PARTIAL, NON_FINITE):
        left += output.glob(f".{Path(name).stem}.*")  # base.files.atomic_path
    left = sorted(path for path in left if path.exists())
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]


def move_into_place(staging: Path, output: Path) -> None:
    """Move everything in `staging` to `output`, replacing what is there, and remove `staging`."""
    for item in sorted(staging.iterdir()):
        os.replace(item, output / item.name)
    staging.rmdir()


def finish_run_folder(output: Path) -> None:
    """Declare the run finished: from now on, any other run there is refused for its weights, and needs no lock."""
    (output / PARTIAL).unlink(missing_ok=True)
    (output / LOCK).unlink(missing_ok=True)


def say_stopped(state: TrainerState, output: Path, command: str) -> None:
    """Print where a stopped run was saved, and the `command` that resumes it."""
    say(f"=> stopped at step {state.global_step} of {state.max_steps}, saved in {last_complete_checkpoint(output)}")
    say(f"=> resume with: {command}")
