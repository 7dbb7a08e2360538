"""The folder that a model is fetched into: complete or not there, with a record of where it comes from.

Everything is written to `.NAME.fetching` beside it, which then takes its name. A lock on that folder, which vanishes
with its process, keeps two fetches apart; what a killed one left behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import FetchError
from matrix_llm.base.files import parse_json, write_text
from matrix_llm.publish.base_model import RECORD
from matrix_llm.publish.finished_run import CARD

MARGIN = 100_000_000  # bytes that are left free on the disk


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `fetched.json` says; None if the folder was not written by `matrix-llm fetch`, or lacks a file since.

    >>> read_record(Path("/nowhere")) is None
    True
    """
    try:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
        files = record["files"].items()
        is_whole = all((folder / name).stat().st_size == each["bytes"] for name, each in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if is_whole else None


def check_place(folder: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        FetchError: it is a file, or a folder with anything in it.
    """
    try:
        is_taken = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise not_written(folder, error.strerror or "") from None
    if is_taken:
        raise FetchError(f"{str(folder)!r} exists, and holds something else. Remove it, or name another folder.")


def check_space(folder: Path, needed: int) -> None:
    """Refuse a disk without room for `needed` bytes.

    Raises:
        FetchError: with both sizes.
    """
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed + MARGIN > free:
        raise FetchError(
            f"{str(folder)!r} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk. Free some, or "
            "name a folder on another disk."
        )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the name `folder` if the block succeeds, and is removed if it fails.

    Raises:
        FetchError: it cannot be made, another fetch is writing to it, or `folder` was taken in the meantime.
    """
    place = folder.absolute().with_name(f".{folder.absolute().name}.fetching")
    lock = _lock(place)
    try:
        _empty(place)
        yield place
        with contextlib.suppress(OSError):  # an empty folder gives way
            folder.rmdir()
        check_place(folder)
        os.rename(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _lock(place: Path) -> int:
    """A descriptor of `place`, locked where the system has locks."""
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock = os.open(place, os.O_RDONLY)
        except FileNotFoundError:  # another fetch has just finished
            continue
        except OSError as error:
            raise not_written(place, error.strerror or type(error).__name__) from None
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise FetchError(
                f"another fetch is writing to {str(place)!r}. Wait for it, or name another folder."
            ) from None
        except (ImportError, OSError):  # Windows; or a file system without locks
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(place)):
                return lock
        os.close(lock)  # it has taken its final name in between


def _empty(place: Path) -> None:
    for each in place.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def not_written(folder: Path, reason: str) -> FetchError:
    """The error for a place that cannot take files."""
    return FetchError(f"{str(folder)!r} cannot be written: {reason}. Free space, or name a folder where you may write.")


def write_record(folder: Path, record: dict[str, Any], lines: list[str]) -> None:
    """Finish `folder`: readable files, the source in its README.md, and fetched.json with the hash of every file.

    Args:
        record: where the model comes from.
        lines: the same for people, appended to the card that came with the model.
    """
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    write_text(folder / CARD, "\n\n".join([card.rstrip(), "## Where this folder comes from", *lines]).lstrip() + "\n")
    usual = (folder / CARD).stat().st_mode & 0o777
    files = {}
    for file in sorted(folder.iterdir()):
        file.chmod(usual)  # safetensors makes private files
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    made = {name: version(name) for name in ("transformers", "torch", "gguf")}
    content = {**record, "made_with": made, "files": files}
    write_text(folder / RECORD, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256(file: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
