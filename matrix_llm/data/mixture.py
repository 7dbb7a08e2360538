"""Several data sets become one: what can be trained on of each, taken as often as its weight says.

    weight 0.5   half of its rows, drawn by the seed without replacement; every epoch has the same ones
    weight 1     every row once
    weight 2.5   every row twice, and half of them a third time

A row keeps its id however often it is taken. Ids count through the sets, in the order in which the recipe names them.
"""

import dataclasses
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from matrix_llm.base.errors import DataError
from matrix_llm.data.selection import DataReport, combine_reports, drop_unusable
from matrix_llm.data.tokens import LEFT_OUT, Encoder


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one data set."""

    name: str
    """For the report."""
    tokens: datasets.Dataset
    """As `tokenise` returns them."""
    encoder: Encoder
    """What made them."""
    weight: float = 1
    """How often its rows are taken, above 0."""
    leaked: Collection[int] = ()
    """Places of rows to drop in any case."""


def draw(count: int, weight: float, seed: str) -> list[int]:
    """Places of the rows to take of `count`, in order; round(weight * count) of them.

    >>> draw(4, 1, ""), draw(3, 2, ""), len(draw(4, 2.5, "")), len(set(draw(100, 0.5, "")))
    ([0, 1, 2, 3], [0, 1, 2, 0, 1, 2], 10, 50)
    """
    total = round(weight * count)
    times, rest = divmod(total, count)
    return [*range(count)] * times + sorted(random.Random(seed).sample(range(count), rest))


def mix(sets: Sequence[TokenSet], name: str, seed: int = 0) -> tuple[datasets.Dataset, DataReport]:
    """The rows to train or evaluate on, one set after another, and what became of all of them.

    Args:
        name: "train" or "held out"; starts each line of the report and each error message.
        seed: decides which rows are drawn.

    Raises:
        DataError: nothing is left of a set.
    """
    if len(sets) == 1 and sets[0].weight == 1:
        return drop_unusable(sets[0].tokens, sets[0].encoder, name, sets[0].leaked)
    parts, reports, lengths, offset = [], [], [], 0
    for place, each in enumerate(sets):
        # 1. What can be trained on
        count = len(each.tokens)
        usable, report = drop_unusable(
            _with_ids_from(each.tokens, offset), each.encoder, f"{name}: {each.name}", each.leaked
        )
        # 2. As often as the weight says
        places = draw(len(usable), each.weight, f"{seed}/{place}")
        if not places:
            raise DataError(
                f"{name}: {each.name}: weight={each.weight} of {len(usable)} rows is not one row. Raise the weight, or "
                "remove the data set."
            )
        taken = usable.select(places) if each.weight != 1 else usable
        parts.append(taken)
        # 3. The figures of the rows taken
        ids = np.asarray(taken.with_format("numpy")["row_id"]) - offset
        measured = [each.tokens.data.column(column).to_numpy() for column in ("length", "trained")]
        reports.append(
            dataclasses.replace(
                report,
                weight=each.weight,
                rows_taken=len(places),
                tokens_taken=int(each.encoder.cut(measured[0][ids]).sum(dtype=np.int64)),
                trained_taken=int(measured[1][ids].sum(dtype=np.int64)),
                first_id=offset,
            )
        )
        is_left_out = each.tokens.data.column("notes").to_numpy() & LEFT_OUT > 0
        lengths.append(measured[0][~is_left_out])
        offset += count
    return datasets.concatenate_datasets(parts), combine_reports(name, reports, np.concatenate(lengths))


def _with_ids_from(tokens: datasets.Dataset, offset: int) -> datasets.Dataset:
    """`tokens` with row ids that start at `offset`; only the column of ids is held in memory."""
    if not offset:
        return tokens
    ids = np.asarray(tokens.data.column("row_id").to_numpy()) + offset
    features = tokens.features["row_id"]
    return tokens.remove_columns("row_id").add_column("row_id", ids.astype(np.int32), feature=features)
