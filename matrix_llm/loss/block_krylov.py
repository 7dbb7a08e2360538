"""-tr(P log Q) and its gradient for P = S S^T of low rank, by block Lanczos over the whole vocabulary.

S = [sqrt(p_1) e_1 .. sqrt(p_k) e_k] holds the target's k tokens. K block steps give an orthonormal basis V of the block
Krylov space span(S, Q S, .., Q^(K-1) S), with at most n = k K columns, and with T = V^T Q V and B = V^T S

    -tr(P log Q)  ~  -tr(B B^T log T)
    d/dq_j        ~  -u_j^T M u_j,      u_j = V^T e_j,   M = Dlog_T[B B^T]

which for k = 1 is krylov.py's quadrature. T = sum_j q_j u_j u_j^T comes from the coordinates, not from a recurrence:
any orthonormal basis of the space gives the same value. So a column that depends on those before it (a repeated token,
one without weight, k > D, a space that is exhausted) simply becomes zero.

Legend: C positions, V vocabulary, D embedding width, k target tokens, K block steps, n = k K basis columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matrix_llm.information import log_divided_differences
from matrix_llm.loss.chunks import positions_per_chunk
from matrix_llm.loss.krylov import BREAKDOWN, EIGENVALUE_FLOOR, probability_gradient


class BlockQuadrature(NamedTuple):
    """What K block steps tell about -tr(P log Q)."""

    value: Tensor  # (C,)  -tr(B B^T log T)
    g: Tensor | None  # (C, V)  d/dq, where asked for


def block_quadrature(
    q: Tensor,  # (C, V) probabilities
    vectors: Tensor,  # (V, D) e_j: unit vectors, or zero
    target_ids: Tensor,  # (C, k)
    target: Tensor,  # (C, k) weights p_i >= 0
    steps: int,
    *,
    want_gradient: bool,
) -> BlockQuadrature:
    """K = min(steps, D) block steps for all positions, as many positions at a time as `chunks` allows.

    Each step multiplies k columns by E twice, the last one once.
    """
    steps = min(steps, vectors.shape[1])
    columns = steps * target.shape[1]
    chunk = positions_per_chunk(len(q), 2 * q.element_size() * columns * q.shape[1])
    parts = [
        _solve_chunk(q[at], vectors, target_ids[at], target[at], steps, want_gradient)
        for at in (slice(start, start + chunk) for start in range(0, len(q), chunk))
    ]
    gradients = [part.g for part in parts if part.g is not None]
    return BlockQuadrature(torch.cat([part.value for part in parts]), torch.cat(gradients) if gradients else None)


def _solve_chunk(
    q: Tensor, vectors: Tensor, target_ids: Tensor, target: Tensor, steps: int, want_gradient: bool
) -> BlockQuadrature:
    # 1. an orthonormal basis of the block Krylov space, and the coordinates of all tokens in it
    (positions, k), (vocabulary_size, width) = target.shape, vectors.shape
    start = vectors[target_ids] * target.sqrt().unsqueeze(-1)  # (C, k, D), the rows of S^T
    basis = start.new_zeros(positions, steps * k, width)
    coordinates = start.new_empty(positions, steps * k, vocabulary_size)
    block, scale = start, start.new_zeros(positions)
    for step in range(steps):
        at = slice(step * k, (step + 1) * k)
        largest = torch.linalg.vector_norm(block, dim=-1).amax(-1)
        scale = largest if step < 2 else torch.maximum(scale, largest)  # of S, then of Q
        append_orthonormal_(basis, step * k, block, scale)
        coordinates[:, at] = (basis[:, at].flatten(0, 1) @ vectors.T).unflatten(0, (positions, k))
        if step + 1 < steps:
            block = ((q.unsqueeze(1) * coordinates[:, at]).flatten(0, 1) @ vectors).unflatten(0, (positions, k))

    # 2. T, with 1 on the diagonal where a column is missing: log 1 = 0 adds nothing
    t = torch.bmm(q.unsqueeze(1) * coordinates, coordinates.mT).double()
    missing = (basis == 0).all(-1)
    t = (t + t.mT) / 2 + torch.diag_embed(missing.to(t.dtype))
    inside = torch.bmm(basis, start.mT).double()  # (C, n, k) B

    # 3. the logarithm
    value, derivative = log_at_block(t, inside, EIGENVALUE_FLOOR[q.dtype])
    g = probability_gradient(coordinates, derivative.to(q.dtype)) if want_gradient else None
    return BlockQuadrature(value.to(q.dtype), g)


def append_orthonormal_(
    basis: Tensor,  # (C, n, D) orthonormal rows, or zero; those from `filled` on are overwritten
    filled: int,
    block: Tensor,  # (C, k, D) vectors to add
    scale: Tensor,  # (C,) the norm that counts as large; BREAKDOWN times that is rounding noise
) -> None:
    """Gram-Schmidt, each vector twice against all before it. One that is in their span becomes zero."""
    for i in range(block.shape[1]):
        v, alive = block[:, i], None
        for smallest in (BREAKDOWN[block.dtype] * scale, torch.full_like(scale, 0.5)):
            # The second time v has norm 1. What loses half of it then was noise: nothing of it is orthogonal to the
            # others. Not `norm > smallest`: NaN must stay alive, and reach the result.
            overlap = torch.bmm(basis[:, : filled + i], v.unsqueeze(-1))
            v = torch.baddbmm(v.unsqueeze(-1), basis[:, : filled + i].mT, overlap, alpha=-1).squeeze(-1)
            norm = torch.linalg.vector_norm(v, dim=-1)
            alive = ~(norm <= smallest) if alive is None else alive & ~(norm <= smallest)
            v = torch.where(alive.unsqueeze(-1), v / torch.where(alive, norm, 1.0).unsqueeze(-1), 0.0)
        basis[:, filled + i] = v


def log_at_block(
    t: Tensor,  # (C, n, n) symmetric PSD, float64
    start: Tensor,  # (C, n, k) B, float64
    floor: float,  # eigenvalues below it are clamped
) -> tuple[Tensor, Tensor]:
    """-tr(B B^T log T) (C,), and M = Dlog_T[B B^T] (C, n, n).

    A position with NaN gets a NaN value and M = 0, so that the trainer's guard can name its step and row.
    """
    broken = ~(torch.isfinite(t).flatten(1).all(-1) & torch.isfinite(start).flatten(1).all(-1))
    t = torch.where(broken[:, None, None], torch.eye(t.shape[1], dtype=t.dtype, device=t.device), t)  # eigh refuses NaN
    w, z = torch.linalg.eigh(t)
    w = w.clamp(min=floor)
    along = torch.bmm(z.mT, torch.where(broken[:, None, None], 0.0, start))  # B in the eigenbasis
    value = -(along.square().sum(-1) * w.log()).sum(-1)
    kernel = log_divided_differences(w) * torch.bmm(along, along.mT)
    return torch.where(broken, torch.nan, value), z @ kernel @ z.mT
