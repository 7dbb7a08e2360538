"""From a file, a folder, a Hub id or the built-in generator to checked rows. Bad rows stop with file and line.

    Source("data/train.jsonl", max_rows=1000).read()  ->  ("data/train.jsonl line 1", {"query": ..., "response": ...}), ...

Rows are read one at a time, and kept as Arrow chunks, in memory or in a memory-mapped file: no reader holds the whole file.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from matrix_llm.base.errors import DataError
from matrix_llm.data.jsonarray import ArrayError, iterate_array

ARRAY_CHUNK = 1 << 20  # characters of a JSON array decoded at a time
SUFFIXES = (".jsonl", ".json", ".parquet")
CHUNK = 10_000  # rows held as Python objects at a time
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")

# Row forms in order of precedence: the first whose fields the first row has is required of every row.
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "query/response": ("query", "response"),  # MetaMathQA
    "question/answer": ("question", "answer"),  # GSM8K
    "text": ("text",),
}


# ---------------------------------------------------------------------------------------------------------------- where rows are


def looks_local(source: str) -> bool:
    """True for what can only be meant as a path: data/x.jsonl, ./folder, /folder, ~/folder. "org/name" is a Hub id."""
    return source.endswith(SUFFIXES) or source.startswith(("./", "../", "/", "~"))


def local_path(source: str) -> Path | None:
    """The existing file or folder that `source` names, or None ("builtin" and Hub ids)."""
    path = Path(source).expanduser()
    return path if source != "builtin" and path.exists() else None


def _files_in(folder: Path, split: str) -> list[Path]:
    """The folder's files of one split: those named after it (train.jsonl, train-00000-of-00002.parquet), or all where none is named so."""
    files = sorted(
        p for p in folder.rglob("*") if p.suffix in SUFFIXES and "/." not in f"/{p.relative_to(folder).as_posix()}"
    )
    if not files:
        raise DataError(
            f"{folder.absolute()} holds no {', '.join(SUFFIXES)} file, so there are no rows to read. Give another path."
        )
    names = {path: re.split(r"[-_.]", path.stem)[0] for path in files}
    chosen = [path for path in files if names[path] == split]
    others = sorted({name for name in names.values() if name in SPLITS})
    if not chosen and others:
        raise DataError(
            f"{folder.absolute()} has files for {', '.join(others)}, but none for the split {split!r}. Name one of them, or give a file."
        )
    return chosen or files


# ------------------------------------------------------------------------------------------------------------------ reading rows


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """("file line 3", object) for each line; a line at a time, so that memory does not grow with the file."""
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


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of objects, one at a time (MetaMathQA is one array of 400 MB); what does not start with [ is read as JSON lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            if file.read(1024).lstrip().startswith("["):
                file.seek(0)
                yield from (
                    (f"{path} row {number}", row)
                    for number, row in enumerate(iterate_array(file, ARRAY_CHUNK), start=1)
                )
                return
    except ArrayError as error:
        raise DataError(f"{path} line {error.line}: not JSON ({error}). Correct the file.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from None
    yield from _read_jsonl(path)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=CHUNK):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from None


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _open_hub(source: str, config: str | None, split: str, streaming: bool = False) -> Any:
    try:
        return datasets.load_dataset(source, config, split=split, streaming=streaming)
    except (
        Exception
    ) as error:  # offline, gated, no such split, no such configuration: the Hub client has a class for each
        named = f"{source!r}" + (f" (configuration {config!r})" if config else "")
        raise DataError(
            f"the dataset {named}, split {split!r}, is neither a local path nor readable from the Hub: {type(error).__name__}: {error} "
            "Check the name and the connection, or give a local file."
        ) from None


# --------------------------------------------------------------------------------------------------------------- checking rows


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def detect_form(columns: Iterable[str], where: str = "the rows") -> str:
    """The row form of these columns.

    >>> detect_form(["query", "response", "type", "original_question"])
    'query/response'
    """
    columns = list(columns)
    for form, fields in FORMS.items():
        if all(name in columns for name in fields):
            return form
    half = [
        f"`{has}` but no `{lacks}`"
        for f in FORMS.values()
        if len(f) == 2
        for has, lacks in (f, f[::-1])
        if has in columns
    ]
    found = f"has {half[0]}" if half else f"has the fields {', '.join(map(str, columns)) or '(none)'}"
    raise DataError(
        f"{where} {found}. A row needs one of: {'; '.join(' and '.join(fields) for fields in FORMS.values())}."
    )


def _check_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_describe(message)}, but a message is an object with `role` and `content`.")
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise DataError(f"{where} has `{name}` = {_describe(message.get(name))}, but it must be a text.")
    return {"role": message["role"], "content": message["content"]}


