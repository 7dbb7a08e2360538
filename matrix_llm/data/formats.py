"""Read the rows of one file, one at a time, so that memory does not grow with the file. Errors give file and line.

    read_file(Path("data/train.jsonl.gz"))   ->  ("data/train.jsonl.gz line 1", {"query": ..., "type": ...}), ...

`datasets`' own readers are not used for text because their errors do not name the line.
"""

import contextlib
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from matrix_llm.base.errors import DataError, one_line
from matrix_llm.data.jsonarray import ArrayError, JsonReader

ARRAY_CHUNK = 1 << 20  # characters of a JSON array that are decoded at a time
PARQUET_BATCH = 10_000  # rows of a Parquet file or an Arrow table held as Python objects at a time

Found = tuple[str, Any]  # an object's place, for error messages, and the object


# --- opening a file ---------------------------------------------------------------------------------------------------


def _open_gzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(path))


def _open_zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]


COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _open_gzip, ".zst": _open_zstd}

# How files begin whose name promises something else
SIGNATURES = {
    b"\x1f\x8b": "it is compressed by gzip. Rename it to end in .gz.",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd. Rename it to end in .zst.",
    b"PK\x03\x04": "it is a zip archive, or an Excel file. Unpack or convert it.",
    b"PAR1": "it is a Parquet file. Rename it to end in .parquet.",
    b"ARROW1": "it is an Arrow file. Give the folder that save_to_disk wrote, or convert it.",
    b"\xff\xfe": "it is UTF-16 text. Save it as UTF-8.",
    b"version https://git-lfs": "it is a Git LFS pointer, which stands for a file that was not downloaded. "
    "Run `git lfs pull` where it comes from.",
}


def _open_bytes(path: Path) -> IO[bytes]:
    """The text of a file, decompressed as it is read."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    with path.open("rb") as file:
        start = file.read(32)
    for signature, message in SIGNATURES.items():
        is_expected = opener is not None and signature in (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")
        if start.startswith(signature) and not is_expected:
            raise DataError(f"{path}: not {suffix_of(path)}: {message}")
    return opener(path) if opener else path.open("rb")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what can go wrong while a file is opened and decompressed into one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}. Copy the file again, or give another.") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, with its line break."""
    with _readable(path), _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number}: not UTF-8 text ({error.reason} at byte {error.start}). "
                    "Save the file as UTF-8."
                ) from None


# --- one function for each format -------------------------------------------------------------------------------------


def _read_jsonl(path: Path, split: str) -> Iterator[Found]:
    is_first = True
    for number, line in _lines(path):
        text = line.strip()
        if not text:
            continue
        where = f"{path} line {number}"
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {_explain_line(text, error, is_first)}") from None
        if is_first and isinstance(found, list):
            raise DataError(f"{where}: a JSON array, where each line must be one object. Rename the file to .json.")
        yield where, found
        is_first = False


def _explain_line(text: str, error: Exception, is_first: bool) -> str:
    if is_first and text == "[":
        return "not JSON lines: the file is one JSON array. Rename it to .json."
    if text == "{":
        return (
            "an object that goes on over several lines, where each line must be one object. "
            "Write one per line (`jq -c . FILE`)."
        )
    reason = "nested too deeply" if isinstance(error, RecursionError) else "an integer has too many digits"
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    shown = text if len(text) <= 60 else text[:60] + "..."
    return f"not JSON ({reason}): {shown}. Correct or remove the line."


def _read_json(path: Path, split: str) -> Iterator[Found]:
    """The objects of a JSON array (MetaMathQA is one of 400 MB), of an array inside an object, or of JSON lines."""
    try:
        with _readable(path), _open_text(path) as file:
            reader = JsonReader(file, ARRAY_CHUNK)
            start = reader.peek()
            if start == "[":
                yield from _numbered(reader.array(), path)
                reader.end()
                return
        if start == "{":
            name = _array_inside(path, split)
            if name is not None:
                yield from _read_inside(path, name)
                return
    except ArrayError as error:
        raise DataError(f"{path} line {error.line}: not JSON ({error}). Correct the file.") from None
    yield from _read_jsonl(path, split)


def _open_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="\n")


def _numbered(objects: Iterator[Any], path: Path) -> Iterator[Found]:
    return ((f"{path} row {number}", found) for number, found in enumerate(objects, start=1))


# Fields of a row that hold lists of objects, and so are no array of rows
LISTS_OF_A_ROW = {"messages", "conversations", "conversation", "prompt", "completion", "tools", "chosen", "rejected"}


def _array_inside(path: Path, split: str) -> str | None:
    """The key under which the only object of a file has its rows: "data" of {"version": 1, "data": [{...}, ...]}.

    Returns:
        The key; "" if the object itself is a row; None if it is the first of several, one on each line.
    """
    arrays: list[str] = []
    with _readable(path), _open_text(path) as file:
        reader = JsonReader(file, ARRAY_CHUNK)
        reader.peek()
        try:
            for name in reader.names():
                if reader.peek() != "[":
                    reader.value()
                elif sum(isinstance(each, dict) for each in reader.array()):  # not any(): it would stop half-way
                    arrays.append(name)
        except ArrayError as error:
            if error.line == 1:
                return None
            raise
        if reader.peek():
            return None
    arrays = [name for name in arrays if name not in LISTS_OF_A_ROW]
    if len(arrays) > 1 and split not in arrays:
        raise DataError(
            f"{path}: an object with several lists of rows: {', '.join(arrays)}. "
            "Give a file for each, or name one of them as the split."
        )
    return (split if len(arrays) > 1 else arrays[0]) if arrays else ""


