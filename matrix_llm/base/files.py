"""Files that are complete or absent: written under a temporary name in the same folder, then moved into place."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAMPLES, SAMPLE = 256, 2**16  # of sampled_checksum: how many, and bytes of each


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`; it replaces `path` if the block succeeds, and is removed if it fails.

    >>> with atomic_path("/tmp/matrix_llm_example.txt") as temporary:
    ...     _ = temporary.write_text("complete")
    >>> Path("/tmp/matrix_llm_example.txt").read_text()
    'complete'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files: keep the mode of the file being replaced, or give a new file the usual one
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str | Iterable[str]) -> None:
    """Write the complete file or nothing, in UTF-8 with "\\n" line endings.

    The text is flushed to disk before the file takes its name: after a power cut, either the old file is there or all
    of the new one. A lone surrogate, which a model may generate and UTF-8 cannot encode, is written as its escape.
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file such as metrics.jsonl.

    A line that is not a JSON object, such as the last one of a run that was killed, is skipped. A missing file has no
    objects.
    """
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: whatever is wrong with it, brackets nested too deeply and numbers too long to read included.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sampled_checksum(path: Path) -> int:
    """A checksum of a file that finds a tail of zeros, a hole or another file of its size, in little time.

    CRC-32 over all of a file of at most 16 MiB, and over 256 samples of 64 KiB, both ends included, of a larger one.
    """
    checksum, size = 0, path.stat().st_size
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE:
            while block := file.read(SAMPLE):
                checksum = zlib.crc32(block, checksum)
            return checksum
        for number in range(SAMPLES):
            file.seek((size - SAMPLE) * number // (SAMPLES - 1))
            checksum = zlib.crc32(file.read(SAMPLE), checksum)
    return checksum
