"""MCE of one chunk of positions and its gradient in q and in the embeddings, by the chosen solver.

    exact     the dense logarithm: the reference, O(D^3) per position
    krylov    exact to any tolerance with a few products (krylov.py); with top_k, by the kept tokens and the tail
              (head_tail.py, or kernels.py on a GPU)
    taylor    the paper's series about I, for ablations: it does not converge here, since Q has eigenvalues near 0

Legend: C positions of one chunk, V vocabulary, D embedding width, S kept tokens, p directions, K Lanczos steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrix_llm.information import matrix_log
from matrix_llm.loss.head_tail import HeadTail, include_target_, solve_by_torch
from matrix_llm.loss.krylov import probability_gradient, quadrature
from matrix_llm.loss.settings import Solver
from matrix_llm.loss.vocabulary import VocabularySummary, find_likeliest, summarise, unit_vectors

FORM_ELEMENTS = 2**18  # elements of the tail's gradient at a time, a (C, block) buffer: it stays in cache


def kernels_for(tensor: Tensor) -> Any:
    """The Triton kernels if `tensor` is on a GPU, else None. Triton is imported here, and needed nowhere else."""
    if not tensor.is_cuda:
        return None
    from matrix_llm.loss import kernels

    return kernels


# -------------------------------------------------------------------------------------------------------- embeddings


class Embeddings(NamedTuple):
    """The vectors e_j, and their summary where the solver keeps some tokens and summarises the others."""

    vectors: Tensor  # (V, D) of norm 1, or zero where the given vector is zero; as they were given with a summary
    summary: VocabularySummary | None  # None: the solver reads the whole vocabulary


def prepare_embeddings(
    embeddings: Tensor,  # (V, D) any float dtype, any norm
    solver: Solver,
    dtype: torch.dtype,  # float32 or float64, of the result
    summary: VocabularySummary | None = None,  # made earlier from the same embeddings
) -> Embeddings:
    """The vectors in the form that `solve_chunk` takes.

    Raises:
        ValueError: `summary` does not belong to these embeddings.
    """
    vocabulary_size, width = embeddings.shape
    if summary is not None:
        if embeddings.requires_grad or solver.sketch_dim is not None:
            raise ValueError(
                "summary describes fixed, unsketched embeddings. Omit it if they require grad, or with sketch_dim."
            )
        if summary.directions.shape[0] != width:
            raise ValueError(
                f"summary is of vectors of width {summary.directions.shape[0]}, but embeddings are "
                f"{tuple(embeddings.shape)}. Make it from these embeddings."
            )
        if summary.features.shape[0] != vocabulary_size or summary.features.dtype != dtype:
            raise ValueError(
                f"summary is of {summary.features.shape[0]} vectors in {summary.features.dtype}, but embeddings are "
                f"{tuple(embeddings.shape)} and the loss runs in {dtype}. Make it with summarise(embeddings, {dtype})."
            )
        if (summary.centre is not None) != solver.centred:
            raise ValueError(
                f"summary was made with centred={summary.centre is not None}, but the loss needs {solver.centred}. "
                f"Make it with summarise(embeddings, {dtype}, centred={solver.centred})."
            )
    if solver.top_k is None or embeddings.requires_grad or solver.sketch_dim is not None:
        unit = unit_vectors(embeddings, dtype=dtype, sketch_dim=solver.sketch_dim, centred=solver.centred)
        return Embeddings(unit, None if solver.top_k is None else summarise(unit.detach(), dtype))
    return Embeddings(embeddings, summary or summarise(embeddings, dtype, solver.centred))


# --------------------------------------------------------------------------------------------------------- one chunk


class KeptTokens(NamedTuple):
    """Head and tail's gradient in q: `at_kept` at the kept tokens, form . features_j at all others."""

    ids: Tensor  # (C, S)
    q: Tensor  # (C, S) their probabilities
    at_kept: Tensor  # (C, S) dMCE / dq
    form: Tensor  # (C, p (p + 1) / 2 + 1)
    features: Tensor  # (V, p (p + 1) / 2 + 1)


