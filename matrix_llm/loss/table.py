"""Loss name -> the function that computes it from a chunk's statistics, and over how many positions at once.

gem, emo and the losses of a teacher have a gradient of their own, LossTerms.extra (C, V), made in several steps. Over a
whole chunk each step would fill a new (C, V) tensor, which costs more than its arithmetic. A few positions at a time,
the steps stay in cache; the result is written over the logits, which nothing needs any more (with a soft-cap, whose
derivative does: into a buffer).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrix_llm.loss import teachers
from matrix_llm.loss.chunks import blocks
from matrix_llm.loss.token_terms import GATES, WIDE, Chunk, LossTerms, TokenLoss, similarities

TERMS = {**GATES, **WIDE, **teachers.TERMS}
IN_BLOCKS = ("gem", "emo", "kd", "soft_ce", "asft")


class Buffers(NamedTuple):
    """(C, V) tensors that the chunks of a pass share, besides logits and probabilities. None: not needed."""

    product: Tensor | None  # of the loss's own product
    extra: Tensor | None  # LossTerms.extra, where it cannot replace the logits


def _needed(loss: TokenLoss, softcap: float | None) -> tuple[bool, bool]:
    """Which of the buffers."""
    has_product = loss.name == "emo" or isinstance(loss.teacher, teachers.Teacher)
    return has_product, loss.name in IN_BLOCKS and softcap is not None


def count_buffers(loss: TokenLoss, softcap: float | None) -> int:
    """(C, V) tensors that a chunk needs besides logits and probabilities."""
    return 4 if loss.name == "soft_mce" else sum(_needed(loss, softcap))  # soft_mce: with those of its solver


def make_buffers(loss: TokenLoss, softcap: float | None, logits: Tensor) -> Buffers:
    """The buffers of a pass, like that of its logits (C, V)."""
    return Buffers(*(torch.empty_like(logits) if each else None for each in _needed(loss, softcap)))


def loss_terms(chunk: Chunk, loss: TokenLoss, buffers: Buffers) -> LossTerms:
    """Value and gradient of one chunk. The gradient of a loss of IN_BLOCKS replaces the logits or is in `buffers`."""
    # 1. the loss's own product: the teacher's logits, or emo's e_j . e_y of the labels, each of them once
    index = None
    if buffers.product is not None:
        product = buffers.product[: len(chunk.labels)]
        if loss.name == "emo":
            product, index = similarities(chunk.labels, loss, product)
        else:
            teachers.make_logits(loss.teacher, chunk.at, product)
        chunk = chunk._replace(product=product)

    # 2. MCE's target, where that is the teacher's: before the loss overwrites the product
    target = teachers.likeliest(chunk, loss, loss.target_tokens) if loss.target_tokens else None

    # 3. the terms
    terms = TERMS[loss.name]
    if loss.name not in IN_BLOCKS:
        return terms(chunk, loss)._replace(target=target)
    extra = chunk.z if buffers.extra is None else buffers.extra[: len(chunk.labels)]
    parts = []
    for block in blocks(chunk.z):
        part = terms(chunk.positions(block, index), loss)
        assert part.extra is not None
        extra[block] = part.extra
        parts.append(part._replace(extra=None))
    return _join(parts)._replace(extra=extra, target=target)


def _join(parts: list[LossTerms]) -> LossTerms:
    """The terms of successive positions as one: tensors one after another, and what is the same for all once."""
    fields: list[Any] = [
        torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*parts, strict=True)
    ]
    return LossTerms(*fields)
