"""The files of one benchmark in an output directory: appended as texts arrive, complete or absent at the end.

Only one run at a time can write them.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import parse_json, write_text

from ..text import say

NOTHING = type(None)
ROW_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,), "sample": (int,), "prompt_sha256": (str,), "problem": (str,), "gold": (str,),
    "subject": (str, NOTHING), "level": (int, NOTHING), "response": (str,), "finish_reason": (str,),
    "stop_reason": (str, NOTHING), "prompt_tokens": (int,), "tokens": (int,),
}  # fmt: skip
ROW_FIELDS = tuple(ROW_TYPES)
MORE_FIELDS = ("template",)  # where a problem has it


class RunFiles:
    """Where a run stores its files, and what is already there.

    NAME.partial.jsonl    rows of an unfinished run; it is also the lock file
    NAME.jsonl            rows, sorted, once all of them exist
    NAME.settings.json    what the texts depend on
    NAME.json, NAME.html  the scores, and the same as a page
    NAME.vllm.log         what vLLM wrote while it started and ran
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.generations = folder / f"{name}.jsonl"
        self.partial = folder / f"{name}.partial.jsonl"
        self.settings = folder / f"{name}.settings.json"
        self.summary = folder / f"{name}.json"
        self.report = folder / f"{name}.html"
        self.engine_log = folder / f"{name}.vllm.log"

    # --- settings

    def read_settings(self) -> dict[str, Any] | None:
        """The settings of the rows on disk; None if there are neither."""
        if self.settings.is_file():
            try:
                settings = parse_json(self.settings.read_text(encoding="utf-8"))
            except ValueError:
                settings = None
            if not isinstance(settings, dict):
                raise EvalError(f"{self.settings} cannot be read as a JSON object. Start over with --overwrite.")
            return settings
        if self.generations.is_file() or self.partial.is_file():
            raise EvalError(
                f"{self.folder} holds generations but no {self.settings.name}, so how they were made is unknown. "
                "Start over with --overwrite."
            )
        return None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        write_text(self.settings, json.dumps(settings, indent=2) + "\n")

    # --- rows

    def read_rows(self) -> Iterator[dict[str, Any]]:
        """All rows on file."""
        for path in (self.generations, self.partial):
            if path.is_file():
                for number, line in enumerate(path.read_bytes().splitlines(), 1):
                    row = _parse_row(line)
                    if row is None:
                        raise EvalError(
                            f"{path}, line {number}, is not a generation. Remove the line, "
                            "or start over with --overwrite."
                        )
                    yield row

    def cut_torn_line(self) -> None:
        """Remove a last line that a kill or a full disk cut off, so that the next row does not continue it."""
        if not self.partial.is_file():
            return
        content = self.partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        if last and _parse_row(last) is None:  # a line end may have been written after the cut
            whole = whole[: -len(last)]
        if whole != content:
            say(f"{self.partial.name}: its last line was cut off, and is generated again")
            os.truncate(self.partial, len(whole))

    @contextlib.contextmanager
    def appending(self) -> Iterator["RowAppender"]:
        with self.partial.open("ab") as file:
            appender = RowAppender(file)
            yield appender
            appender.sync()

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the sorted rows of the complete run, in place of the partial file."""
        write_text(self.generations, (json.dumps(row) + "\n" for row in rows))
        self.partial.unlink(missing_ok=True)

    # --- one run at a time

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Refuse a second run into the same files while one is in progress."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        with self.partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EvalError(
                    f"another run is writing {self.partial}. Wait for it, or give another --output_dir."
                ) from None
            try:
                yield
            finally:
                if self.partial.is_file() and self.partial.stat().st_size == 0:
                    self.partial.unlink()

    def clear(self) -> None:
        """Discard what earlier runs left. Only inside `lock`."""
        for path in (self.generations, self.settings, self.summary, self.report):
            path.unlink(missing_ok=True)
        if self.partial.is_file():
            os.truncate(self.partial, 0)  # not removed: it carries the lock


class RowAppender:
    """Adds rows to the partial file. A row survives a killed process at once, and a power cut after a second."""

    def __init__(self, file: BinaryIO):
        self._file, self._synced = file, time.monotonic()

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > 1:  # fsync takes milliseconds, and rows may come by the hundred
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """The generation in a line; None where a field is missing or of another type."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not row.keys() >= ROW_TYPES.keys():
        return None
    return row if all(type(row[name]) in types for name, types in ROW_TYPES.items()) else None
