"""Checkpoints that are complete or absent.

1. every process writes its share into OUTPUT/.saving-checkpoint/checkpoint-N
2. when all have finished, manifest.json is written there: each file with its size, the step and the number of processes
3. files and folders are flushed to the disk, and the folder is moved to OUTPUT/checkpoint-N
4. only then are older checkpoints removed: renamed first, so that a kill cannot leave half of one under its name

A checkpoint is complete if it has a manifest and every file has the size listed there. This finds files that a kill
or an interrupted copy cut short, without reading them. Before a run resumes, its checkpoint's files are read, too, and
compared with the checksums of the manifest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from matrix_llm.base.console import say
from matrix_llm.base.errors import CheckpointError
from matrix_llm.base.files import parse_json, sampled_checksum, write_text

MANIFEST = "manifest.json"  # in a checkpoint; written last
SAVING = ".saving-checkpoint"  # in the output directory: checkpoints that are being written
DAMAGED = "damaged-"  # in the output directory: the prefix of checkpoints that could not be read
DELETING = ".deleting-"  # in the output directory: the prefix of checkpoints that are being removed

# Some network file systems cannot flush folders, and say so with one of these.
CANNOT_FLUSH = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}


# -------------------------------------------------------------------------------------------------- complete or not


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None for any other name.

    >>> step_of(Path("runs/x/checkpoint-20")), step_of(Path("runs/x/checkpoint-best"))
    (20, None)
    """
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number != folder.name and number.isdigit() else None


def find_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Every checkpoint-N of a run, complete or not, by step in ascending order."""
    found = {step: path for path in output_dir.glob("checkpoint-*") if (step := step_of(path)) is not None}
    return dict(sorted(found.items()))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, or {} if there is none that can be read."""
    try:
        found = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_whole = (
        isinstance(found, dict)
        and type(found.get("processes")) is int
        and isinstance(found.get("files"), dict)
        and all(type(size) is int for size in found["files"].values())
        and all(_is_inside(name) for name in found["files"])
        and isinstance(found.get("checksums", {}), dict)
    )
    return found if is_whole else {}


def _is_inside(name: str) -> bool:
    """Whether a name in a manifest is that of a file in the checkpoint's folder."""
    return "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint is incomplete, in a few words; None if it is complete."""
    manifest = read_manifest(folder)
    if not manifest:
        if (folder / MANIFEST).is_file():
            return f"its {MANIFEST} cannot be read"
        return f"it has no {MANIFEST}, which is written last: saving was interrupted, or another program wrote it"
    for name, size in manifest["files"].items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes of {size:,}"
    return None


def what_is_damaged(folder: Path) -> str | None:
    """Why a complete checkpoint cannot be read, in a few words; None if nothing was found. It reads its files.

    A disk or a copy may lose what is in a file and keep its size. Checksums are in the manifest (`sampled_checksum`)
    and in the files that torch.save writes, which are ZIP archives.
    """
    manifest = read_manifest(folder)
    checksums = manifest.get("checksums", {})
    for name in manifest.get("files", {}):
        path = folder / name
        try:
            if name in checksums and sampled_checksum(path) != checksums[name]:
                return f"{name} is not what was saved"
            if path.suffix in (".pt", ".pth", ".bin") and not _is_whole_archive(path):
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _is_whole_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False


def last_sound_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint whose files can be read. A damaged one is set aside, and that is said.

    Every process may call it: all of them find the same damage.
    """
    while (last := last_complete_checkpoint(output_dir)) is not None:
        reason = what_is_damaged(last)
        if reason is None:
            return last
        aside = last.with_name(DAMAGED + last.name)
        say(f"=> {last} is damaged: {reason}. It is set aside as {aside.name}, and an older one is looked for.")
        with contextlib.suppress(OSError):  # another process was first
            os.rename(last, aside)
        if last.is_dir():
            raise CheckpointError(f"{last} is damaged: {reason}. Remove it, then resume from the one before it.")
    return None


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint-N. One that a kill or an interrupted copy left incomplete is passed over."""
    newest_first = reversed(find_checkpoints(output_dir).values())
    return next((path for path in newest_first if what_is_missing(path) is None), None)


# ---------------------------------------------------------------------------------------------------------- writing


def finish_checkpoint(staged: Path, final: Path, *, processes: int) -> None:
    """Steps 2 and 3 of the module's list; called by one process after all have written their shares.

    Args:
        staged: the folder that holds the files.
        final: OUTPUT/checkpoint-N. An incomplete checkpoint of that name is replaced.
        processes: how many processes wrote it, and must resume from it.
    """
    # The manifest, which declares the checkpoint complete
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    checksums = {path.relative_to(staged).as_posix(): sampled_checksum(path) for path in files}
    manifest = {"step": step_of(final), "processes": processes, "files": sizes, "checksums": checksums}
    write_text(staged / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    # Contents before the name: after a power cut, a renamed folder must not hold empty files
    folders = [path for path in staged.rglob("*") if path.is_dir()]
    for path in (*files, staged / MANIFEST, *folders, staged):
        _flush(path)
    remove_checkpoint(final)
    os.rename(staged, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Force a file or a folder from the operating system's cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------------------------- removing


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: a kill half-way leaves a temporary folder, never half a checkpoint.

    Several processes may do so at once, and one that is not there is no error.
    """
    doomed = folder.with_name(DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_old_checkpoints(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove all but the `limit` newest complete checkpoints, counting `best` among them; without a limit, remove none.

    Incomplete checkpoints do not count. Those older than the newest complete one are removed; newer ones are left for
    inspection. The newest complete checkpoint always stays.
    """
    if not limit or limit < 1:
        return
    found = find_checkpoints(output_dir)
    complete = {step: path for step, path in found.items() if what_is_missing(path) is None}
    if not complete:
        return
    # 1. the newest and the best stay, then the next newest until the limit is reached
    newest = max(complete)
    kept = {newest, *(step for step, path in complete.items() if best is not None and path.name == Path(best).name)}
    for step in reversed(complete):
        if len(kept) < limit:
            kept.add(step)
    # 2. the others go
    for step, path in found.items():
        if step not in kept and (step in complete or step < newest):
            remove_checkpoint(path)
