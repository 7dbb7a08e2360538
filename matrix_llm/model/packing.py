"""A check that rows packed into one sequence do not see each other.

Whether they do depends on the model. Most architectures of transformers build a block-diagonal mask from the positions,
which restart with each row; some ignore positions (OPT, Falcon, BLOOM, MPT); and a recurrent state (Mamba, hybrids)
runs on from row to row unless a kernel resets it. So it is checked on the model itself, at the start of training and
through the engine that trains it, at the cost of two forward passes over a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.base.modes import evaluation_mode

TOLERANCE = 2e-3  # relative to the largest value; a leak moves some of the few tokens by far more
HALF_TOLERANCE = 2e-2  # in half precision


@torch.no_grad()
def check_isolation(
    model: nn.Module,  # with add_matrix_head's forward: any other would break ZeRO-3's next step
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],  # padding-free: examples in, one flattened sequence out
    prepare: Callable[[dict[str, Any]], dict[str, Any]],  # moves a batch to the model's device
    *,
    vocabulary: int,
    half: bool,
    description: str,
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: {},
) -> None:
    """Compare the loss and entropy of a short row's tokens after another row with those of the row alone.

    A collective under ZeRO-3 and FSDP2: call it on every process.

    Args:
        vocabulary: the number of tokens.
        half: whether the model runs in half precision, where more rounding is expected.
        description: the model, for the error.
        more: what the forward takes besides a batch: a teacher's hidden states.

    Raises:
        RecipeError: the row before it makes a difference, or transformers refuses packed rows for this model.
    """
    # 1. two rows packed, and the second one alone
    ids = (torch.arange(11) * 7 + 3) % vocabulary
    first, second = ids[:5].tolist(), ids[5:].tolist()
    packed = collator([{"input_ids": row, "labels": row} for row in (first, second)])
    packed.pop("row_lengths", None)  # not the model's
    alone = {
        "input_ids": torch.tensor([second]),
        "labels": torch.tensor([second]),
        "attention_mask": torch.ones(1, len(second), dtype=torch.long),
    }

    # 2. loss and entropy of the second row's tokens, except its first, which nothing predicts
    with evaluation_mode(model):
        expected = _measure(model, prepare(alone), more)
        try:
            in_pack = _measure(model, prepare(packed), more)
        except ValueError as refused:  # newer ones say so themselves, e.g. of a kernel that is not installed
            raise RecipeError(
                f"packing: {description} cannot keep rows packed into one sequence apart: {one_line(refused)}. Set "
                "packing: false (padding_free: false)."
            ) from None
    found = in_pack[:, len(first) : len(first) + len(second) - 1]

    # 3. NaN is a different problem: the trainer's guard names the step and the rows
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if error > (HALF_TOLERANCE if half else TOLERANCE):
        raise RecipeError(
            f"packing: {description} lets rows packed into one sequence see each other: the row before a token's own "
            f"moves its loss by {error:.2g} of its size. Set packing: false (padding_free: false), or choose another "
            "attn_implementation."
        )


def _measure(model: nn.Module, batch: dict[str, Any], more: Callable[[dict[str, Any]], dict[str, Any]]) -> Tensor:
    """(2, T - 1): cross-entropy and entropy of each token of a batch of one sequence."""
    out = model(**batch, **more(batch), use_cache=False, matrix_loss=True)
    return torch.stack([out.cross_entropy[0], out.entropy[0]]).float()
