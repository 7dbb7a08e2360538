"""Which rows the study has, and which of them a seed draws, in which order: the same for every arm.

pool             3,000 rows of GSM8K's training set    the study's seeds draw from these
tuning_pool      1,200 others                          the tuning seeds do
tuning_heldout     200 others                          judge the rates
heldout            400 rows of GSM8K's test set        the primary measure
math               100 rows of MATH's test set         what is forgotten
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pretrained_study.design import Sizes
from benchmarks.study.design import StudyError
from matrix_llm.data.readers import Source
from matrix_llm.data.tokens import Encoder

SPLIT_SEED = 20_261_127  # of the order in which each file's rows are dealt out


@dataclass(frozen=True)
class Tokens:
    """One row, as training sees it."""

    ids: list[int]
    """Its tokens."""
    labels: list[int]
    """The same, or -100 where nothing is trained."""

    @property
    def trained(self) -> int:
        """Positions that are predicted and count."""
        return sum(label != -100 for label in self.labels[1:])


def read_rows(path: Path, tokenizer: Any, max_length: int) -> list[Tokens]:
    """The rows of a file that fit, in the model's chat template, in an order of SPLIT_SEED."""
    template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    rows = list(Source(str(path)).rows())
    columns = Encoder(tokenizer, prompt_template=template, max_length=max_length).encode(rows, range(len(rows)))
    found = [Tokens(*row) for row in zip(columns["input_ids"], columns["labels"], strict=True)]
    kept = [row for row in found if row.trained]
    random.Random(SPLIT_SEED).shuffle(kept)
    return kept


def read_sets(train: Path, test: Path, math: Path, tokenizer: Any, sizes: Sizes) -> dict[str, list[Tokens]]:
    """The five sets of rows; no two share a row.

    Raises:
        StudyError: a file has too few rows.
    """
    sets: dict[str, list[Tokens]] = {}
    counts = {"heldout": sizes.heldout, "math": sizes.math_rows}
    for path, names in ((train, ("pool", "tuning_pool", "tuning_heldout")), (test, ("heldout",)), (math, ("math",))):
        rows = read_rows(path, tokenizer, sizes.max_length)
        wanted = [counts.get(name) or getattr(sizes, name) for name in names]
        if len(rows) < sum(wanted):
            raise StudyError(
                f"{path} has {len(rows)} rows of at most {sizes.max_length} tokens, but {' + '.join(names)} need "
                f"{sum(wanted)}. Give a longer file, or smaller --{' --'.join(names)}."
            )
        start = 0
        for name, count in zip(names, wanted, strict=True):
            sets[name], start = rows[start : start + count], start + count
    return sets


def draw(seed: int, available: int, rows: int) -> list[int]:
    """The places in the pool of the rows that a seed trains on, in order. An arm with fewer rows takes the first.

    >>> draw(1, 10, 4)[:3] == draw(1, 10, 3), sorted(draw(1, 4, 4))
    (True, [0, 1, 2, 3])
    """
    if rows > available:
        raise StudyError(
            f"--rows {rows} cannot be drawn from {available} rows without repeating one. Use a larger --pool."
        )
    order = list(range(available))
    random.Random(seed).shuffle(order)
    return order[:rows]


def batches(places: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Whole batches; the rest is left out.

    >>> batches([5, 6, 7, 8, 9], 2)
    [[5, 6], [7, 8]]
    """
    return [list(places[i : i + batch_rows]) for i in range(0, len(places) - batch_rows + 1, batch_rows)]
