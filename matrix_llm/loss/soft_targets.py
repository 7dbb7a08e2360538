"""MCE with a soft target: a teacher's distribution over k tokens instead of the one true token.

    P = sum_i p_i e_i e_i^T,     soft MCE = -tr(P log Q) = sum_i p_i (-e_i^T log(Q) e_i)                     (eq. 16)
    g_j = d/dq_j = -e_j^T Dlog_Q[P] e_j,     d/dlogit_j = q_j (g_j - sum_i q_i g_i)

It is the p-mixture of one-hot MCEs with one Q, so it is bounded by -log tr(PQ) <= soft MCE <= sum_i p_i (-log q_i).
Its minimum over Q, at Q = P, is not 0 but ME(P) = -tr(P log P), the teacher's own matrix entropy, so that what is left
to learn is the matrix KL divergence

    MKL(P || Q) = soft MCE - ME(P),     0 <= MKL <= KL(p || q)

(weights that sum to 1). Three solvers, as for one token:

    exact                   the dense logarithm in float64: the reference
    krylov, whole V         block_krylov.py
    krylov, with top_k      soft_head_tail.py, for training: touches the kept rows and the features alone

Legend: C positions, V vocabulary, D embedding width, k target tokens, S kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matrix_llm.base.errors import RecipeError
from matrix_llm.information import matrix_log
from matrix_llm.loss.block_krylov import block_quadrature
from matrix_llm.loss.head_tail import unit_vectors_of
from matrix_llm.loss.settings import Solver
from matrix_llm.loss.soft_head_tail import first_places, solve_soft_head_tail
from matrix_llm.loss.solvers import ChunkTerms, Embeddings, KeptTokens, logit_gradient_
from matrix_llm.loss.vocabulary import BLOCK_ELEMENTS, find_likeliest


@torch.no_grad()
def soft_terms(
    q: Tensor,  # (C, V) probabilities; left as they are
    target_ids: Tensor,  # (C, k) int64, in [0, V); repeats are allowed
    target: Tensor,  # (C, k) weights p_i >= 0 that sum to 1 or less, in q's dtype
    embeddings: Embeddings,
    solver: Solver,
    *,
    want_gradient: bool,
    likeliest: Tensor | None = None,  # (C, top_k) ids by falling probability, where the caller knows them
) -> tuple[Tensor, Tensor | None]:
    """-tr(P log Q) of each position (C,), and its gradient in the logits (C, V) where asked for.

    Args:
        solver: `steps` counts blocks of k columns here, and is for the whole vocabulary alone: with `top_k` the small
            problem is solved at once. Where the blocks have D columns or more, "exact" costs less and is taken.

    Raises:
        RecipeError: the Taylor series, which is there to repeat the paper's ablation of one token.
    """
    if solver.name == "taylor":
        raise RecipeError(
            "solver='taylor' has no soft targets: the series is only there to repeat the paper's one-token form. "
            "Use 'krylov' (the default) or 'exact'."
        )
    if len(q) == 0:
        return q.new_zeros(0), torch.zeros_like(q) if want_gradient else None
    as_many_columns = solver.steps * target.shape[1] >= embeddings.vectors.shape[1]
    if solver.name == "exact" or (solver.top_k is None and as_many_columns):
        return _exact_terms(q, target_ids, target, embeddings, want_gradient)
    if solver.top_k is not None:
        return _head_tail_terms(q, target_ids, target, embeddings, solver.top_k, likeliest, want_gradient)
    value, g = block_quadrature(q, embeddings.vectors, target_ids, target, solver.steps, want_gradient=want_gradient)
    return value, None if g is None else _through_softmax_(q, g)


def soft_mce(
    q: Tensor,  # (N, V) probabilities
    p: Tensor,  # (N, V) the target
    vectors: Tensor,  # (V, D) unit vectors, or zero
) -> Tensor:
    """-tr(P log Q) by the dense logarithm, (N,): the definition. Differentiable in q; O(D^3) per position.

    >>> q = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    >>> soft_mce(q, q, torch.eye(3, dtype=torch.float64))  # orthonormal vectors: the cross-entropy, here 1.5 log 2
    tensor([1.0397], dtype=torch.float64)
    """
    big_p, big_q = ((x.unsqueeze(-1) * vectors).mT @ vectors for x in (p, q))
    return -(big_p * matrix_log((big_q + big_q.mT) / 2)).sum((-2, -1))


@torch.no_grad()
def teacher_matrix_entropy(
    target_ids: Tensor,  # (C, k)
    target: Tensor,  # (C, k) weights p_i >= 0
    embeddings: Embeddings,
) -> Tensor:
    """ME(P) = -tr(P log P) of each teacher (C,): what soft MCE cannot fall below. Nothing of size V is touched.

    P's eigenvalues are those of the (k, k) matrix sqrt(p_i p_j) e_i . e_j; 0 log 0 = 0. Without tr P, as MCE is without
    tr Q: `information.matrix_entropy` is 1 more where the weights sum to 1.

    >>> orthonormal = Embeddings(torch.eye(3, dtype=torch.float64), None)
    >>> teacher_matrix_entropy(torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.5]]), orthonormal)  # log 2
    tensor([0.6931])
    """
    block = max(1, BLOCK_ELEMENTS // (target.shape[1] * embeddings.vectors.shape[1]))
    entropies = []
    for ids, p in zip(target_ids.split(block), target.split(block), strict=True):
        half = _unit_vectors(ids, embeddings).double() * p.double().sqrt().unsqueeze(-1)
        gram = torch.bmm(half, half.mT)
        broken = ~torch.isfinite(gram).flatten(1).all(-1)
        w = torch.linalg.eigvalsh(torch.where(broken[:, None, None], 0.0, gram)).clamp(min=0)
        entropies.append(torch.where(broken, torch.nan, -torch.xlogy(w, w).sum(-1)))
    return torch.cat(entropies).to(target.dtype)


def _unit_vectors(ids: Tensor, embeddings: Embeddings) -> Tensor:
    if embeddings.summary is None:
        return embeddings.vectors[ids]
    return unit_vectors_of(ids, embeddings.vectors, embeddings.summary)


def _through_softmax_(
    q: Tensor,  # (C, V)
    g: Tensor,  # (C, V) d/dq; replaced in place
) -> Tensor:
    """q (g - sum_i q_i g_i), the gradient in the logits."""
    return g.sub_((q * g).sum(-1, keepdim=True)).mul_(q)


def _exact_terms(
    q: Tensor,  # (C, V)
    target_ids: Tensor,  # (C, k)
    target: Tensor,  # (C, k)
    embeddings: Embeddings,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Autograd through `soft_mce` in float64."""
    vectors = embeddings.vectors.double()
    p = torch.zeros_like(q, dtype=torch.float64).scatter_add_(1, target_ids, target.double())
    # eigh refuses NaN: give such a position a NaN value instead, so that the trainer's guard can name its step and row
    broken = ~(torch.isfinite(q).all(-1) & torch.isfinite(p).all(-1) & torch.isfinite(vectors).all())
    vectors = vectors.nan_to_num()
    values, gradients = [], []
    block = max(1, BLOCK_ELEMENTS // vectors.numel())
    for start in range(0, len(q), block):
        at = slice(start, start + block)
        with torch.enable_grad():
            chunk = torch.where(broken[at, None], 1 / q.shape[1], q[at].double()).requires_grad_(want_gradient)
            value = soft_mce(chunk, torch.where(broken[at, None], 0.0, p[at]), vectors)
        values.append(value.detach())
        if want_gradient:
            (g,) = torch.autograd.grad(value, chunk, torch.ones_like(value))
            gradients.append(_through_softmax_(chunk.detach(), g).to(q.dtype))
    value = torch.where(broken, torch.nan, torch.cat(values)).to(q.dtype)
    return value, torch.cat(gradients) if want_gradient else None


def _head_tail_terms(
    q: Tensor,  # (C, V)
    target_ids: Tensor,  # (C, k)
    target: Tensor,  # (C, k)
    embeddings: Embeddings,
    top_k: int,
    likeliest: Tensor | None,  # (C, top_k)
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The likeliest tokens and the target's exactly, the others through their second moments."""
    assert embeddings.summary is not None
    features = embeddings.summary.features
    if likeliest is None:
        likeliest = find_likeliest(q, min(top_k, q.shape[1]))[1]
    kept = torch.cat([likeliest, target_ids], dim=1)
    q_kept = q.gather(1, kept)
    tail = q.scatter(1, kept, 0.0)
    result = solve_soft_head_tail(q_kept, kept, target, tail @ features, embeddings.vectors, embeddings.summary)
    if not want_gradient:
        return result.value, None
    once = first_places(kept) == torch.arange(kept.shape[1], device=kept.device)
    mean = (once * q_kept * result.at_kept).sum(-1, keepdim=True) + result.tail.unsqueeze(-1)
    tokens = KeptTokens(kept, q_kept, result.at_kept, result.form, features)
    return result.value, logit_gradient_(tail, ChunkTerms(result.value, None, mean, tokens), 0.0, 1.0)
