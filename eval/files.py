"""The files of one evaluation run: appended as texts come, whole or absent at the end, one run at a time."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import write_text

ROW_FIELDS = (
    "id", "sample", "prompt_sha256", "problem", "gold", "subject", "level",
    "response", "finish_reason", "stop_reason", "prompt_tokens", "tokens",
)  # fmt: skip


def say(text: str) -> None:
    print(f"=> {text}", flush=True)


class Files:
    """The files of one benchmark in an output directory, and what is already in them."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.generations = folder / f"{name}.jsonl"
        self.partial = folder / f"{name}.partial.jsonl"
        self.settings = folder / f"{name}.settings.json"
        self.summary = folder / f"{name}.json"
        self.report = folder / f"{name}.html"

    def read_settings(self) -> dict[str, Any] | None:
        if self.settings.is_file():
            try:
                return json.loads(self.settings.read_text(encoding="utf-8"))
            except ValueError:
                raise EvalError(f"{self.settings} cannot be read as JSON. Start anew with --overwrite.") from None
        if self.generations.is_file() or self.partial.is_file():
            raise EvalError(
                f"{self.folder} holds generations but no {self.settings.name}, so how they were made is unknown. Use --overwrite."
            )
        return None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        write_text(self.settings, json.dumps(settings, indent=2) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows on file. A last line that was cut off by a kill or a full disk is removed from the partial file."""
        for path in (self.generations, self.partial):
            if not path.is_file():
                continue
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            lines = whole.splitlines()
            for number, line in enumerate(lines, 1):
                row = _parse(line)
                if row is None and number == len(lines) and path == self.partial:
                    whole = whole[: -len(line) - 1]
                elif row is None:
                    raise EvalError(
                        f"{path}, line {number}, is not a generation. Remove the line, or start anew with --overwrite."
                    )
                else:
                    yield row
            if whole != content and path == self.partial:
                say(f"{path.name}: its last line was cut off, and is generated again")
                os.truncate(path, len(whole))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Refuses a second run into the same files while one is going."""
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

    @contextlib.contextmanager
    def appending(self) -> Iterator[Any]:
        """A function that adds a row to the partial file. It survives a killed process at once, a power cut after a second."""
        synced = time.monotonic()
        with self.partial.open("ab") as file:

            def append(row: Mapping[str, Any]) -> None:
                nonlocal synced
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                if time.monotonic() - synced > 1:
                    os.fsync(file.fileno())
                    synced = time.monotonic()

            yield append
            os.fsync(file.fileno())

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.generations, (json.dumps(row) + "\n" for row in rows))
        self.partial.unlink(missing_ok=True)

    def clear(self) -> None:
        """Inside `lock`."""
        for path in (self.generations, self.settings, self.summary, self.report):
            path.unlink(missing_ok=True)
        if self.partial.is_file():
            os.truncate(self.partial, 0)  # not removed: it carries the lock


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= set(ROW_FIELDS) else None


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """`value` as JSON, whole or not at all; where that fails, one line says why."""
    try:
        write_text(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise EvalError(f"--out {path} cannot be written ({error.strerror}). Give another file.") from None