def _check_row(row: Any, form: str, where: str) -> dict[str, Any]:
    """The row's fields of this form, or DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {' and '.join(FORMS[form])}, found {_describe(row)}.")
    for name in FORMS[form]:
        if name not in row:
            has = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"{where}: no `{name}`; the row has {has}. Every row needs {' and '.join(FORMS[form])}.")
    if form == "messages":
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: `messages` is {_describe(messages)}, but it must be a list of role and content.")
        checked = [_check_message(message, f"{where}: message {i}") for i, message in enumerate(messages, start=1)]
        if all(message["role"] != "assistant" for message in checked):
            raise DataError(f"{where}: no message has the role assistant, so there is nothing to train on.")
        return {"messages": checked}
    for name in FORMS[form]:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: `{name}` is {_describe(row[name])}, but it must be a text.")
        try:
            row[name].encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: `{name}` holds half of a surrogate pair, which is no text. Correct its escape sequences."
            ) from None
        if not row[name].strip():
            raise DataError(f"{where}: `{name}` is empty. Fill it in, or remove the row.")
    return {name: row[name] for name in FORMS[form]}


# ------------------------------------------------------------------------------------------------------------------- sources

BUILTIN_COLUMNS = ("query", "response", "type", "original_question", "answer")


@dataclass(frozen=True)
class Source:
    """Which rows: a name as in `dataset`, and what narrows it. Nothing is read before read(), load() or identity()."""

    name: str  # "builtin", a file, a folder, or a Hub id
    config: str | None = None
    split: str = "train"
    max_rows: int | None = None
    builtin_rows: int = 20_000
    seed: int = 42  # of "builtin"

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
            if file.suffix not in SUFFIXES:
                raise DataError(
                    f"{file.absolute()}: rows are read from {', '.join(SUFFIXES)} files. Convert or rename it."
                )
        return files

    def read(self, *, streaming: bool = False) -> Iterator[tuple[str, Any]]:
        """("file line 3", row) for each row, unchecked and with all its fields; streaming reads a Hub dataset as it arrives."""
        files = self.files()
        rows: Iterator[tuple[str, Any]]
        if files is not None:
            rows = itertools.chain.from_iterable(_READERS[file.suffix](file) for file in files)
        elif self.name == "builtin":
            rows = self._builtin()
        else:
            found = _open_hub(self.name, self.config, self.split, streaming)
            rows = ((f"{self.name} row {number}", row) for number, row in enumerate(found, start=1))
        return itertools.islice(rows, self.max_rows)

    def _builtin(self) -> Iterator[tuple[str, Any]]:
        from matrix_llm.data import wordproblems

        count = self.builtin_rows if self.max_rows is None else min(self.builtin_rows, self.max_rows)
        problems = wordproblems.generate(count, seed=self.seed, split="train" if self.split == "train" else "test")
        for number, problem in enumerate(problems, start=1):
            yield f"builtin row {number}", {name: getattr(problem, name) for name in BUILTIN_COLUMNS}

    def checked(self, *, streaming: bool = False) -> Iterator[dict[str, Any]]:
        """The fields of each row's form (see FORMS). The first row decides the form, and every row must have it.

        Raises:
            DataError: at the first row that does not, with its file and line; or there is no row at all.
        """
        form = None
        for where, row in self.read(streaming=streaming):
            if form is None:
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected an object, found {_describe(row)}.")
                form = detect_form(row, f"{where}: the row")
            yield _check_row(row, form, where)
        if form is None:
            raise DataError(
                f"{self} holds no rows, so there is nothing to read. Give a file with one JSON object a line."
            )

    def identity(self) -> str:
        """A digest that changes with the rows: of the files' bytes, of the Hub's revision, or of the generator's settings."""
        digest = hashlib.sha256(repr((self.split, self.max_rows, self.seed)).encode())
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

    def load(self, file: Path | None = None) -> datasets.Dataset:
        """The checked rows, in memory or written to `file` and memory-mapped from there."""
        rows = (row for _, row in self.read()) if self.name == "builtin" else self.checked()
        writer, tables = None, []
        while chunk := list(itertools.islice(rows, CHUNK)):
            table = pa.Table.from_pylist(chunk)
            if file is None:
                tables.append(table)
                continue
            writer = writer or pa.ipc.new_stream(str(file), table.schema)
            writer.write_table(table)
        if file is None:
            return datasets.Dataset(pa.concat_tables(tables))
        assert writer is not None  # checked() raises where there is no row
        writer.close()
        return datasets.Dataset.from_file(str(file))


def load_rows(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    max_rows: int | None = None,
    builtin_rows: int = 20_000,
    seed: int = 42,
) -> datasets.Dataset:
    """Raw rows, each checked: "builtin" (builtin_rows of them, of `split` "train" or "test"), a file, a folder, or a Hub id.

    The columns are those of the rows' form (see FORMS); "builtin" also has type, original_question and answer.
    """
    return Source(source, config, split, max_rows, builtin_rows, seed).load()
