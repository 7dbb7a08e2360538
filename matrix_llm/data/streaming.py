"""Tokenise rows during training: nothing is stored on disk, and training starts after one buffer of rows.

    pass 1: rows 0 .. n-1, read in order, shuffled through a buffer -> tokens -> those that can be trained on
    pass 2: the same rows, shuffled in another order; and so on without end, so a run that streams needs max_steps

The order depends on the seed alone. Every rank reads the full stream and takes its own batches from it (accelerate's
IterableDatasetShard), so all ranks have the same number of batches. A resumed run reads the stream again and skips the
batches it has already trained on.
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
from matrix_llm.data.readers import Source
from matrix_llm.data.selection import DataReport, drop_unusable, judge
from matrix_llm.data.tokens import FEATURES, Encoder

SAMPLE = 1000  # rows at the start that are measured before training
BATCH = 100  # rows tokenised at a time

Item = TypeVar("Item")


def shuffle_through_buffer(items: Iterable[Item], size: int, rng: random.Random) -> Iterator[Item]:
    """Yield the items in a random order, holding `size` of them: each new item replaces a randomly chosen one.

    datasets.IterableDataset's shuffle is not used because it loses the contents of its buffer when it is resumed. Here
    a resumed run repeats every draw, and continues exactly as an uninterrupted one would.

    >>> list(shuffle_through_buffer(range(5), 1, random.Random(0)))
    [0, 1, 2, 3, 4]
    >>> sorted(shuffle_through_buffer(range(5), 3, random.Random(0)))
    [0, 1, 2, 3, 4]
    """
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        else:
            place = rng.randrange(size)
            yield buffer[place]
            buffer[place] = item
    if size > 1:
        rng.shuffle(buffer)
    yield from buffer


@dataclass
class TokenStream:
    """An endless iterable of {"input_ids", "labels", "row_id"}: passes over the source, one after another."""

    source: Source
    """The rows; `row_id` is their index in reading order."""
    encoder: Encoder
    """Turns them into tokens."""
    seed: int
    """Together with the number of the pass, decides the order."""
    buffer: int
    """Size of the shuffle buffer in rows, at least 1; 1 keeps the order of the file."""
    leaked: frozenset[int] = frozenset()
    """Ids of rows to skip."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count(1):
            yield from self._pass(number)

    def _pass(self, number: int) -> Iterator[dict[str, Any]]:
        numbered = enumerate(self.source.rows(streaming=True))
        wanted = ((row_id, row) for row_id, row in numbered if row_id not in self.leaked)
        mixed = shuffle_through_buffer(wanted, self.buffer, random.Random(f"{self.seed}/{number}"))
        read = dropped = masked = 0
        while chunk := list(itertools.islice(mixed, BATCH)):
            # 1. Tokenise a chunk and decide which rows of it can be trained on
            row_ids = [row_id for row_id, _ in chunk]
            encoded = self.encoder.encode([row for _, row in chunk], row_ids)
            verdicts = judge(np.asarray(encoded["length"]), np.asarray(encoded["trained"]), self.encoder)
            if verdicts.is_over.any() and self.encoder.too_long == "error":
                first = int(verdicts.is_over.argmax())
                raise DataError(
                    f"row {row_ids[first] + 1} of {self.source} is {encoded['length'][first]} tokens long, "
                    f"over max_length={self.encoder.max_length}. Raise max_length, or set too_long to drop or truncate."
                )
            # 2. Yield them
            for place in np.flatnonzero(~(verdicts.is_dropped | verdicts.is_masked)):
                yield {name: encoded[name][place] for name in FEATURES}
            read += len(chunk)
            dropped += int(verdicts.is_dropped.sum())
            masked += int(verdicts.is_masked.sum())
        if dropped + masked == read:  # otherwise the next pass, and all after it, would find nothing either
            raise DataError(
                f"all {read} rows of {self.source} are too long or without a trained token, "
                "so there is nothing to train on. Raise max_length."
            )
        if number == 1 and int(os.environ.get("RANK", "0")) == 0:
            print(
                f"=> stream, first pass: {read:,} rows, {dropped:,} dropped as too long, "
                f"{masked:,} without a trained token",
                flush=True,
            )

    def sample(self, name: str) -> tuple[datasets.Dataset, DataReport]:
        """The first rows, tokenised, and a report on them: all that a plan can know about a stream.

        Raises:
            DataError: none of them can be trained on.
        """
        rows = list(itertools.islice(self.source.rows(streaming=True), SAMPLE))
        tokens = datasets.Dataset.from_dict(self.encoder.encode(rows, range(len(rows))))
        leaked = [row_id for row_id in self.leaked if row_id < len(rows)]
        dataset, report = drop_unusable(tokens, self.encoder, name, leaked)
        report.sampled = True
        return dataset, report

    def dataset(self) -> datasets.IterableDataset:
        """For SFTTrainer. One object, not a list of shards: `datasets` would deal shards out to the ranks."""
        return datasets.IterableDataset.from_generator(_as_arrays, datasets.Features(FEATURES), {"stream": self})


def _as_arrays(stream: TokenStream) -> Iterator[dict[str, Any]]:
    """The rows as int32 arrays: `datasets` would check the integers of a Python list one by one."""
    for row in stream:
        yield {name: np.asarray(value, np.int32) if isinstance(value, list) else value for name, value in row.items()}
