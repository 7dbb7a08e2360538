"""-e_y^T log(Q) e_y and its gradient by Lanczos, without forming the (D, D) matrix Q.

Q = sum_j q_j e_j e_j^T is used through products only. K steps of Lanczos from v_1 = e_y give an orthonormal basis
V_K = [v_1 .. v_K] and the tridiagonal T = V_K^T Q V_K. Then (Golub & Meurant, Gauss quadrature)

    -e_y^T log(Q) e_y  ~  -e_1^T log(T) e_1
    d/dq_j             ~  -u_j^T M u_j,   u_j = V_K^T e_j,   M = Dlog_T[e_1 e_1^T]
    d/de_j             ~  -2 q_j V_K M u_j,   and on the target's vector -2 V_K log(T) e_1 more

(low-rank Frechet derivative: Kandolf, Koskela, Relton, Schweitzer 2021). The u_j are by-products of the recurrence, so
the gradient needs no further product with E. It approximates the gradient of the exact quantity; it is not the
derivative of the K-step value. Both converge to the exact ones as K grows.

Legend: C positions of one chunk, V vocabulary, D embedding width, K Lanczos steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matrix_llm.information import log_divided_differences

# A residual this much smaller than the largest diagonal entry of T is rounding noise: the Krylov space is exhausted.
BREAKDOWN = {torch.float32: 1e-6, torch.float64: 1e-14}
# Eigenvalues of T are clamped here before the logarithm: far below the noise, so that no true one is changed.
EIGENVALUE_FLOOR = {torch.float32: 1e-12, torch.float64: 1e-20}


class Quadrature(NamedTuple):
    """What K steps of Lanczos tell about -e_y^T log(Q) e_y."""

    value: Tensor  # (C,)  -e_1^T log(T) e_1
    basis: Tensor  # (C, K, D)  v_1 .. v_K, zero after breakdown
    coordinates: Tensor  # (C, K, V)  v_k^T e_j; column j is u_j
    derivative: Tensor  # (C, K, K)  M = Dlog_T[e_1 e_1^T], symmetric
    log_column: Tensor  # (C, K)  log(T) e_1


def quadrature(
    q: Tensor,  # (C, V) probabilities
    vectors: Tensor,  # (V, D) e_j: unit vectors, or zero
    labels: Tensor,  # (C,)
    steps: int,
) -> Quadrature:
    """K = min(steps, D) steps of Lanczos with full reorthogonalisation, then Gauss quadrature of the logarithm.

    Two products with E per step, one in the last. A position whose target vector is zero has value 0. A position whose
    Krylov space is exhausted (a confident one: q_y = 1) stops there: the rest of T gets alpha = 1 and
    beta = 0, where log 1 = 0 adds nothing, and nothing is divided by a vanishing beta.
    """
    start = vectors[labels]
    positions, width = start.shape
    steps = min(steps, width)
    dtype = start.dtype
    basis = start.new_zeros(positions, steps, width)
    coordinates = start.new_empty(positions, steps, vectors.shape[0])
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    # |e_y|^2 is 1, or 0 for a zero vector, or NaN. Not `>= 0.5`: NaN must stay alive, and reach the result.
    alive = ~((start * start).sum(-1) < 0.5)
    largest = start.new_zeros(positions)
    v, before, beta = start, torch.zeros_like(start), largest
    for k in range(steps):
        # 1. alpha_k = v^T Q v, and the residual Q v
        basis[:, k] = v
        torch.mm(v, vectors.T, out=coordinates[:, k])
        along = coordinates[:, k]
        if k == steps - 1:  # a weighted sum is enough: no second product
            alphas.append(torch.where(alive, (q * along).mul_(along).sum(-1), 1.0))
            break
        residual = (q * along) @ vectors
        alpha = (v * residual).sum(-1)
        alphas.append(torch.where(alive, alpha, 1.0))
        largest = torch.maximum(largest, alpha)

        # 2. the three-term recurrence, then once more against all earlier vectors: rounding lets them creep back in
        residual.addcmul_(v, alpha.unsqueeze(-1), value=-1).addcmul_(before, beta.unsqueeze(-1), value=-1)
        seen = basis[:, : k + 1]
        overlap = torch.bmm(seen, residual.unsqueeze(-1))
        residual = torch.baddbmm(residual.unsqueeze(-1), seen.mT, overlap, alpha=-1).squeeze(-1)

        # 3. beta_k and the next vector, or breakdown
        beta = torch.linalg.vector_norm(residual, dim=-1)
        alive = alive & (beta > BREAKDOWN[dtype] * largest)
        beta = torch.where(alive, beta, 0.0)
        betas.append(beta)
        before, v = v, torch.where(alive.unsqueeze(-1), residual / torch.where(alive, beta, 1.0).unsqueeze(-1), 0.0)

    value, derivative, log_column = tridiagonal_log(alphas, betas, EIGENVALUE_FLOOR[dtype])
    return Quadrature(value.to(dtype), basis, coordinates, derivative.to(dtype), log_column.to(dtype))


def tridiagonal_log(
    alphas: list[Tensor],  # K of (C,), the diagonal of T
    betas: list[Tensor],  # K - 1 of (C,), next to it
    floor: float,  # eigenvalues below it are clamped
) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of T at e_1, in float64.

    A position with NaN gets a NaN value and finite derivatives, so that the trainer's guard can name its step and row.

    Returns:
        -e_1^T log(T) e_1 (C,), M = Dlog_T[e_1 e_1^T] (C, K, K), and log(T) e_1 (C, K).
    """
    t = torch.diag_embed(torch.stack(alphas, dim=-1).double())
    if betas:
        off = torch.stack(betas, dim=-1).double()
        t = t + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    broken = ~torch.isfinite(t).all(-1).all(-1)  # eigh refuses NaN on the CPU
    t = torch.where(broken[:, None, None], torch.eye(len(alphas), dtype=t.dtype, device=t.device), t)
    w, z = torch.linalg.eigh(t)
    w = w.clamp(min=floor)
    log_w = w.log()
    first = z[:, 0, :]  # e_1 in the eigenbasis
    value = torch.where(broken, torch.nan, -(first * first * log_w).sum(-1))
    kernel = log_divided_differences(w) * first.unsqueeze(-1) * first.unsqueeze(-2)
    log_column = torch.bmm(z, (first * log_w).unsqueeze(-1)).squeeze(-1)
    return value, z @ kernel @ z.mT, log_column


def probability_gradient(
    coordinates: Tensor,  # (C, K, R), column j is u_j
    derivative: Tensor,  # (C, K, K) M
) -> Tensor:
    """d/dq_j = -u_j^T M u_j for each of R tokens: (C, R)."""
    moved = torch.bmm(derivative, coordinates)
    total = moved[:, 0] * coordinates[:, 0]
    for k in range(1, coordinates.shape[1]):
        total.addcmul_(moved[:, k], coordinates[:, k])
    return total.neg_()