class ChunkTerms(NamedTuple):
    """MCE of one chunk, and its gradient in q: `g`, or what `kept` says."""

    value: Tensor  # (C,) MCE in nats
    g: Tensor | None  # (C, V) dMCE / dq
    mean: Tensor | None  # (C, 1) sum_j q_j g_j
    kept: KeptTokens | None = None


def solve_chunk(
    solver: Solver,
    q: Tensor,  # (C, V) probabilities; with top_k, those of the kept tokens are zeroed here, and are in `q_kept`
    labels: Tensor,  # (C,)
    embeddings: Embeddings,
    *,
    likeliest: Tensor | None = None,  # (C, top_k) ids by falling probability, where the caller knows them
    want_gradient: bool,
    position_weight: Tensor | None,  # (C,) weight of each position in the gradient of E; given whenever grad_vectors is
    grad_vectors: Tensor | None,  # (V, D) the gradient of E is added here
) -> ChunkTerms:
    """MCE and its gradients for one chunk of positions."""
    if solver.top_k is not None:
        assert embeddings.summary is not None
        if likeliest is None:
            likeliest = find_likeliest(q, solver.top_k)[1]
        kept = include_target_(likeliest, labels)
        q_kept = q.gather(1, kept)
        q.scatter_(1, kept, 0.0)  # what is left is the tail
        moments = q @ embeddings.summary.features
        return head_tail_terms(solver, q_kept, kept, labels, moments, embeddings, position_weight, grad_vectors)
    if solver.name == "krylov":
        return _krylov_terms(solver, q, labels, embeddings.vectors, want_gradient, position_weight, grad_vectors)
    return _dense_terms(solver, q, labels, embeddings.vectors, want_gradient, position_weight, grad_vectors)


def head_tail_terms(
    solver: Solver,
    q_kept: Tensor,  # (C, S) probabilities of the kept tokens
    kept: Tensor,  # (C, S) their ids; the target is among them
    labels: Tensor,  # (C,)
    moments: Tensor,  # (C, p (p + 1) / 2 + 1) sum over the other tokens of q_j features_j
    embeddings: Embeddings,
    position_weight: Tensor | None = None,  # (C,)
    grad_vectors: Tensor | None = None,  # (V, D)
) -> ChunkTerms:
    """The terms of a chunk whose kept tokens and tail moments are known."""
    assert embeddings.summary is not None
    result = solve_head_tail(
        q_kept,
        kept,
        labels,
        moments,
        embeddings.vectors,
        embeddings.summary,
        solver.steps,
        want_vectors=grad_vectors is not None,
    )
    if grad_vectors is not None and position_weight is not None and result.at_vectors is not None:
        grad_vectors.index_add_(0, kept.flatten(), (result.at_vectors * position_weight[:, None, None]).flatten(0, 1))
    mean = (q_kept * result.at_kept).sum(-1, keepdim=True) + result.tail.unsqueeze(-1)
    tokens = KeptTokens(kept, q_kept, result.at_kept, result.form, embeddings.summary.features)
    return ChunkTerms(result.value, None, mean, tokens)


def solve_head_tail(
    q_kept: Tensor,  # (C, S)
    kept: Tensor,  # (C, S)
    labels: Tensor,  # (C,)
    moments: Tensor,  # (C, p (p + 1) / 2 + 1)
    vectors: Tensor,  # (V, D) of any norm
    summary: VocabularySummary,
    steps: int,
    *,
    want_vectors: bool = False,
) -> HeadTail:
    """By the kernels if they are available and applicable, else by `head_tail.solve_by_torch` (the reference)."""
    kernels = None if want_vectors else kernels_for(q_kept)
    if kernels is not None and kernels.can_solve(kept.shape[1], steps, q_kept.dtype):
        return kernels.solve_head_tail(q_kept, kept, labels, moments, vectors, summary, steps)
    return solve_by_torch(q_kept, kept, labels, moments, vectors, summary, steps, want_vectors=want_vectors)


