"""-tr(P log Q) and its gradient for P = S S^T of low rank, by block Lanczos over the whole vocabulary.

S = [sqrt(p_1) e_1 .. sqrt(p_k) e_k] holds the target's k tokens. K block steps give an orthonormal basis V of the block
Krylov space span(S, Q S, .., Q^(K-1) S), with at most n = k K columns, and with T = V^T Q V and B = V^T S

    -tr(P log Q)  ~  -tr(B B^T log T)
    d/dq_j        ~  -u_j^T M u_j,      u_j = V^T e_j,   M = Dlog_T[B B^T]

which for k = 1 is krylov.py's quadrature. T = sum_j q_j u_j u_j^T comes from the coordinates, not from a recurrence:
any orthonormal basis of the space gives the same value. So a column that depends on those before it (a repeated token,
one without weight, k > D, a space that is exhausted) simply becomes zero.

All of it is done in float64: a teacher may have weight on tokens that the student holds for next to impossible, and
float32 cannot tell their eigenvalues of Q from rounding noise.

Legend: C positions, V vocabulary, D embedding width, k target tokens, K block steps, n = k K basis columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matrix_llm.information import matrix_log
from matrix_llm.loss.chunks import positions_per_chunk
from matrix_llm.loss.krylov import BREAKDOWN, probability_gradient


class BlockQuadrature(NamedTuple):
    """What K block steps tell about -tr(P log Q), in the dtype of q."""

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
    steps, vectors = min(steps, vectors.shape[1]), vectors.double()
    chunk = positions_per_chunk(len(q), 2 * vectors.element_size() * steps * target.shape[1] * q.shape[1])
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
    (positions, k), (vocabulary_size, width), dtype = target.shape, vectors.shape, q.dtype
    q = q.double()
    start = vectors[target_ids] * target.double().sqrt().unsqueeze(-1)  # (C, k, D), the rows of S^T
    basis = start.new_zeros(positions, steps * k, width)
    coordinates = start.new_empty(positions, steps * k, vocabulary_size)
    block = start
    for step in range(steps):
        at = slice(step * k, (step + 1) * k)
        append_orthonormal_(basis, step * k, block)
        coordinates[:, at] = (basis[:, at].flatten(0, 1) @ vectors.T).unflatten(0, (positions, k))
        if step + 1 < steps:
            block = ((q.unsqueeze(1) * coordinates[:, at]).flatten(0, 1) @ vectors).unflatten(0, (positions, k))

    # 2. T and B; a missing column is 0 in both, and adds nothing
    t = torch.bmm(q.unsqueeze(1) * coordinates, coordinates.mT)
    value, derivative = log_at_block((t + t.mT) / 2, torch.bmm(basis, start.mT))

    # 3. the derivative at every token
    g = probability_gradient(coordinates, derivative).to(dtype) if want_gradient else None
    return BlockQuadrature(value.to(dtype), g)


def append_orthonormal_(
    basis: Tensor,  # (C, n, D) orthonormal rows, or zero; those from `filled` on are overwritten
    filled: int,
    block: Tensor,  # (C, k, D) vectors to add
) -> None:
    """Gram-Schmidt, each vector twice against all before it. One that is in their span up to rounding becomes zero."""
    for i in range(block.shape[1]):
        before, v = basis[:, : filled + i], block[:, i]
        noise = BREAKDOWN[torch.float64] * torch.linalg.vector_norm(v, dim=-1)
        for _ in range(2):
            overlap = torch.bmm(before, v.unsqueeze(-1))
            v = torch.baddbmm(v.unsqueeze(-1), before.mT, overlap, alpha=-1).squeeze(-1)
        norm = torch.linalg.vector_norm(v, dim=-1)
        alive = norm > noise
        basis[:, filled + i] = torch.where(alive.unsqueeze(-1), v / torch.where(alive, norm, 1.0).unsqueeze(-1), 0.0)


def log_at_block(
    t: Tensor,  # (C, n, n) symmetric PSD, float64
    start: Tensor,  # (C, n, k) B, float64
) -> tuple[Tensor, Tensor]:
    """-tr(B B^T log T) (C,), and M = Dlog_T[B B^T] (C, n, n), with `matrix_log`'s floor under the eigenvalues.

    A position with NaN gets a NaN value, so that the trainer's guard can name its step and row.
    """
    broken = ~torch.isfinite(t).flatten(1).all(-1)
    p = torch.bmm(start, start.mT)
    with torch.enable_grad():
        t = torch.where(broken[:, None, None], 0.0, t).requires_grad_()  # eigh refuses NaN
        value = -(p * matrix_log(t)).sum((1, 2))
    (derivative,) = torch.autograd.grad(value, t, -torch.ones_like(value))
    return torch.where(broken, torch.nan, value.detach()), derivative