def _read_inside(path: Path, name: str) -> Iterator[Found]:
    with _readable(path), _open_text(path) as file:
        reader = JsonReader(file, ARRAY_CHUNK)
        if not name:
            yield f"{path} row 1", reader.value()
            return
        for key in reader.names():
            if key == name:
                yield from _numbered(reader.array(), path)
            else:
                reader.value()


def _read_csv(path: Path, split: str) -> Iterator[Found]:
    """One object for each record: every cell is a text, "" if it is empty. Quoted cells may hold line breaks."""
    csv.field_size_limit(sys.maxsize)  # the default refuses cells of more than 131,072 characters
    delimiter = "\t" if suffix_of(path).startswith(".tsv") else ","
    records = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path} line {records.line_num + 1}"  # where a record starts, which may go on over several lines
        try:
            record = next(records, None)
        except csv.Error as error:
            raise DataError(f"{where}: not {suffix_of(path)} ({error}). Correct the quotes of this record.") from None
        if record is None:
            return
        if not record:
            continue
        if header is None:
            header = record
            _check_header(header, where, delimiter)
        elif len(record) != len(header):
            raise DataError(
                f"{where}: {len(record)} cells, but the header names {len(header)} columns ({', '.join(header)}). "
                "Put cells that hold a delimiter, a quote or a line break in double quotes."
            )
        else:
            yield where, dict(zip(header, record, strict=True))


def _check_header(header: list[str], where: str, delimiter: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{where}: the header names {twice[0]!r} twice. Rename one of these columns.")
    other = next((each for each in (";", "\t", ",") if each != delimiter and each in header[0]), None)
    if len(header) == 1 and other:
        raise DataError(
            f"{where}: the header is one column, {header[0]!r}, which holds {other!r}. "
            f"Separate columns by {delimiter!r} ({'.tsv' if delimiter == chr(9) else '.csv'})."
        )


def _read_parquet(path: Path, split: str) -> Iterator[Found]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=PARQUET_BATCH):
            for found in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", found
    except (pa.ArrowException, OSError) as error:
        with path.open("rb") as file:
            start = file.read(32)
        pointer = next((said for signature, said in SIGNATURES.items() if start.startswith(signature)), None)
        if pointer is not None and not start.startswith(b"PAR1"):
            raise DataError(f"{path}: not .parquet: {pointer}") from None
        raise DataError(f"{path}: not a readable Parquet file ({error}). Correct or replace the file.") from None


def read_saved(folder: Path) -> Iterator[Found]:
    """The rows of a data set that `save_to_disk` wrote, memory-mapped."""
    try:
        saved = datasets.load_from_disk(str(folder)).with_format("arrow")  # not decoded: images stay bytes
        number = 0
        for batch in saved.iter(batch_size=PARQUET_BATCH):
            for found in batch.to_pylist():
                number += 1
                yield f"{folder} row {number}", found
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: not a readable folder of save_to_disk ({one_line(error)}). Save it again."
        ) from None


# --- which reader -----------------------------------------------------------------------------------------------------

_TEXT = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
READERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    **_TEXT,
    ".parquet": _read_parquet,
    **{f"{suffix}{packed}": reader for packed in COMPRESSIONS for suffix, reader in _TEXT.items()},
}
SUFFIXES = tuple(READERS)
KNOWN = ".jsonl, .json, .csv, .tsv (also .gz and .zst of these) and .parquet"

# What people keep data in that is not read, and what to do about it
UNREADABLE = {
    ".arrow": "Give the folder that save_to_disk wrote",
    ".txt": 'Write {"text": ...} or another form on each line of a .jsonl file',
    ".ndjson": "Rename it to .jsonl",
    ".jl": "Rename it to .jsonl",
    ".yaml": "Convert it to .jsonl",
    ".yml": "Convert it to .jsonl",
    **dict.fromkeys([".xlsx", ".xls", ".ods"], "Save it as .csv"),
    **dict.fromkeys([".zip", ".tar", ".tgz", ".7z"], "Unpack it"),
    **dict.fromkeys([".bz2", ".xz", ".lz4"], "Unpack it, or compress it by gzip (.gz)"),
    **dict.fromkeys([".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".feather", ".orc", ".avro", ".db", ".sqlite"],
                    "Convert it to .parquet"),
}  # fmt: skip


def suffix_of(path: Path) -> str:
    """The suffix that decides how a file is read: ".jsonl.gz" of a.b.jsonl.gz."""
    name = path.name.lower()
    return max((each for each in SUFFIXES if name.endswith(each)), key=len, default=path.suffix.lower())


def check_suffix(path: Path) -> None:
    """Raise DataError where no reader is known for the file."""
    suffix = suffix_of(path)
    if suffix not in READERS:
        way_out = UNREADABLE.get(suffix, "Convert or rename it")
        raise DataError(f"{path.absolute()}: rows are read from {KNOWN} files. {way_out}.")


def read_file(path: Path, split: str = "train") -> Iterator[Found]:
    """("file line 3", object) for each row of a file, unchecked.

    Args:
        split: which rows of a .json file that holds an object with several lists of them.
    """
    return READERS[suffix_of(path)](path, split)
