"""Loss name -> the function that computes it from a chunk's statistics."""

from __future__ import annotations

from matrix_llm.loss import teachers
from matrix_llm.loss.token_terms import GATES, WIDE, Chunk, LossTerms, TokenLoss

TERMS = {**GATES, **WIDE, **teachers.TERMS}


def loss_terms(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """Value and gradient of one chunk."""
    return TERMS[loss.name](chunk, loss)
