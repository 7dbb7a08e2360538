"""e_y^T log(Q) e_y and its gradient by Lanczos, without ever forming the (D, D) matrix Q.

Q = sum_j q_j e_j e_j^T is known only through products. k steps of Lanczos from v_1 = e_y give an orthonormal basis
V_k = [v_1 .. v_k] and the tridiagonal T_k = V_k^T Q V_k, and then (Golub & Meurant, Gauss quadrature)

    -e_y^T log(Q) e_y  ~  -e_1^T log(T_k) e_1
    d/dq_j             ~  -u_j^T M_k u_j,   u_j = V_k^T e_j,   M_k = Dlog_{T_k}[e_1 e_1^T]
    d/de_j             ~  -2 q_j V_k M_k u_j,  and -2 V_k log(T_k) e_1 more on the target's row

(low-rank Frechet derivative: Kandolf, Koskela, Relton, Schweitzer 2021). The u_j are by-products of the recurrence, so
the gradient needs no further product with E. It is the gradient of the exact quantity, approximated; it is not the
derivative of the k-step value. Both converge to the exact ones as k grows.

Legend: C positions of one chunk, V vocabulary, D embedding width, K Lanczos steps.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from matrix_llm.information import log_divided_differences

# A residual this much smaller than the largest diagonal entry of T is rounding noise: the Krylov space is exhausted.
BREAKDOWN = {torch.float32: 1e-6, torch.float64: 1e-14}
# Eigenvalues of T are clamped here before the logarithm. Far below float32's noise, so that the clamp is never a model.
EIGENVALUE_FLOOR = {torch.float32: 1e-12, torch.float64: 1e-20}


class Operator(Protocol):
    """A batch of C matrices Q, known through products."""

    width: int  # R

    def project(self, v: Tensor, out: Tensor) -> None:
        """Fill `out` (C, R) with whatever coordinates of v (C, D) `quadratic` and `expand` need."""
        ...

    def quadratic(self, v: Tensor, rows: Tensor) -> Tensor:
        """v^T Q v, (C,)."""
        ...

    def expand(self, rows: Tensor) -> Tensor:
        """Q v, (C, D)."""
        ...


class VocabularyOperator:
    """Q = sum over the whole vocabulary of q_j e_j e_j^T: two products with E a step, one in the last."""

    def __init__(
        self,
        q: Tensor,  # (C, V) probabilities
        embeddings: Tensor,  # (V, D) unit or zero rows
    ) -> None:
        self.q, self.embeddings = q, embeddings
        self.width = embeddings.shape[0]

    def project(self, v: Tensor, out: Tensor) -> None:
        torch.mm(v, self.embeddings.T, out=out)

    def quadratic(self, v: Tensor, rows: Tensor) -> Tensor:
        return (self.q * rows).mul_(rows).sum(-1)

    def expand(self, rows: Tensor) -> Tensor:
        return (self.q * rows) @ self.embeddings


class Quadrature(NamedTuple):
    """What `quadrature` knows about -e_y^T log(Q) e_y after K steps."""

    value: Tensor  # (C,)  -e_1^T log(T) e_1
    basis: Tensor  # (C, K, D)  rows v_1 .. v_K, zero after breakdown
    rows: Tensor  # (C, K, R)  what the operator projected
    derivative: Tensor  # (C, K, K)  M = Dlog_T[e_1 e_1^T], symmetric
    log_column: Tensor  # (C, K)  log(T) e_1


def quadrature(
    operator: Operator,
    start: Tensor,  # (C, D) unit rows e_y; a zero row gives value 0
    steps: int,
) -> Quadrature:
    """K steps of Lanczos with full reorthogonalisation, then Gauss quadrature of the logarithm.

    A position whose Krylov space is exhausted (a confident one: q_y = 1) stops there, with alpha = 1 and beta = 0 in the
    unused rows of T, where log 1 = 0 adds nothing. Nothing is divided by a vanishing beta.
    """
    positions, width = start.shape
    steps = min(steps, width)
    dtype = start.dtype
    basis = start.new_zeros(positions, steps, width)
    rows = start.new_empty(positions, steps, operator.width)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    alive = ~(
        (start * start).sum(-1) < 0.5
    )  # e_y is a unit row, zero where lm_head has a zero row, or NaN, which must stay NaN
    largest = start.new_zeros(positions)
    v, before, beta = start, torch.zeros_like(start), largest
    for k in range(steps):
        basis[:, k] = v
        operator.project(v, rows[:, k])
        if k == steps - 1:
            alphas.append(torch.where(alive, operator.quadratic(v, rows[:, k]), 1.0))
            break
        residual = operator.expand(rows[:, k])
        alpha = (v * residual).sum(-1)
        alphas.append(torch.where(alive, alpha, 1.0))
        largest = torch.maximum(largest, alpha)
        # The three-term recurrence, then once more against every earlier vector: rounding would let them creep back in.
        residual.addcmul_(v, alpha.unsqueeze(-1), value=-1).addcmul_(before, beta.unsqueeze(-1), value=-1)
        seen = basis[:, : k + 1]
        overlap = torch.bmm(seen, residual.unsqueeze(-1))
        residual = torch.baddbmm(residual.unsqueeze(-1), seen.mT, overlap, alpha=-1).squeeze(-1)
        beta = torch.linalg.vector_norm(residual, dim=-1)
        alive = alive & (beta > BREAKDOWN[dtype] * largest)
        beta = torch.where(alive, beta, 0.0)
        betas.append(beta)
        before, v = v, torch.where(alive.unsqueeze(-1), residual / torch.where(alive, beta, 1.0).unsqueeze(-1), 0.0)

    value, derivative, log_column = tridiagonal_log(alphas, betas, EIGENVALUE_FLOOR[dtype])
    return Quadrature(value.to(dtype), basis, rows, derivative.to(dtype), log_column.to(dtype))


def tridiagonal_log(
    alphas: list[Tensor],  # K of (C,), the diagonal of T
    betas: list[Tensor],  # K - 1 of (C,), beside it
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(-e_1^T log(T) e_1 of shape (C,), M = Dlog_T[e_1 e_1^T] of shape (C, K, K), log(T) e_1 of shape (C, K)), in float64.

    Eigenvalues below `floor` are clamped. A position with a NaN gets a NaN value and finite M, for the trainer's guard to name.
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


def forms(
    rows: Tensor,  # (C, K, R)
    derivative: Tensor,  # (C, K, K)
) -> Tensor:
    """-u_j^T M u_j for each of the R columns u_j: (C, R)."""
    moved = torch.bmm(derivative, rows)
    total = moved[:, 0] * rows[:, 0]
    for k in range(1, rows.shape[1]):
        total.addcmul_(moved[:, k], rows[:, k])
    return total.neg_()
