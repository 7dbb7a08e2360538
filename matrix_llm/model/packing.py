"""Rows packed into one sequence must not see each other. Whether they do depends on the model: most architectures of transformers
build a block-diagonal mask from the positions, which start anew with each row; some ignore positions (OPT, Falcon, BLOOM, MPT), and a
recurrent state (Mamba, hybrids) runs on from row to row unless a kernel resets it. So it is proved on the model itself, at the start
of training and through the engine that trains it, for two forward passes of a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from matrix_llm.base.errors import RecipeError

TOLERANCE = 2e-3  # of the largest value; a leak moves some of the few tokens by far more
HALF_TOLERANCE = 2e-2


@torch.no_grad()
def check_isolation(
    model: nn.Module,  # with add_matrix_head's forward: under ZeRO-3 a forward through the LM head's own module would break the next step
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],  # padding-free: examples in, one flattened sequence out
    prepare: Callable[[dict[str, Any]], dict[str, Any]],  # moves a batch to the model's device
    *,
    vocabulary: int,
    half: bool,
    description: str,
) -> None:
    """Compare loss and entropy at each token of a short row behind another one with those of the row alone. A collective under ZeRO-3
    and FSDP2: call it on every process.

    Raises:
        RecipeError: the row before it makes a difference.
    """
    ids = (torch.arange(11) * 7 + 3) % vocabulary
    before, row = ids[:5].tolist(), ids[5:].tolist()
    together = collator([{"input_ids": each, "labels": each} for each in (before, row)])
    alone = {
        "input_ids": torch.tensor([row]),
        "labels": torch.tensor([row]),
        "attention_mask": torch.ones(1, len(row), dtype=torch.long),
    }

    def measured(batch: dict[str, Any], start: int) -> Tensor:  # (2, tokens of the row but the first)
        out = model(**prepare(batch), use_cache=False, matrix_loss=True)
        return torch.stack([out.cross_entropy[0], out.entropy[0]])[:, start : start + len(row) - 1].float()

    was_training = model.training
    model.eval()
    try:
        found, expected = measured(together, len(before)), measured(alone, 0)
    finally:
        model.train(was_training)
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if error > (
        HALF_TOLERANCE if half else TOLERANCE
    ):  # NaN is another matter: the trainer's guard names the step and the rows
        raise RecipeError(
            f"packing: {description} lets rows packed into one sequence see each other: the loss of a token moves by {error:.2g} of "
            "its size with the row before its own. Set packing: false (padding_free: false), or choose another attn_implementation."
        )
