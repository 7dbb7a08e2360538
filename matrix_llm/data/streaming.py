"""Tokenise rows during training: nothing is stored on disk, and training starts after one buffer of rows.

    pass 1: rows 0 .. n-1, read in order, shuffled through a buffer -> tokens -> those that can be trained on
    pass 2: the same rows, shuffled in another order; and so on without end, so a run that streams needs max_steps

The order depends on the seed alone. Every rank reads the full stream and takes its own batches from it (accelerate's
IterableDatasetShard), so all ranks have the same number of batches. A resumed run reads the stream again and skips the
batches it has already trained on.
"""

import dataclasses
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np

from matrix_llm.base.errors import DataError
from matrix_llm.data.forms import Row
from matrix_llm.data.readers import Source
from matrix_llm.data.selection import DataReport, Verdicts, combine_reports, drop_unusable, judge
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


@dataclass(frozen=True)
class StreamedSet:
    """One data set of a stream."""

    source: Source
    """Its rows."""
    encoder: Encoder
    """Turns them into tokens."""
    weight: float = 1
    """How often a pass takes its rows: 0.5 takes each with an even chance, 2 takes each twice."""
    leaked: frozenset[int] = frozenset()
    """Places of rows to skip, in reading order."""

    def read(self, rng: random.Random) -> Iterator[tuple[int, Row]]:
        """Place and row, once more for each whole number in the weight, and then by chance for the rest of it."""
        times, rest = divmod(self.weight, 1)
        for chance in [1.0] * int(times) + [rest] * (rest > 0):
            for place, row in enumerate(self.source.rows(streaming=True)):
                if place not in self.leaked and (chance == 1 or rng.random() < chance):
                    yield place, row


def interleave(items: Sequence[Iterator[Item]], shares: Sequence[float], rng: random.Random) -> Iterator[Item]:
    """The items of all iterators, each in its order; the next one comes from a random iterator, chosen by its share.

    >>> list(interleave([iter("abc"), iter([])], [1, 9], random.Random(0)))
    ['a', 'b', 'c']
    """
    left = list(range(len(items)))
    while left:
        place = rng.choices(left, [shares[each] for each in left])[0] if len(left) > 1 else left[0]
        try:
            yield next(items[place])
        except StopIteration:
            left.remove(place)


class Streamed(NamedTuple):
    """A row on its way through a stream."""

    place: int
    """Which data set it is of."""
    found: tuple[int, Row]
    """Its place in this set, in reading order, and the row."""


