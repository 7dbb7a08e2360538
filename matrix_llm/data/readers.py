"""Where rows come from: a file, a folder, a Hub data set, or the built-in generator. Errors give the file and line.

    Source("data/train.jsonl", max_rows=1000).read()   ->  ("data/train.jsonl line 1", {"query": ..., "type": ...}), ...
    Source("data/train.jsonl", max_rows=1000).rows()   ->  Row(question=...), ...
    Source("data/math", split="train[:10%]", columns={"question": "problem", "answer": "solution"})

Rows are read one at a time, so memory does not grow with the file.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from matrix_llm.base.errors import DataError, one_line
from matrix_llm.base.values import nearest
from matrix_llm.data import wordproblems
from matrix_llm.data.folders import find_rows, is_saved, saved_files
from matrix_llm.data.formats import SUFFIXES, UNREADABLE, Found, check_suffix, read_file, read_saved, suffix_of
from matrix_llm.data.forms import Row, detect_form, parse_row, unread_fields

PACKED, PACKED_SUFFIXES = 3, (".gz", ".zst", ".parquet")  # about how much larger the rows are than these files
ENDS = 1 << 20  # bytes at each end of a file that stand for all of it where reading it all would take too long


def looks_local(name: str) -> bool:
    """True for what can only be a path: data/x.jsonl, ./folder, /folder, ~/folder. "org/name" is a Hub id."""
    return name.lower().endswith((*SUFFIXES, *UNREADABLE)) or name.startswith(("./", "../", "/", "~"))


def as_path(name: str) -> Path:
    """The path that a name would have; a ~ that stands for nobody stays as it is."""
    return Path(os.path.expanduser(name))  # Path.expanduser would raise


def local_path(name: str) -> Path | None:
    """The existing file or folder of this name, or None ("builtin" and Hub ids)."""
    try:
        return as_path(name) if name != "builtin" and as_path(name).exists() else None
    except OSError:  # longer than a path can be
        return None


# --- a slice of a split -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """A split and the part of it that is read: "train", "train[:1000]", "train[10%:-5%]"."""

    split: str
    """The split's name."""
    start: str = ""
    """Where to start: "", a number of rows or a percentage; from the end if it is negative."""
    stop: str = ""
    """Where to stop, in the same way."""

    @classmethod
    def of(cls, text: str) -> "Slice":
        """
        >>> Slice.of("train[10%:]")
        Slice(split='train', start='10%', stop='')

        Raises:
            DataError: the text is no split.
        """
        bound = r"\s*((?:-?\d+%?)?)\s*"
        found = re.fullmatch(rf"\s*([\w.-]+)\s*(?:\[{bound}:{bound}\])?\s*", text)
        if found is None:
            way_out = (
                "Give a list of data sets instead." if "+" in text else "Write train, train[:1000] or train[10%:20%]."
            )
            raise DataError(f"the split {text!r} cannot be read. {way_out}")
        bounds = [each or "" for each in found.groups()[1:]]
        too_far = [each for each in bounds if each.endswith("%") and abs(int(each[:-1])) > 100]
        if too_far:
            raise DataError(f"the split {text!r} asks for {too_far[0]} of the rows. Give at most 100%.")
        return cls(found[1], *bounds)

    @property
    def needs_count(self) -> bool:
        """Whether the number of all rows must be known."""
        return any(bound.endswith("%") or bound.startswith("-") for bound in (self.start, self.stop))

    def bounds(self, count: int) -> tuple[int, int | None]:
        """Start and stop for itertools.islice, of `count` rows."""
        start = self._place(self.start, count) if self.start else 0
        return start, self._place(self.stop, count) if self.stop else None

    @staticmethod
    def _place(bound: str, count: int) -> int:
        place = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)  # rounded as on the Hub
        is_from_end = bound.startswith("-")
        return max(place + count, 0) if is_from_end else place


# --- the Hub ----------------------------------------------------------------------------------------------------------


def _open_hub(source: "Source", split: str, streaming: bool = False) -> Any:
    try:
        return datasets.load_dataset(
            source.name, source.config, split=split, revision=source.revision, streaming=streaming
        )
    # Offline, gated, or no such data set, split or configuration: `datasets` raises one of these
    except (OSError, ValueError, DatasetsError) as error:
        raise _unreadable_on_hub(source, error) from None