def _krylov_terms(
    solver: Solver,
    q: Tensor,  # (C, V)
    labels: Tensor,  # (C,)
    e: Tensor,  # (V, D)
    want_gradient: bool,
    position_weight: Tensor | None,  # (C,)
    grad_vectors: Tensor | None,  # (V, D)
) -> ChunkTerms:
    """Lanczos over the whole vocabulary."""
    result = quadrature(q, e, labels, solver.steps)
    g = mean = None
    if want_gradient:
        g = probability_gradient(result.coordinates, result.derivative)
        mean = (q * g).sum(-1, keepdim=True)
    if grad_vectors is not None and position_weight is not None:
        weighted = -2 * position_weight[:, None] * q
        moved = torch.bmm(result.derivative, result.basis)  # (C, K, D): row k is (V_K M)^T's
        for k in range(moved.shape[1]):
            grad_vectors.addmm_((weighted * result.coordinates[:, k]).T, moved[:, k])
        on_target = torch.bmm(result.log_column.unsqueeze(1), result.basis).squeeze(1)
        grad_vectors.index_add_(0, labels, -2 * position_weight[:, None] * on_target)
    return ChunkTerms(result.value, g, mean)


def _dense_terms(
    solver: Solver,
    q: Tensor,  # (C, V)
    labels: Tensor,  # (C,)
    e: Tensor,  # (V, D)
    want_gradient: bool,
    position_weight: Tensor | None,  # (C,)
    grad_vectors: Tensor | None,  # (V, D)
) -> ChunkTerms:
    """The reference: autograd through the definition, with the (D, D) logarithm ("exact") or the series ("taylor")."""
    # eigh refuses NaN: give such a position a NaN value instead, so that the trainer's guard can name its step and row
    broken = ~torch.isfinite(q).all(-1)
    q = torch.where(broken[:, None], 1 / q.shape[-1], q)
    with torch.enable_grad():
        q = q.detach().requires_grad_(want_gradient)
        e = e.detach().requires_grad_(grad_vectors is not None)
        target = e[labels]
        if solver.name == "exact":
            big_q = (q.unsqueeze(-1) * e).mT @ e  # (C, D, D)
            log_q = matrix_log((big_q + big_q.mT) / 2)
            value = -torch.einsum("ci,cij,cj->c", target, log_q, target)
        else:
            value, x = torch.zeros_like(q[:, 0]), target
            for m in range(1, solver.order + 1):  # x = (I - Q)^m e_y
                x = x - (q * (x @ e.T)) @ e
                value = value + (target * x).sum(-1) / m
        g = mean = None
        if want_gradient:
            (g,) = torch.autograd.grad(value.sum(), q, retain_graph=grad_vectors is not None)
            mean = (q.detach() * g).sum(-1, keepdim=True)
        if grad_vectors is not None:
            (gradient,) = torch.autograd.grad(value, e, position_weight)
            grad_vectors.add_(gradient)
    return ChunkTerms(torch.where(broken, torch.nan, value.detach()), g, mean)


def logit_gradient_(
    q: Tensor,  # (C, V) as `solve_chunk` left it; replaced in place
    terms: ChunkTerms,
    constant: Tensor | float,  # (C, 1) or a number
    weight: Tensor | float | None,  # (C, 1) or a number; None: the gradient of MCE is not wanted
) -> Tensor:
    """q <- q o (constant + weight (g - sum_i q_i g_i)).

    `weight` times the chain rule of MCE through the softmax, plus `constant` times q, which is cross-entropy's gradient
    but for its -1 at the label.
    """
    if weight is None:
        if terms.kept is not None:
            q.scatter_(1, terms.kept.ids, terms.kept.q)
        return q.mul_(constant)
    assert terms.mean is not None  # the solver was asked for a gradient
    if terms.kept is None:
        assert terms.g is not None
        return q.mul_(terms.g.sub_(terms.mean).mul_(weight).add_(constant))
    ids, q_kept, at_kept, form, features = terms.kept
    at_kept = q_kept * (constant + weight * (at_kept - terms.mean))
    form, constant = weight * form, constant - weight * terms.mean
    block = max(1, FORM_ELEMENTS // max(1, q.shape[0]))
    for start in range(0, q.shape[1], block):
        tokens = slice(start, start + block)
        q[:, tokens].mul_(torch.mm(form, features[tokens].T).add_(constant))
    return q.scatter_(1, ids, at_kept)
