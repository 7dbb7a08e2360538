"""MCE without a product over the vocabulary: the likeliest tokens exactly, the rest through its second moments.

    Q = sum_{j in S} q_j e_j e_j^T  +  U B U^T  +  c (I - U U^T)

S      the kept tokens: the likeliest ones and the target, each with its own vector
U      p directions of R^D in which the token vectors vary most (from the weight alone, once per optimizer step)
B      sum_{j not in S} q_j (U^T e_j) (U^T e_j)^T: this position's own tail, exact within U
c      (sum_{j not in S} q_j |e_j|^2 - tr B) / (D - p): the rest of the tail's mass, spread over the other D - p

(The method is called "head and tail". In this package "head" alone means the LM head; the tokens in S are "kept".)

B and the tail's mass are one product of the probabilities with (V, p (p + 1) / 2 + 1) products of coordinates, so the
price on top of cross-entropy's own three products is p (p + 1) / (6 H) of them. Q is PSD with the true trace, dominates
q_y e_y e_y^T (hence MCE <= CE), depends on this position alone, and is the true Q if S is the vocabulary or p = D.

Everything lives in the span of the kept vectors and U, in coefficients. With R = [E_S; U^T], (S + p, D), the vector
v = R^T a is stored as `a`; its products R v are G a, with the Gram matrix G = R R^T; and Q v = R^T (W G a + c a), with
W = diag(q_S) + (B - c I). Lanczos (krylov.py) then takes K products with (S + p)-square matrices.

The gradient in q is that of this Q, which every probability enters linearly. With V the basis, M = Dlog_T[e_1 e_1^T],
u_j = V^T e_j, x_j = U^T e_j and A = V^T U,

    kept tokens    g_j = -u_j^T M u_j
    all others     g_j = -x_j^T (A^T M A) x_j - r (|e_j|^2 - |x_j|^2),     r = tr(M (V^T V - A A^T)) / (D - p)

The second is linear in the same features as B and the tail's mass: g_j = form . features_j, one more product with them.
It is the derivative of the value once K exhausts the Krylov space; for fewer steps both are approximations (krylov.py).
The vectors of the tail's tokens count as constants.

Legend: C positions, V vocabulary, D embedding width, S kept tokens, p directions, n = S + p, K Lanczos steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matrix_llm.loss.krylov import EIGENVALUE_FLOOR, probability_gradient, tridiagonal_log
from matrix_llm.loss.vocabulary import BLOCK_ELEMENTS, VocabularySummary


class HeadTail(NamedTuple):
    """MCE of some positions and its derivatives."""

    value: Tensor  # (C,) MCE in nats
    at_kept: Tensor  # (C, S) d MCE / d q_j at the kept tokens
    tail: Tensor  # (C,) sum of q_j d MCE / d q_j over all other tokens
    form: Tensor  # (C, p (p + 1) / 2 + 1) d MCE / d q_j = form . features_j at all other tokens
    at_vectors: Tensor | None  # (C, S, D) d MCE / d e_j of the kept tokens, where asked for


def include_target_(
    kept: Tensor,  # (C, S) ids by falling probability; changed in place
    labels: Tensor,  # (C,)
) -> Tensor:
    """`kept`, with the target put in the last place if it is missing: the target's direction decides the value."""
    missing = ~(kept == labels[:, None]).any(-1)
    kept[:, -1] = torch.where(missing, labels, kept[:, -1])
    return kept


def unpack_moments(
    moments: Tensor,  # (C, p (p + 1) / 2) upper triangles
    p: int,
) -> Tensor:
    """(C, p, p) symmetric matrices."""
    upper = torch.triu_indices(p, p, device=moments.device)
    full = moments.new_empty(moments.shape[0], p, p)
    full[:, upper[0], upper[1]] = moments
    full[:, upper[1], upper[0]] = moments
    return full