def _unreadable_on_hub(source: "Source", error: Exception) -> DataError:
    said = {"configuration": source.config, "revision": source.revision}
    named = ", ".join(f"{key} {value!r}" for key, value in said.items() if value)
    return DataError(
        f"the dataset {source.name!r}{f' ({named})' if named else ''}, split {source.split!r}, is neither a local path "
        f"nor readable from the Hub: {type(error).__name__}: {one_line(error)}. "
        "Check the name and the connection, or give a local file."
    )


# --- one source of rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Which rows to read. Nothing is read until read(), rows() or identity() is called."""

    name: str
    """"builtin", a file, a folder, or a Hub id."""
    config: str | None = None
    """A configuration of a Hub data set or a folder, such as "main" of openai/gsm8k."""
    split: str = "train"
    """Split of a folder, a Hub data set or the generator; "train[:1000]" is a part of one."""
    max_rows: int | None = None
    """Read only this many rows from the start, at least 1; None reads all."""
    builtin_rows: int = 20_000
    """How many problems "builtin" generates, at least 1."""
    seed: int = 42
    """Seed of "builtin"; the first n problems of a seed do not depend on how many are generated."""
    boxed_answers: str = "sentence"
    """What becomes of an answer in \\boxed{}: "sentence" or "keep", as in forms.parse_row."""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """{our name: theirs} for fields that the rows have under other names."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; None: its main branch."""

    def __str__(self) -> str:
        is_whole_path = local_path(self.name) is not None and "[" not in self.split
        return self.name if is_whole_path else f"{self.name} (split {self.split})"

    @property
    def is_file(self) -> bool:
        """Whether it is one local file."""
        path = local_path(self.name)
        return path is not None and path.is_file()

    @property
    def has_splits(self) -> bool:
        """Whether it is a file that may hold several splits: {"train": [...], "test": [...]}."""
        return self.is_file and suffix_of(Path(self.name)) in (".json", ".json.gz", ".json.zst")

    def files(self) -> list[Path] | None:
        """The local files that hold the rows, in order of reading (for a data set of save_to_disk, its folder); None
        for "builtin" and for the Hub.

        Raises:
            DataError: there is nothing at the path, or nothing that can be read.
        """
        path, part = local_path(self.name), Slice.of(self.split)
        if path is None:
            if looks_local(self.name):
                raise DataError(f"{self.name}: nothing at {as_path(self.name).absolute()}. Correct the path.")
            return None
        if path.is_dir():
            return find_rows(path, self.config, part.split)
        check_suffix(path)
        return [path]

    def read(self, *, streaming: bool = False) -> Iterator[Found]:
        """("file line 3", object) for each row, with all its fields, unchecked but for the names in `columns`.

        Args:
            streaming: read a Hub data set as it arrives instead of downloading it first.
        """
        part = Slice.of(self.split)
        if self.files() is None and self.name != "builtin" and not streaming:
            found = self._read_hub(self.split, streaming=False)  # `datasets` cuts the slice
        else:
            start, stop = part.bounds(self._count() if part.needs_count else 0)
            found = itertools.islice(self._read_all(part.split, streaming), start, stop)
        found = itertools.islice(found, self.max_rows)
        return self._rename(found) if self.columns else found

    def _read_all(self, split: str, streaming: bool) -> Iterator[Found]:
        files = self.files()
        if files is None:
            return self._generate(split) if self.name == "builtin" else self._read_hub(split, streaming)
        readers = (read_saved(file) if is_saved(file) else read_file(file, split) for file in files)
        return itertools.chain.from_iterable(readers)

    def _read_hub(self, split: str, streaming: bool) -> Iterator[Found]:
        hub = _open_hub(self, split, streaming)
        return ((f"{self.name} row {number}", each) for number, each in enumerate(hub, start=1))

    def _generate(self, split: str) -> Iterator[Found]:
        count = self.builtin_rows if self.max_rows is None else min(self.builtin_rows, self.max_rows)
        count = self.builtin_rows if self.split != split else count
        split = split if split in wordproblems.SPLITS else "test"
        problems = wordproblems.generate(count, seed=self.seed, split=split)
        for number, problem in enumerate(problems, start=1):
            yield f"builtin row {number}", {name: getattr(problem, name) for name in wordproblems.COLUMNS}

    def _count(self) -> int:
        """The number of all rows of the split. A local data set is read once for it."""
        return sum(1 for _ in self._read_all(Slice.of(self.split).split, streaming=True))

    def _rename(self, found: Iterator[Found]) -> Iterator[Found]:
        """The objects with their columns under our names. A column that has been renamed is gone under its old one."""
        is_first, theirs = True, set(self.columns.values())
        for where, row in found:
            if isinstance(row, dict):
                lacks = next((name for name in self.columns.values() if name not in row), None)
                if lacks is not None and is_first:
                    ours = next(our for our, their in self.columns.items() if their == lacks)
                    raise DataError(
                        f"{where}: columns says {ours}: {lacks}, but the row has no `{lacks}`; it has "
                        f"{', '.join(map(str, row)) or 'no fields'}. Correct columns.{nearest(lacks, map(str, row))}"
                    )
                kept = {name: value for name, value in row.items() if name not in theirs and name not in self.columns}
                row = {our: row[their] for our, their in self.columns.items() if their in row} | kept
            yield where, row
            is_first = False

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

    def unread_fields(self) -> list[str]:
        """The fields of the first row that its form ignores. No row is counted and nothing else is read."""
        if self.name == "builtin":
            return []
        rows = self._rename(self._read_all(Slice.of(self.split).split, streaming=False))
        where, first = next(rows, ("", None))
        return unread_fields(first, detect_form(first, where)) if isinstance(first, dict) else []

    def estimate_rows(self) -> int | None:
        """About how many rows there are, from the size of the files and their first rows; None if it is not known."""
        files = self.files()
        if files is not None:
            paths = [path for file in files for path in (saved_files(file) if file.is_dir() else [file])]
            size = sum(path.stat().st_size * (PACKED if path.suffix in PACKED_SUFFIXES else 1) for path in paths)
            first = [str(found) for _, found in itertools.islice(self._read_all(Slice.of(self.split).split, True), 100)]
            count = round(size / (sum(map(len, first)) / len(first))) if first else 0
        elif self.name == "builtin":
            count = self.builtin_rows
        else:
            splits = _open_hub(self, Slice.of(self.split).split, streaming=True).info.splits or {}
            of_split = splits.get(Slice.of(self.split).split)
            if of_split is None or not of_split.num_examples:
                return None
            count = of_split.num_examples
        start, stop = Slice.of(self.split).bounds(count)
        count = max(min(count, count if stop is None else stop) - start, 1)
        return count if self.max_rows is None else min(count, self.max_rows)

    # --- what the rows are known by -----------------------------------------------------------------------------------

    def identity(self) -> str:
        """A digest that changes with the rows: of their content, and of what selects and renames them."""
        chosen = (self.split, self.max_rows, self.seed, self.boxed_answers, sorted(self.columns.items()))
        settings = f"builtin {self.builtin_rows}" if self.name == "builtin" else ""
        return hashlib.sha256(repr((chosen, settings, self.content())).encode()).hexdigest()

    def content(self, *, streaming: bool = False) -> str:
        """A digest of where the rows are read from: the bytes of its files, or the revision of the Hub data set.

        Args:
            streaming: where all of it would be too much: the size and the two ends of each file, or the commit that the
                Hub names.
        """
        files = self.files()
        if files is None:
            return "" if self.name == "builtin" else self._hub_content(streaming)
        digest = hashlib.sha256()
        for file in files:
            for path in saved_files(file) if file.is_dir() else [file]:
                digest.update(path.suffix.encode() + file_digest(path, streaming))
        return digest.hexdigest()

    def _hub_content(self, streaming: bool) -> str:
        if not streaming:
            return str(_open_hub(self, self.split)._fingerprint)
        try:
            return str(HfApi().dataset_info(self.name, revision=self.revision).sha)
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise _unreadable_on_hub(self, error) from None


def file_digest(path: Path, ends_only: bool) -> bytes:
    """A digest of a file's bytes; of its size and its two ends, where all of it would take too long."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if not ends_only or size <= 2 * ENDS:
            return hashlib.file_digest(file, "sha256").digest()
        start = file.read(ENDS)
        file.seek(size - ENDS)
        return hashlib.sha256(f"{size}".encode() + start + file.read()).digest()
