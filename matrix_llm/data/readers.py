"""Read the rows of a file, a folder, a Hub data set, or the built-in generator. Errors give the file and line.

    Source("data/train.jsonl", max_rows=1000).read()   ->  ("data/train.jsonl line 1", {"query": ..., "type": ...}), ...
    Source("data/train.jsonl", max_rows=1000).rows()   ->  Row(question=...), ...

Rows are read one at a time, so memory does not grow with the file. `datasets`' own readers are not used for local
files because their errors do not name the line.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from matrix_llm.base.errors import DataError
from matrix_llm.data import wordproblems
from matrix_llm.data.forms import Row, detect_form, parse_row
from matrix_llm.data.jsonarray import ArrayError, iterate_array

ARRAY_CHUNK = 1 << 20  # characters of a JSON array that are decoded at a time
PARQUET_BATCH = 10_000  # rows of a Parquet file held as Python objects at a time
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")

Found = tuple[str, Any]  # an object's place, for error messages, and the object


# --- one function for each type of file -------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8."
                ) from None
            except json.JSONDecodeError as error:
                shown = text if len(text) <= 60 else text[:60] + "..."
                raise DataError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}): {shown}. Correct or remove the line."
                ) from None


def _read_json(path: Path) -> Iterator[Found]:
    """The objects of a JSON array, one at a time (MetaMathQA is one array of 400 MB), or of a file of JSON lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            if file.read(1024).lstrip().startswith("["):
                file.seek(0)
                for number, found in enumerate(iterate_array(file, ARRAY_CHUNK), start=1):
                    yield f"{path} row {number}", found
                return
    except ArrayError as error:
        raise DataError(f"{path} line {error.line}: not JSON ({error}). Correct the file.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from None
    yield from _read_jsonl(path)


def _read_parquet(path: Path) -> Iterator[Found]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=PARQUET_BATCH):
            for found in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", found
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Correct or replace the file.") from None


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(READERS)


# --- from a source's name to its rows ---------------------------------------------------------------------------------


def looks_local(name: str) -> bool:
    """True for what can only be a path: data/x.jsonl, ./folder, /folder, ~/folder. "org/name" is a Hub id."""
    return name.endswith(SUFFIXES) or name.startswith(("./", "../", "/", "~"))


def local_path(name: str) -> Path | None:
    """The existing file or folder of this name, or None ("builtin" and Hub ids)."""
    path = Path(name).expanduser()
    return path if name != "builtin" and path.exists() else None


def _files_in(folder: Path, split: str) -> list[Path]:
    """The files named after the split (train.jsonl, train-00000-of-00002.parquet), or all if none has such a name."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"{folder.absolute()} holds no {', '.join(SUFFIXES)} file, so there are no rows to read. Give another path."
        )
    split_of = {path: re.split(r"[-_.]", path.stem)[0] for path in files}
    chosen = [path for path in files if split_of[path] == split]
    others = sorted(set(split_of.values()) & set(SPLITS))
    if not chosen and others:  # files of other splits must not be mistaken for this one
        raise DataError(
            f"{folder.absolute()} has files for {', '.join(others)}, but none for the split {split!r}. "
            "Name one of these splits, or give a file."
        )
    return chosen or files


def _open_hub(name: str, config: str | None, split: str, streaming: bool = False) -> Any:
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    # Offline, gated, or no such data set, split or configuration: `datasets` raises one of these
    except (OSError, ValueError, DatasetsError) as error:
        named = f"{name!r}" + (f" (configuration {config!r})" if config else "")
        raise DataError(
            f"the dataset {named}, split {split!r}, is neither a local path nor readable from the Hub: "
            f"{type(error).__name__}: {' '.join(str(error).split())} "
            "Check the name and the connection, or give a local file."
        ) from None


@dataclass(frozen=True)
class Source:
    """Which rows to read. Nothing is read until read(), rows() or identity() is called."""

    name: str
    """"builtin", a file, a folder, or a Hub id."""
    config: str | None = None
    """The configuration of a Hub data set, such as "main" of openai/gsm8k."""
    split: str = "train"
    """Selects a folder's files, a Hub data set's split, or one of the generator's two sets of problems."""
    max_rows: int | None = None
    """Read only this many rows from the start, at least 1; None reads all."""
    builtin_rows: int = 20_000
    """How many problems "builtin" generates, at least 1."""
    seed: int = 42
    """Seed of "builtin"; the first n problems of a seed do not depend on how many are generated."""
    boxed_answers: str = "sentence"
    """What becomes of an answer in \\boxed{}: "sentence" or "keep", as in forms.parse_row."""

    def __str__(self) -> str:
        return f"{self.name} (split {self.split})" if local_path(self.name) is None else self.name

    def files(self) -> list[Path] | None:
        """The local files that hold the rows, in order of reading; None for "builtin" and for the Hub."""
        path = local_path(self.name)
        if path is None:
            if looks_local(self.name):
                raise DataError(f"{self.name}: nothing at {Path(self.name).expanduser().absolute()}. Correct the path.")
            return None
        files = _files_in(path, self.split) if path.is_dir() else [path]
        for file in files:
            if file.suffix not in READERS:
                raise DataError(
                    f"{file.absolute()}: rows are read from {', '.join(SUFFIXES)} files. Convert or rename it."
                )
        return files

    def read(self, *, streaming: bool = False) -> Iterator[Found]:
        """("file line 3", object) for each row, unchecked, with all its fields.

        Args:
            streaming: read a Hub data set as it arrives instead of downloading it first.
        """
        files = self.files()
        found: Iterator[Found]
        if files is not None:
            found = itertools.chain.from_iterable(READERS[file.suffix](file) for file in files)
        elif self.name == "builtin":
            found = self._generate()
        else:
            hub = _open_hub(self.name, self.config, self.split, streaming)
            found = ((f"{self.name} row {number}", each) for number, each in enumerate(hub, start=1))
        return itertools.islice(found, self.max_rows)

    def _generate(self) -> Iterator[Found]:
        count = self.builtin_rows if self.max_rows is None else min(self.builtin_rows, self.max_rows)
        problems = wordproblems.generate(count, seed=self.seed, split="train" if self.split == "train" else "test")
        for number, problem in enumerate(problems, start=1):
            yield f"builtin row {number}", {name: getattr(problem, name) for name in wordproblems.COLUMNS}

    def rows(self, *, streaming: bool = False) -> Iterator[Row]:
        """The rows, checked. The first row decides the form, and all others must have the same.

        Raises:
            DataError: a row cannot be used (the message gives its file and line), or there are no rows.
        """
        form = None
        for where, found in self.read(streaming=streaming):
            if form is None:
                form = detect_form(found, where)
            yield parse_row(found, where, form, boxed_answers=self.boxed_answers)
        if form is None:
            raise DataError(
                f"{self} holds no rows, so there is nothing to read. Give a file with one JSON object per line."
            )

    def identity(self) -> str:
        """A digest that changes with the rows: of the files' bytes, the Hub's revision, or the generator's settings."""
        digest = hashlib.sha256(repr((self.split, self.max_rows, self.seed, self.boxed_answers)).encode())
        files = self.files()
        if files is not None:
            for path in files:
                with path.open("rb") as file:
                    digest.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
        elif self.name == "builtin":
            digest.update(f"builtin {self.builtin_rows}".encode())
        else:
            digest.update(str(_open_hub(self.name, self.config, self.split)._fingerprint).encode())
        return digest.hexdigest()