def unit_vectors_of(
    ids: Tensor,  # (C, S)
    vectors: Tensor,  # (V, D) of any norm
    summary: VocabularySummary,
) -> Tensor:
    """(C, S, D) those tokens' vectors, centred if the summary is, scaled to norm 1, in the summary's dtype."""
    unit = vectors[ids].to(summary.inverse_norm.dtype)
    if summary.centre is not None:
        unit -= summary.centre
    return unit.mul_(summary.inverse_norm[ids].unsqueeze(-1))


def split_tail(
    moments: Tensor,  # (C, p (p + 1) / 2 + 1)
    p: int,
    width: int,  # D
) -> tuple[Tensor, Tensor]:
    """B - c I (C, p, p) and c (C,): the tail within U, above what is spread evenly, and that."""
    tail_moment = unpack_moments(moments[:, :-1], p)  # B
    even = torch.zeros_like(moments[:, -1])  # c; with p = D nothing is left to spread
    if p < width:
        even = ((moments[:, -1] - tail_moment.diagonal(dim1=1, dim2=2).sum(-1)) / (width - p)).clamp(min=0)
    return tail_moment - torch.diag_embed(even.unsqueeze(-1).expand(-1, p)), even


def tail_form(
    inner: Tensor,  # (C, p, p) A^T M A, symmetric
    rest: Tensor,  # (C,) r
) -> Tensor:
    """(C, p (p + 1) / 2 + 1), whose product with a token's features is -x^T inner x - rest (|e|^2 - |x|^2)."""
    upper = torch.triu_indices(inner.shape[1], inner.shape[1], device=inner.device)
    form = inner[:, upper[0], upper[1]]
    form = torch.where(upper[0] == upper[1], form - rest.unsqueeze(-1), 2 * form)
    return -torch.cat([form, rest.unsqueeze(-1)], dim=1)


def solve_by_torch(
    q_kept: Tensor,  # (C, S) probabilities of the kept tokens
    kept: Tensor,  # (C, S) their ids; the target is among them
    labels: Tensor,  # (C,)
    moments: Tensor,  # (C, p (p + 1) / 2 + 1) sum over the other tokens of q_j features_j
    vectors: Tensor,  # (V, D) of any norm
    summary: VocabularySummary,
    steps: int,
    *,
    want_vectors: bool = False,
) -> HeadTail:
    """MCE and its gradient for the module's Q, in blocks of positions. The small problem is solved in float64."""
    block = max(1, BLOCK_ELEMENTS // (kept.shape[1] * vectors.shape[1]))
    parts = [
        _solve_block(q_kept[at], kept[at], labels[at], moments[at], vectors, summary, steps, want_vectors)
        for at in (slice(start, start + block) for start in range(0, kept.shape[0], block))
    ]
    if len(parts) == 1:
        return parts[0]
    values, at_kept, tails, forms, at_vectors = zip(*parts, strict=True)
    return HeadTail(
        torch.cat(values),
        torch.cat(at_kept),
        torch.cat(tails),
        torch.cat(forms),
        torch.cat(at_vectors) if want_vectors else None,
    )


def _solve_block(
    q: Tensor,
    kept: Tensor,
    labels: Tensor,
    moments: Tensor,
    vectors: Tensor,
    summary: VocabularySummary,
    steps: int,
    want_vectors: bool,
) -> HeadTail:
    """`solve_by_torch` for a block small enough that its (C, S, D) vectors stay in cache."""
    positions, size = kept.shape
    dtype, (width, p) = q.dtype, summary.directions.shape
    n = size + p

    # 1. G, the Gram matrix of the kept unit vectors and of U
    unit = unit_vectors_of(kept, vectors, summary)  # (C, S, D)
    gram = torch.empty(positions, n, n, dtype=torch.float64, device=q.device)
    gram[:, :size, :size] = torch.bmm(unit, unit.mT)
    gram[:, :size, size:] = summary.coordinates[kept]
    gram[:, size:, :size] = gram[:, :size, size:].mT
    gram[:, size:, size:] = torch.eye(p, dtype=gram.dtype, device=q.device)

    # 2. the tail: B within U, and c outside it
    q, moments = q.double(), moments.double()
    tail_excess, even = split_tail(moments, p, width)

    # 3. Lanczos in coefficients, from e_y.
    #    If n > D, coefficients grow along the null space of G, where G a is 0 up to rounding: |v|^2 = a^T G a is only
    #    known to eps |a|^2, so anything below `noise` of that counts as breakdown.
    noise = 16 * torch.finfo(dtype).eps
    steps = min(steps, n)
    coefficients = gram.new_zeros(positions, steps, n)
    products = gram.new_zeros(positions, steps, n)  # G a: the coordinates of each basis vector along S and U
    a = (kept == labels.unsqueeze(-1)).double()
    a = torch.cat([a, a.new_zeros(positions, p)], dim=1)
    u = torch.bmm(gram, a.unsqueeze(-1)).squeeze(-1)
    alive = ~((a * u).sum(-1) < 0.5)  # |e_y|^2 is 1, or 0 for a zero vector, or NaN, which must stay NaN
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for k in range(steps):
        coefficients[:, k], products[:, k] = a, u
        moved = torch.cat([q * u[:, :size], torch.bmm(tail_excess, u[:, size:].unsqueeze(-1)).squeeze(-1)], dim=1)
        residual = torch.addcmul(moved, even.unsqueeze(-1), a)  # Q v in coefficients
        alpha = (u * residual).sum(-1)
        alphas.append(torch.where(alive, alpha, 1.0))
        if k == steps - 1:
            break
        for _ in range(2):  # against all earlier vectors, and once more: rounding lets them creep back in
            overlap = torch.bmm(products[:, : k + 1], residual.unsqueeze(-1))
            residual = residual - torch.bmm(coefficients[:, : k + 1].mT, overlap).squeeze(-1)
        u = torch.bmm(gram, residual.unsqueeze(-1)).squeeze(-1)
        square = (residual * u).sum(-1)
        alive = alive & (square > noise * (residual * residual).sum(-1))
        beta = torch.where(alive, square, 0.0).sqrt()
        betas.append(beta)
        inverse = torch.where(alive, 1 / torch.where(alive, beta, 1.0), 0.0).unsqueeze(-1)
        a, u = residual * inverse, u * inverse

    # 4. value, and derivatives at the kept tokens and over the tail
    value, derivative, log_column = tridiagonal_log(alphas, betas, EIGENVALUE_FLOOR[dtype])
    at_kept = probability_gradient(products[..., :size], derivative)
    along = products[..., size:]  # (C, K, p) A = V^T U
    rest = torch.zeros_like(even)  # r
    if p < width:
        outside = torch.bmm(coefficients, products.mT) - torch.bmm(along, along.mT)  # V^T V - A A^T
        rest = (derivative * outside).sum((1, 2)) / (width - p)
    form = tail_form(torch.bmm(along.mT, torch.bmm(derivative, along)), rest)
    tail = (form * moments).sum(-1)

    # 5. derivatives at the kept vectors: -2 q_j V M u_j, and -2 V log(T) e_1 more at the target's
    at_vectors = None
    if want_vectors:
        spanning = torch.cat([unit, summary.directions.T.expand(positions, -1, -1)], dim=1).double()
        basis = torch.bmm(coefficients, spanning)  # (C, K, D)
        weighted = -2 * q.unsqueeze(1) * products[..., :size]  # (C, K, S)
        at_vectors = torch.bmm(weighted.mT, torch.bmm(derivative, basis))
        on_target = torch.bmm(log_column.unsqueeze(1), basis)  # (C, 1, D)
        at_vectors = (at_vectors - 2 * (kept == labels.unsqueeze(-1)).unsqueeze(-1) * on_target).to(dtype)
    return HeadTail(value.to(dtype), at_kept.to(dtype), tail.to(dtype), form.to(dtype), at_vectors)
