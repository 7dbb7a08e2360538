"""Rows tokenised while they are trained on: nothing is kept on disk, and training starts after one buffer of rows.

    pass 1: rows 0 .. n-1, read in order, shuffled through a buffer -> tokens -> rows that can be trained on
    pass 2: the same rows, shuffled anew; and so on without end, which is why a run that streams needs max_steps

The order depends on the seed alone. Every rank reads the same stream and takes its own batches from it (accelerate's
IterableDatasetShard), so ranks never differ in their number of batches; resuming reads and skips the batches already trained on.
"""

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import datasets
import numpy as np

from matrix_llm.base.errors import DataError
from matrix_llm.data.readers import FORMS, Source
from matrix_llm.data.tokens import FEATURES, DataReport, Encoder, keep

SAMPLE = 1000  # first rows, measured before training starts
BATCH = 100  # rows tokenised at a time

Row = TypeVar("Row")


def shuffled(rows: Iterable[Row], buffer: int, rng: random.Random) -> Iterator[Row]:
    """`rows` in an order drawn through a buffer: each leaves from a random place, which the next one takes.

    >>> list(shuffled(range(5), 1, random.Random(0))), sorted(shuffled(range(5), 3, random.Random(0)))
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    held: list[Row] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
        else:
            place = rng.randrange(buffer)
            yield held[place]
            held[place] = row
    if buffer > 1:
        rng.shuffle(held)
    yield from held


@dataclass
class TokenStream:
    """An endless iterable of {"input_ids", "labels", "row_id"}: pass after pass over the source, without the rows to leave out."""

    source: Source
    encoder: Encoder
    seed: int
    buffer: int  # rows held for shuffling; 1 keeps the order of the file
    leaked: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count(1):
            yield from self._pass(number)

    def _pass(self, number: int) -> Iterator[dict[str, Any]]:
        rows = ((i, row) for i, row in enumerate(self.source.checked(streaming=True)) if i not in self.leaked)
        mixed = shuffled(rows, self.buffer, random.Random(f"{self.seed}/{number}"))
        read = too_long = masked = 0
        while chunk := list(itertools.islice(mixed, BATCH)):
            indices = [i for i, _ in chunk]
            encoded = self.encoder(
                {name: [row[name] for _, row in chunk] for name in FORMS[self.encoder.form]}, indices
            )
            for at, row_id in enumerate(indices):
                length, read = encoded["length"][at], read + 1
                if self.encoder.over(length) and self.encoder.too_long == "error":
                    raise DataError(
                        f"row {row_id + 1} of {self.source} is {length} tokens long, over max_length={self.encoder.max_length}. "
                        "Raise max_length, or set too_long to drop or truncate."
                    )
                if encoded["trained"][at]:
                    yield {name: encoded[name][at] for name in FEATURES}
                elif self.encoder.over(length) and self.encoder.too_long == "drop":
                    too_long += 1
                else:
                    masked += 1
        if too_long + masked == read:
            raise DataError(
                f"all {read} rows of {self.source} are too long or without a trained token: nothing to train on. Raise max_length."
            )
        if number == 1 and int(os.environ.get("RANK", "0")) == 0:
            print(
                f"=> stream, first pass: {read:,} rows, {too_long:,} dropped as too long, {masked:,} without a trained token",
                flush=True,
            )

    def sample(self, name: str) -> tuple[datasets.Dataset, DataReport]:
        """The first rows, tokenised, and their measures: what a plan can know of a stream.

        Raises:
            DataError: none of them can be trained on.
        """
        rows = list(itertools.islice(self.source.checked(streaming=True), SAMPLE))
        columns = {column: [row[column] for row in rows] for column in FORMS[self.encoder.form]}
        tokens = datasets.Dataset.from_dict(self.encoder(columns, list(range(len(rows)))))
        leaked = [i for i in self.leaked if i < len(rows)]
        dataset, report = keep(tokens, self.encoder, name, leaked)
        report.sampled = True
        return dataset, report

    def dataset(self) -> datasets.IterableDataset:
        """For SFTTrainer. The stream is one object, not a list of shards, so that every rank walks through the whole of it."""
        return datasets.IterableDataset.from_generator(_rows, datasets.Features(FEATURES), {"stream": self})


def _rows(stream: TokenStream) -> Iterator[dict[str, Any]]:
    for row in stream:
        yield {
            name: np.asarray(value, dtype=np.int32) if isinstance(value, list) else value for name, value in row.items()
        }
