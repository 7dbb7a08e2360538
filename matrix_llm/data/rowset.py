"""The rows of one source: read once, stored as Arrow in the cache if there is one, and tokenised from there."""

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import datasets
import pyarrow as pa

from matrix_llm.data.cache import cached_folder, key_of, open_arrow, tokenizer_key
from matrix_llm.data.forms import Row, rows_from_columns
from matrix_llm.data.readers import Source
from matrix_llm.data.tokens import Encoder, row_texts, tokenise

# The fields of Row, in order, as Row.record writes them. Not left to Arrow to infer: a chunk of rows without messages
# would get another type, and the arguments of tool calls have no type in common.
SCHEMA = pa.schema(
    {
        "layout": pa.string(),
        "question": pa.string(),
        "answer": pa.string(),
        "messages": pa.string(),
        "tools": pa.string(),
        "trained": pa.string(),
        "template_kwargs": pa.string(),
        "weight": pa.int8(),
    }
)
WRITE_CHUNK = 10_000  # rows held as Python objects while the table is written
READ_CHUNK = 1000  # rows fetched at a time: fetching memory-mapped rows one by one costs more


class RowSet:
    """The rows of a source, which can be iterated over any number of times.

    Args:
        root: the cache folder, or None to keep the rows in memory.
        streaming: read the source again for each iteration, and store nothing.
    """

    def __init__(self, source: Source, root: Path | None, *, streaming: bool = False) -> None:
        self.source, self.root, self.streaming = source, root, streaming

    def __iter__(self) -> Iterator[Row]:
        if self.streaming:
            yield from self.source.rows(streaming=True)
            return
        for columns in self.table.iter(batch_size=READ_CHUNK):
            yield from rows_from_columns(columns)

    @cached_property
    def key(self) -> str:
        """Changes with the content of the rows."""
        return key_of("rows", self.source.identity())

    @cached_property
    def table(self) -> datasets.Dataset:
        """All rows, with the fields of `Row` as columns; memory-mapped if there is a cache."""
        if self.root is None:
            return datasets.Dataset(pa.concat_tables(self._tables()))
        return open_arrow(cached_folder(self.root, f"rows-{self.key}", self._write), "rows")

    def _tables(self) -> Iterator[pa.Table]:
        rows = self.source.rows()
        while chunk := list(itertools.islice(rows, WRITE_CHUNK)):
            yield pa.Table.from_pylist([row.record() for row in chunk], schema=SCHEMA)

    def _write(self, folder: Path) -> None:
        with pa.ipc.new_stream(str(folder / "rows.arrow"), SCHEMA) as writer:
            for table in self._tables():
                writer.write_table(table)

    @cached_property
    def layout(self) -> str:
        """The layout of the first row, which all rows share."""
        return next(iter(self)).layout

    def texts(self, prompt_template: str, separator: str) -> Iterator[str]:
        """What a tokenizer is trained on: each row as one text."""
        return ("".join(row_texts(row, prompt_template, separator)) for row in self)

    def tokens(
        self, encoder: Encoder, name: str, *, count: int | None = None, num_proc: int | None = None
    ) -> datasets.Dataset:
        """The tokens of the first `count` rows, or of all; computed once for these settings, then cached."""
        table = self.table
        if count is not None and count < len(table):
            table = table.select(range(count))
        if self.root is None:
            return tokenise(table, encoder, name=name, num_proc=num_proc)

        def build(folder: Path) -> None:
            tokenise(table, encoder, name=name, num_proc=num_proc, file=folder / "tokens.arrow")

        key = key_of("tokens", self.key, len(table), tokenizer_key(encoder.tokenizer), encoder.settings)
        return open_arrow(cached_folder(self.root, f"tokens-{key}", build), "tokens")
