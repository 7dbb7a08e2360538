"""Checkpoints that are whole or absent, and how to make plain weights of sharded ones.

    python -m matrix_llm.checkpoints consolidate runs/x/checkpoint-20 OUT    # ZeRO and FSDP2 shards to plain safetensors
    python -m matrix_llm.checkpoints check runs/x                            # which checkpoints are whole, and why the others are not

1. every process writes its part into OUTPUT/.saving-checkpoint/checkpoint-N
2. when all have finished, manifest.json is written there: each file with its size, the step and the number of processes
3. files and folders are flushed to the disk, and the folder is moved to OUTPUT/checkpoint-N
4. only then are older checkpoints removed: renamed first, so that a kill cannot leave half of one under its name

A checkpoint is whole if its manifest is there and every file has the size it lists. That recognises files cut short, by a kill
or by an interrupted copy, without reading them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import CheckpointError
from matrix_llm.base.files import write_text

MANIFEST = "manifest.json"
SAVING = ".saving-checkpoint"
DELETING = ".deleting-"

# What the operating system says when a disk or a folder cannot take a file; other errors are not about writing.
CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
}


# ------------------------------------------------------------------------------------------------------------- whole or not


def step_of(folder: Path) -> int | None:
    """
    >>> step_of(Path("runs/x/checkpoint-20")), step_of(Path("runs/x/checkpoint-best"))
    (20, None)
    """
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number != folder.name and number.isdigit() else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, or {} where there is none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint is not whole, in a few words; None if it is."""
    manifest = read_manifest(folder)
    if not manifest:
        return f"it has no {MANIFEST}, which is written last: its writing was cut off, or another program wrote it"
    for name, size in manifest["files"].items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes of {size:,}"
    return None


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint-N that is whole; one cut off by a kill, or copied in part, is passed over."""
    found = {step: path for path in output_dir.glob("checkpoint-*") if (step := step_of(path)) is not None}
    return next((found[step] for step in sorted(found, reverse=True) if what_is_missing(found[step]) is None), None)


# ------------------------------------------------------------------------------------------------------------------ writing


def finish_checkpoint(staged: Path, final: Path, *, processes: int) -> None:
    """Steps 2 and 3 of the module's list, by one process, after all have written their parts."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    manifest = {"step": step_of(final), "processes": processes, "files": sizes}
    write_text(staged / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for path in (*files, staged / MANIFEST, *(path for path in staged.rglob("*") if path.is_dir()), staged):
        _flush(path)
    remove_checkpoint(final)  # one that was not whole, or that this run writes again
    os.rename(staged, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """To the disk itself: after a power cut a renamed folder must not hold empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EBADF,
            errno.ENOTSUP,
        ):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def remove_checkpoint(folder: Path) -> None:
    """Renamed first: a kill half-way leaves a temporary, never half a checkpoint."""
    if not folder.exists():
        return
    doomed = folder.with_name(DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_old_checkpoints(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the `limit` newest whole checkpoints, the best one among them; ones that are not whole do not count, and go.

    The newest whole checkpoint is never removed.
    """
    if not limit or limit < 1:
        return
    found = {step: path for path in output_dir.glob("checkpoint-*") if (step := step_of(path)) is not None}
    whole = [found[step] for step in sorted(found) if what_is_missing(found[step]) is None]
    if not whole:
        return
    kept = {whole[-1], *(path for path in whole if best is not None and path.name == Path(best).name)}
    for path in reversed(whole):
        if len(kept) < limit:
            kept.add(path)
    for path in found.values():
        if path not in kept and (path in whole or (step_of(path) or 0) < (step_of(whole[-1]) or 0)):
            remove_checkpoint(path)


def remove_leftovers(output_dir: Path) -> list[str]:
    """Delete what a kill left behind under a temporary name. Returns the names, for the log."""
    found = [output_dir / SAVING, output_dir / ".saving", *output_dir.glob(DELETING + "*")]
    found += [
        path
        for name in ("metrics", "recipe", "results", "results.partial", "loss", "README")
        for path in output_dir.glob(f".{name}.*")
    ]
    left = sorted(path for path in found if path.exists())
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]


def why_not_written(error: BaseException) -> str | None:
    """The operating system's reason if `error` says that a file could not be written, through whichever library; else None.

    >>> why_not_written(OSError(errno.ENOSPC, "No space left on device"))
    'No space left on device'
    >>> why_not_written(KeyError("x")) is None
    True
    """
    if isinstance(error, OSError):
        return error.strerror if error.errno in CANNOT_WRITE else None
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"os error (\d+)", text)):
        return os.strerror(int(number[1]))
    if (
        type(error).__name__ == "CheckpointException"
    ):  # torch.distributed.checkpoint: one error for each process that failed
        causes = [why_not_written(pair[0]) for pair in getattr(error, "failures", {}).values()]
        return next((cause for cause in causes if cause), None)
    if isinstance(error, RuntimeError):  # torch.save has many words for a write that failed, and none for why
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.filename.endswith("serialization.py") and frame.name == "save" for frame in frames):
            return "torch.save could not write the whole file (no space left, or a limit on its size)"
    return None


def not_written(path: Path, reason: str, output_dir: Path) -> CheckpointError:
    last = last_complete_checkpoint(output_dir)
    kept = f"{last} is whole: resume with --resume_from_checkpoint true" if last else "no checkpoint was written before"
    return CheckpointError(f"{path} could not be written: {reason}. Free space, or make the folder writable; {kept}.")


# ------------------------------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) == 2 and arguments[0] == "check":
        folders = sorted(
            (p for p in Path(arguments[1]).glob("checkpoint-*") if step_of(p) is not None),
            key=lambda p: step_of(p) or 0,
        )
        for folder in folders:
            reason = what_is_missing(folder)
            print(f"{folder}: {f'NOT whole, {reason}' if reason else 'whole'}")
        return 0 if folders and last_complete_checkpoint(Path(arguments[1])) else 1
    if len(arguments) == 3 and arguments[0] == "consolidate":
        from matrix_llm.run.consolidate import consolidate

        try:
            consolidate(Path(arguments[1]), Path(arguments[2]))
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"=> {arguments[2]}/ holds plain weights for from_pretrained")
        return 0
    print(
        "usage: python -m matrix_llm.checkpoints consolidate CHECKPOINT OUT\n       python -m matrix_llm.checkpoints check RUN"
    )
    return 0 if arguments and arguments[0] in ("-h", "--help") else 2
