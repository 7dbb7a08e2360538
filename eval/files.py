"""Reading the files that users give to the commands, and writing the commands' JSON.

Rows are read one at a time: memory does not grow with the file.
"""

import csv
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import parse_json, write_text
from matrix_llm.data.jsonarray import ArrayError, iterate_array

from .text import first_line

CHUNK = 1 << 20  # characters of a JSON list decoded at a time
PARQUET_ROWS = 1000  # decoded at a time
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
FORMATS = ".jsonl, .json, .parquet or .csv"


def read_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json (a list, or one object a line), .parquet or .csv (a head line, then texts) file.

    Args:
        columns: read only these of a parquet file, if it has any of them.

    Raises:
        EvalError: there is no such file, it is of another format, or a row is not an object.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
        raise EvalError(f"{path} {what}. Give a {FORMATS} file.")
    if path.suffix == ".parquet":
        rows = _read_parquet(path, columns)
    elif path.suffix in (".jsonl", ".json"):
        rows = _read_json(path)
    elif path.suffix == ".csv":
        rows = _read_csv(path)
    else:
        raise EvalError(f"{path} ends in {path.suffix!r}, which is not a known format. Give a {FORMATS} file.")
    try:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise EvalError(f"{path}: row {number} is of type {kind}, not an object with named fields.")
            yield row
    except OSError as error:
        raise EvalError(f"{path} cannot be read ({error.strerror}). Give another {FORMATS} file.") from None


def _read_json(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            is_list = file.read(CHUNK).lstrip().startswith("[")
            file.seek(0)
            if is_list:
                yield from iterate_array(file, CHUNK)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield parse_json(line)
                    except ValueError as error:
                        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                        raise EvalError(
                            f"{path}, line {number}, is not JSON ({reason}). Repair or remove that line."
                        ) from None
    except ArrayError as error:
        raise EvalError(f"{path}, line {error.line}, is not JSON ({error}). Repair the file.") from None
    except UnicodeDecodeError:
        raise EvalError(f"{path} is not UTF-8 text. Convert it, or check that it is not compressed.") from None


def _read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Each value is a text. A row with more or fewer values than the head line has names is refused."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            names = next(rows, [])
            repeated = next((name for name in names if names.count(name) > 1), None)
            if repeated is not None:
                raise EvalError(f"{path}: the head line names {repeated!r} twice. Rename one of the columns.")
            for values in rows:
                if values and len(values) != len(names):
                    raise EvalError(
                        f"{path}, line {rows.line_num}, has {len(values)} values where the head line names "
                        f"{len(names)}. Put values that hold commas or line breaks between double quotes."
                    )
                if values:
                    yield dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise EvalError(f"{path}, line {rows.line_num}, is not CSV ({error}). Repair or remove that line.") from None
    except UnicodeDecodeError:
        raise EvalError(f"{path} is not UTF-8 text. Convert it, or check that it is not compressed.") from None


def _read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [name for name in names if columns is None or name in columns]
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=known or names):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise EvalError(f"{path} cannot be read as parquet ({first_line(error)}). Download it again.") from None


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as JSON for --out, the complete file or nothing."""
    try:
        write_text(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise EvalError(f"--out {path} cannot be written ({error.strerror}). Give another file.") from None
