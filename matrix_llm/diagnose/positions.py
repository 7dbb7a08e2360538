"""The positions that are measured: trained positions of a sample of rows, with the hidden states that predict them.

Rows, tokens and label masks are those of training: `run.prepare.prepare_data` makes them.

Legend: N positions, T tokens of a row, H hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from matrix_llm.base.errors import DataError, ModelError
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.loss.positions import label_error

ROWS = 32  # at least, where there are so many


@dataclass(frozen=True)
class Positions:
    """N trained positions."""

    hidden: Tensor
    """(N, H) what the LM head is given there."""
    labels: Tensor
    """(N,) the tokens to predict."""
    rows: int
    """Rows that were read by the model."""
    tokens: int
    """Tokens in them."""
    trained: int
    """Trained positions in them, of which N were drawn."""


def draw_positions(model: Any, rows: Any, wanted: int, seed: int, say: Callable[[str], None]) -> Positions:
    """Run the model on rows drawn at random until they hold `wanted` trained positions, and draw that many of these.

    At least 32 rows are read, or all, one at a time: nothing is padded or packed.

    Args:
        rows: a data set with `input_ids` and `labels`, or a stream of such rows, whose first rows are taken.
        wanted: N at most; fewer if the rows hold fewer.

    Raises:
        DataError: no trained position, or a label that is not a token of the model.
        ModelError: hidden states that are not finite.
    """
    hidden, labels, tokens, count = [], [], 0, 0
    size = model.get_output_embeddings().weight.shape[0]
    with torch.no_grad(), evaluation_mode(model):
        for count, row in enumerate(_in_random_order(rows, seed), start=1):
            ids = torch.as_tensor(row["input_ids"], dtype=torch.long, device=model.device)  # a stream gives int32
            shifted = torch.as_tensor(row["labels"], dtype=torch.long, device=model.device)[1:]
            at = torch.nonzero(shifted != -100).squeeze(1)
            tokens += len(ids)
            if len(at):
                if (wrong := int(shifted[at].max())) >= size:
                    raise label_error(wrong, count - 1, size)
                states = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
                hidden.append(states[at].float())
                labels.append(shifted[at])
            trained = sum(map(len, labels))
            if count % 8 == 0:
                say(f"=> {count} rows, {trained:,} trained positions")
            if trained >= wanted and count >= ROWS:
                break
    if not labels:
        raise DataError(
            f"none of {count} rows has a trained position, so there is no loss to measure. Give other rows."
        )
    all_hidden, all_labels = torch.cat(hidden), torch.cat(labels)
    if not torch.isfinite(all_hidden).all():
        raise ModelError(
            "the model's hidden states hold NaN or infinity on these rows, so there is no distribution to measure. "
            "Give another checkpoint."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(all_labels), generator=generator)[:wanted].sort().values.to(all_labels.device)
    return Positions(all_hidden[drawn], all_labels[drawn], count, tokens, len(all_labels))


def _in_random_order(rows: Any, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a data set in an order drawn from `seed`; those of a stream as they come."""
    if isinstance(rows, datasets.Dataset):
        generator = torch.Generator().manual_seed(seed)
        return (rows[place] for place in torch.randperm(len(rows), generator=generator).tolist())
    return itertools.islice(iter(rows), 64 * ROWS)