@dataclass
class TokenStream:
    """An endless iterable of {"input_ids", "labels", "row_id"}: passes over the data sets, one after another.

    `row_id` is the row's place in reading order. Of several data sets, whose lengths are not known, it counts through
    them in turn: 0, n, 2n, ... for the rows of the first of n sets.
    """

    sets: Sequence[StreamedSet]
    """The data sets. A pass mixes them so that all of them end at about the same time."""
    seed: int
    """Together with the number of the pass, decides the order."""
    buffer: int
    """Size of the shuffle buffer in rows, at least 1; 1 keeps the order of the file."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count(1):
            yield from self._pass(number)

    @cached_property
    def _shares(self) -> list[float]:
        """How many rows a pass takes of each set, as far as can be estimated."""
        if len(self.sets) == 1:
            return [1]
        known = [each.source.estimate_rows() for each in self.sets]
        usual = max((count for count in known if count), default=1)
        return [each.weight * (count or usual) for each, count in zip(self.sets, known, strict=True)]

    def _read(self, number: int) -> Iterator[Streamed]:
        """The rows of a pass, before they are shuffled through the buffer."""
        seed = f"{self.seed}/{number}/sets"
        each_set = [
            map(partial(Streamed, place), each.read(random.Random(f"{seed}/{place}")))
            for place, each in enumerate(self.sets)
        ]
        return interleave(each_set, self._shares, random.Random(seed))

    def _row_id(self, item: Streamed) -> int:
        return item.found[0] * len(self.sets) + item.place

    def _pass(self, number: int) -> Iterator[dict[str, Any]]:
        mixed = shuffle_through_buffer(self._read(number), self.buffer, random.Random(f"{self.seed}/{number}"))
        read = dropped = masked = 0
        while chunk := list(itertools.islice(mixed, BATCH)):
            kept: dict[int, dict[str, Any]] = {}
            for place, each in enumerate(self.sets):
                # 1. Tokenise the rows of one set in this chunk, and decide which of them can be trained on
                places = [at for at, item in enumerate(chunk) if item.place == place]
                if not places:
                    continue
                encoded, verdicts = self._encode(each, [chunk[at] for at in places])
                # 2. Keep those, in the order of the chunk
                for at in np.flatnonzero(~(verdicts.is_dropped | verdicts.is_masked)):
                    kept[places[at]] = {name: encoded[name][at] for name in FEATURES}
                dropped += int(verdicts.is_dropped.sum())
                masked += int(verdicts.is_masked.sum())
            read += len(chunk)
            for at in sorted(kept):
                yield kept[at]
        if dropped + masked == read:  # otherwise the next pass, and all after it, would find nothing either
            raise DataError(
                f"all {read} rows of {self._name} are too long or without a trained token, "
                "so there is nothing to train on. Raise max_length."
            )
        if number == 1 and int(os.environ.get("RANK", "0")) == 0:
            print(
                f"=> stream, first pass: {read:,} rows, {dropped:,} dropped as too long, "
                f"{masked:,} without a trained token",
                flush=True,
            )

    @property
    def _name(self) -> str:
        return ", ".join(str(each.source) for each in self.sets)

    def _encode(self, each: StreamedSet, items: Sequence[Streamed]) -> tuple[dict[str, list], Verdicts]:
        encoder = each.encoder
        encoded = encoder.encode([item.found[1] for item in items], [self._row_id(item) for item in items])
        verdicts = judge(np.asarray(encoded["length"]), np.asarray(encoded["trained"]), encoder)
        if verdicts.is_over.any() and encoder.too_long == "error":
            first = int(verdicts.is_over.argmax())
            raise DataError(
                f"row {items[first].found[0] + 1} of {each.source} is {encoded['length'][first]} tokens long, "
                f"over max_length={encoder.max_length}. Raise max_length, or set too_long to drop or truncate."
            )
        return encoded, verdicts

    def sample(self, name: str) -> DataReport:
        """A report on the first rows, tokenised: all that a plan can know about a stream.

        Raises:
            DataError: none of them can be trained on.
        """
        if len(self.sets) == 1 and self.sets[0].weight == 1:
            return dataclasses.replace(self._report_first(self.sets[0], name, SAMPLE)[0], sampled=True)
        # The first rows of a pass say how many of the first rows of each set an epoch would take
        first = [item.place for item in itertools.islice(self._read(1), SAMPLE)]
        parts, lengths = [], []
        for place, each in enumerate(self.sets):
            count = first.count(place)
            wanted = max(round(count / each.weight), 1)
            report, read = self._report_first(each, f"{name}: {each.source}", wanted)
            lengths.append(read)
            share = count / max(report.rows_kept, 1)
            parts.append(
                dataclasses.replace(
                    report,
                    sampled=True,
                    weight=each.weight,
                    rows_taken=count,
                    tokens_taken=round(report.tokens * share),
                    trained_taken=round(report.trained_tokens * share),
                )
            )
        return combine_reports(name, parts, np.concatenate(lengths))

    def _report_first(self, each: StreamedSet, name: str, count: int) -> tuple[DataReport, np.ndarray]:
        """A report on the first `count` rows of a set, and their lengths in tokens."""
        rows = list(itertools.islice(each.source.rows(streaming=True), count))
        tokens = datasets.Dataset.from_dict(each.encoder.encode(rows, range(len(rows))))
        leaked = [number for number in each.leaked if number < len(rows)]
        return drop_unusable(tokens, each.encoder, name, leaked)[1], tokens.data.column("length").to_numpy()

    def dataset(self) -> datasets.IterableDataset:
        """For SFTTrainer. One object, not a list of shards: `datasets` would deal shards out to the ranks."""
        return datasets.IterableDataset.from_generator(_as_arrays, datasets.Features(FEATURES), {"stream": self})


def _as_arrays(stream: TokenStream) -> Iterator[dict[str, Any]]:
    """The rows as int32 arrays: `datasets` would check the integers of a Python list one by one."""
    for row in stream:
        yield {name: np.asarray(value, np.int32) if isinstance(value, list) else value for name, value in row.items()}
