"""The rows of the LM head, as MCE sees them: directions, duplicates, nearest pairs.

Legend: V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matrix_llm.base.errors import ModelError
from matrix_llm.information import effective_rank
from matrix_llm.loss.vocabulary import unit_vectors

BLOCK = 8192  # rows at a time in float64


@dataclass(frozen=True)
class HeadRows:
    """Statistics of V rows of width D."""

    rows: int
    """V."""
    width: int
    """D."""
    zero_rows: int
    """Rows of norm 0; they take part in nothing else below."""
    duplicate_rows: int
    """Rows that are equal, bit for bit, to an earlier row; rows of norm 0 do not count."""
    mean_cosine: float
    """Mean of e_i . e_j over all pairs i != j of unit rows: (|sum_i e_i|^2 - n) / (n (n - 1)), exactly."""
    effective_rank: float
    """exp of the entropy of the eigenvalues of E^T E / n, E the unit rows: from 1 (one direction) to D (isotropic)."""
    norm_quantiles: list[float]
    """Smallest, 5 %, median, 95 % and largest norm of the rows that are not zero."""


@torch.no_grad()
def describe_rows(vectors: Tensor) -> HeadRows:
    """Statistics of the token vectors, in float64, a block of rows at a time.

    Args:
        vectors: (V, D) any float dtype, any norm.

    Raises:
        ModelError: every row is zero, as equal rows are without their mean.

    >>> describe_rows(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 2.0]])).mean_cosine  # of 0, 0 and 1
    0.3333333333333333
    """
    count, width = vectors.shape
    total = torch.zeros(width, dtype=torch.float64, device=vectors.device)
    second = torch.zeros(width, width, dtype=torch.float64, device=vectors.device)
    norms = []
    for start in range(0, count, BLOCK):
        block = vectors[start : start + BLOCK].double()
        norms.append(torch.linalg.vector_norm(block, dim=-1))
        unit = unit_vectors(block, dtype=torch.float64)
        total += unit.sum(0)
        second += unit.T @ unit
    norm = torch.cat(norms)
    present = norm[norm > 0].sort().values
    n = len(present)
    if not n:
        raise ModelError(
            "every token vector is zero, or would be without their mean, so tokens have no direction. Give a trained "
            "model."
        )
    at = [0, round(0.05 * (n - 1)), round(0.5 * (n - 1)), round(0.95 * (n - 1)), n - 1]
    return HeadRows(
        rows=count,
        width=width,
        zero_rows=count - n,
        duplicate_rows=count - _count_distinct(vectors) - max(0, count - n - 1),
        mean_cosine=((total @ total).item() - n) / (n * (n - 1)) if n > 1 else 1.0,
        effective_rank=effective_rank(second / n).item(),
        norm_quantiles=present[at].tolist(),
    )


def _count_distinct(vectors: Tensor) -> int:
    """The number of different rows, by a 64-bit hash of each: products of their bits, which wrap around exactly."""
    width = vectors.shape[1]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (width,), generator=generator) * 2 + 1  # odd: no bit is lost
    keys = []
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK].float().cpu() + 0.0  # -0.0 becomes 0.0
        keys.append((block.contiguous().view(torch.int32).long() * factors).sum(-1))
    return len(torch.unique(torch.cat(keys)))


@dataclass(frozen=True)
class Pair:
    """Two tokens, and the cosine of their rows."""

    token: int
    """One of the tokens that were asked about."""
    nearest: int
    """The token with the largest cosine to it, in the whole vocabulary."""
    cosine: float
    """From -1 to 1."""


@torch.no_grad()
def nearest_pairs(vectors: Tensor, tokens: Tensor, most: int = 20) -> list[Pair]:
    """The nearest other row of each of some tokens; the `most` nearest of these pairs, each once, nearest first.

    All V^2 pairs would cost more than everything else here together.

    Args:
        vectors: (V, D).
        tokens: (n,) ids without repetition. Those whose row is zero have no pair.
    """
    unit = unit_vectors(vectors, dtype=torch.float32)
    best = torch.full((len(tokens),), -2.0, device=unit.device)
    where = torch.zeros(len(tokens), dtype=torch.long, device=unit.device)
    chosen = unit[tokens]
    is_zero = ~unit.any(-1)
    for start in range(0, len(unit), BLOCK):
        ids = torch.arange(start, min(start + BLOCK, len(unit)), device=unit.device)
        cosines = chosen @ unit[ids].T
        cosines.masked_fill_((ids == tokens[:, None]) | is_zero[ids], -2.0)
        largest, place = cosines.max(-1)
        where = torch.where(largest > best, ids[place], where)
        best = torch.maximum(best, largest)
    pairs: dict[tuple[int, int], Pair] = {}
    for place in best.argsort(descending=True).tolist():
        token, other = int(tokens[place]), int(where[place])
        if best[place] >= -1.5 and not is_zero[token]:
            cosine = (unit[token].double() @ unit[other].double()).item()
            pairs.setdefault((min(token, other), max(token, other)), Pair(token, other, cosine))
        if len(pairs) == most:
            break
    return list(pairs.values())
