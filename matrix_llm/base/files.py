"""Files that are whole or absent: written under a temporary name in the same folder, then moved into place."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NON_FINITE = "non_finite.txt"  # in the folder of a run whose loss became NaN or infinite: what train.py said; gone once it goes on


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, moved there when the block ends without an error and removed otherwise.

    >>> with atomic_path("/tmp/matrix_llm_example.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> Path("/tmp/matrix_llm_example.txt").read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()  # mkstemp makes files private
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str | Iterable[str]) -> None:
    """The whole file or none, in UTF-8 with "\\n" line ends, on the disk before it takes its name.

    Half of a surrogate pair, which a model may write and UTF-8 cannot hold, is written as its escape sequence.
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file such as metrics.jsonl; a last line cut off by a kill is left out, and a missing file is empty."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries
