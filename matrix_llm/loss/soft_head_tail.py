"""-tr(P log Q) without a product over the vocabulary: head_tail.py's Q, for a target of k tokens.

The kept tokens are the likeliest ones and all of the target's, so S = top_k + k of them; the others are B and c, as in
head_tail.py. P lies in the span of the kept vectors and U, and Q maps that span into itself. With n = S + p small, no
Lanczos steps are needed: R = [E_S; U^T] has the Gram matrix R R^T = L L^T, and in an orthonormal basis of its span

    Q = L^T W L + c I,   W = diag(q_S) + (B - c I),        e_j = row j of L (kept tokens),   U = the last p rows of L

so one logarithm of a matrix of size m = min(n, D) gives the value for this Q exactly, and M = Dlog_Q[P]. The gradient
is that of head_tail.py, with A the last p rows of L, transposed:

    kept tokens    g_j = -u_j^T M u_j
    all others     g_j = form . features_j

A token that is kept twice (likely and in the target, or repeated in the target) has its probability once.

Legend: C positions, V vocabulary, D embedding width, k target tokens, S kept tokens, p directions, n = S + p,
m = min(n, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from matrix_llm.loss.block_krylov import log_at_block
from matrix_llm.loss.head_tail import HeadTail, split_tail, tail_form, unit_vectors_of
from matrix_llm.loss.vocabulary import BLOCK_ELEMENTS, VocabularySummary


def solve_soft_head_tail(
    q_kept: Tensor,  # (C, S) probabilities of the kept tokens
    kept: Tensor,  # (C, S) their ids; the last k are the target's, and repeats are allowed
    target: Tensor,  # (C, k) weights p_i >= 0
    moments: Tensor,  # (C, p (p + 1) / 2 + 1) sum over the other tokens of q_j features_j
    vectors: Tensor,  # (V, D) of any norm
    summary: VocabularySummary,
) -> HeadTail:
    """-tr(P log Q) and its gradient for head_tail.py's Q, in blocks of positions, in float64 inside.

    `at_kept` is the same at every place of a repeated token.
    """
    n = kept.shape[1] + summary.directions.shape[1]
    block = max(1, BLOCK_ELEMENTS // (n * (vectors.shape[1] + 4 * n)))
    parts = [
        _solve_block(q_kept[at], kept[at], target[at], moments[at], vectors, summary)
        for at in (slice(start, start + block) for start in range(0, kept.shape[0], block))
    ]
    values, at_kept, tails, forms, _ = zip(*parts, strict=True)
    return HeadTail(torch.cat(values), torch.cat(at_kept), torch.cat(tails), torch.cat(forms), None)


def _solve_block(
    q: Tensor, kept: Tensor, target: Tensor, moments: Tensor, vectors: Tensor, summary: VocabularySummary
) -> HeadTail:
    size, dtype, (width, p) = kept.shape[1], q.dtype, summary.directions.shape

    # 1. each token once: repeats count at their first place
    first = first_places(kept)
    once = q.double() * (first == torch.arange(size, device=q.device))

    # 2. L. With D rows or more in R, L is R itself, in the usual basis of R^D. Else the Gram matrix is made in float64
    #    and has a ridge, far below what float64 resolves of Q: repeats and zero vectors make it singular.
    directions = summary.directions.double().T.expand(len(q), -1, -1)
    root = torch.cat([unit_vectors_of(kept, vectors, summary).double(), directions], dim=1)  # (C, n, D) R
    if root.shape[1] < width:
        gram = torch.bmm(root, root.mT)
        gram.diagonal(dim1=1, dim2=2).add_(4 * gram.shape[1] * torch.finfo(gram.dtype).eps)
        root = torch.linalg.cholesky_ex(gram).L  # of NaN it is NaN
    at_tokens, at_directions = root.split([size, p], dim=1)  # (C, S, m) the u_j^T, (C, p, m) A^T

    # 3. Q and P in the basis
    moments = moments.double()
    excess, even = split_tail(moments, p, width)
    big_q = torch.bmm(at_tokens.mT * once.unsqueeze(1), at_tokens)
    big_q += torch.bmm(at_directions.mT, torch.bmm(excess, at_directions))
    big_q = (big_q + big_q.mT) / 2 + torch.diag_embed(even.unsqueeze(-1).expand(-1, root.shape[2]))
    start = at_tokens[:, size - target.shape[1] :].mT * target.double().sqrt().unsqueeze(1)  # (C, m, k)

    # 4. value, and derivatives at the kept tokens and over the tail
    value, derivative = log_at_block(big_q, start)
    at_kept = -(torch.bmm(at_tokens, derivative) * at_tokens).sum(-1).gather(1, first)
    inner = torch.bmm(at_directions, torch.bmm(derivative, at_directions.mT))
    rest = torch.zeros_like(even)  # r
    if p < width:
        rest = (derivative.diagonal(dim1=1, dim2=2).sum(-1) - inner.diagonal(dim1=1, dim2=2).sum(-1)) / (width - p)
    form = tail_form(inner, rest)
    tail = (form * moments).sum(-1)
    return HeadTail(value.to(dtype), at_kept.to(dtype), tail.to(dtype), form.to(dtype), None)


def first_places(
    ids: Tensor,  # (C, S)
) -> Tensor:
    """(C, S) the first place at which each position has the same id.

    >>> first_places(torch.tensor([[7, 3, 7, 7, 3]]))
    tensor([[0, 1, 0, 0, 1]])
    """
    return (ids.unsqueeze(2) == ids.unsqueeze(1)).to(torch.uint8).argmax(-1)
