"""Token losses to compare with matrix cross-entropy, as researchers and other toolkits define them (docs/losses.md).

    token_loss          the reference: whole logits, autograd
    linear_token_loss   the same and MCE, fused with the LM head: what training uses
    number_tokens       what the number token loss needs to know of a tokenizer

Legend: N positions, V vocabulary, H hidden width, D embedding width, M number tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matrix_llm.loss.dense.numbers import number_tokens
from matrix_llm.loss.linear import TeacherLike, TokenLossOutput, linear_loss
from matrix_llm.loss.reference import token_loss
from matrix_llm.loss.settings import LossSettings
from matrix_llm.loss.teachers import Teacher, TopTokens

__all__ = ["Teacher", "TokenLossOutput", "TopTokens", "linear_token_loss", "number_tokens", "token_loss"]


@torch.compiler.disable
def linear_token_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    loss: str = "ce",
    *,
    mce_weight: float = 0.0,
    bias: Tensor | None = None,  # (V,)
    embeddings: Tensor | None = None,  # (V, D)
    teacher: TeacherLike | None = None,
    settings: Mapping[str, Any] | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    matrix: LossSettings | None = None,
) -> TokenLossOutput:
    """A token loss + mce_weight * MCE straight from hidden states; the full (N, V) logits never exist.

    The same values as `token_loss(logits, labels, loss, **settings)` with
    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap), or without the cap if softcap is None.

    Args:
        hidden: (N, H) float64, float32, bfloat16 or float16. Statistics are float32 (float64 for float64 input).
        weight: (V, H) of the LM head.
        labels: (N,) integers in [0, V), or ignore_index.
        loss: a key of `matrix_llm.loss.choice.LOSSES`.
        mce_weight: finite, at least 0. MCE is measured also at 0. No loss's gate weighs it.
        bias: (V,) of the LM head; -inf removes a token.
        embeddings: (V, D) token vectors of MCE, emo and soft_mce, of any norm; None: the LM head's weight, detached.
        teacher: kd, soft_ce, asft and soft_mce: `Teacher(hidden, weight, bias, logit_scale, softcap)`, whose logits are
            made a chunk at a time; `TopTokens(ids, log_probabilities)`, stored before; or whole logits (N, V). A plain
            tuple is taken for one of the first two. Other losses do not read it.
        settings: the loss's own settings by name; ntl's number_ids (K,) and number_values (K,) among them.
        ignore_index: the label of positions that do not count.
        logit_scale, softcap: as the model does to its logits; softcap above 0, or None.
        reduction: "mean" over the positions that count, "sum", or "none". For "mean", ntl's term is divided by the
            positions whose label is a number, and threshold's by those that it keeps; MCE by all that count.
        matrix: how MCE is computed; the other arguments override its mce_weight and token_loss. None: the measured
            default.

    Returns:
        `TokenLossOutput`. If every label is ignored, the loss is a zero still connected to the graph.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, an unknown loss, setting or reduction, a
            setting out of range, a teacher that is missing or has another vocabulary.
        TypeError: labels that are not integers.

    >>> h, w = torch.zeros(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    >>> linear_token_loss(h, w, torch.tensor([0, -100]), "dft").loss  # p CE = log(3) / 3
    tensor(0.3662, dtype=torch.float64)
    """
    chosen = dataclasses.replace(
        matrix or LossSettings(), mce_weight=mce_weight, token_loss=loss, token_loss_settings=settings
    )
    return linear_loss(
        hidden,
        weight,
        labels,
        chosen,
        embeddings=weight.detach() if embeddings is None else embeddings,
        teacher=teacher,
        bias=bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        reduction=reduction,
    )
