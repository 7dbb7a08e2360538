"""How log Q is evaluated for a chunk of positions, and its gradient in q and in the embeddings.

Three solvers: "exact", the dense logarithm (the reference, O(D^3) a position); "krylov", exact to any tolerance at a few
products (krylov.py); "taylor", the paper's series about I, which does not converge here (Q has eigenvalues near 0) and
stands for ablations.

Legend: N positions, C positions of one chunk, V vocabulary, D embedding width, S head tokens, K steps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from matrix_llm.information import matrix_log
from matrix_llm.loss.head_tail import VocabularySummary, likeliest, solve_head_tail, summarise
from matrix_llm.loss.krylov import VocabularyOperator, forms, quadrature

SOLVERS = ("exact", "krylov", "taylor")

# Chosen from the tables of docs/solvers.md and docs/performance.md: 1 % mean error in the value and 5 % in the logits'
# gradient where CE <= 2 are held with room to spare, at nearly the price of cross-entropy.
DEFAULT_STEPS = 6
DEFAULT_TOP_K = 16
WHOLE_VOCABULARY = 1024  # up to here the fused head's default is the whole vocabulary: there is nothing to save
SKETCH_SEED = 20240723  # one fixed projection: equal on every rank, every step and every resume


@dataclass(frozen=True)
class Solver:
    """How log Q is evaluated; checked once."""

    name: str
    steps: int
    order: int
    sketch_dim: int | None
    top_k: int | None

    @staticmethod
    def create(
        name: str,
        *,
        vocabulary: int,
        steps: int | None,
        order: int,
        sketch_dim: int | None,
        top_k: int | None,
        fused: bool = False,
    ) -> Solver:
        """Check the settings; `fused` asks for the fused head's own choice of head and tail where none is given.

        top_k of the vocabulary's size or more means the whole vocabulary.
        """
        if name not in SOLVERS:
            raise ValueError(
                f"solver={name!r} is unknown. Use 'krylov' (the default), 'exact' (the reference) or 'taylor'."
            )
        steps = DEFAULT_STEPS if steps is None else steps
        for key, value in {"steps": steps, "order": order, "sketch_dim": sketch_dim, "top_k": top_k}.items():
            optional = key in ("sketch_dim", "top_k") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}={value!r}, but it must be an integer of at least 1.")
        if name != "krylov" and top_k is not None:
            raise ValueError(
                f"top_k={top_k} is a form of solver='krylov'; solver={name!r} reads the whole vocabulary. Leave it out."
            )
        if fused and name == "krylov" and top_k is None and sketch_dim is None and vocabulary > WHOLE_VOCABULARY:
            top_k = DEFAULT_TOP_K
        if top_k is not None and top_k >= vocabulary:
            top_k = None
        return Solver(name, steps, order, sketch_dim, top_k)

    def bytes_per_position(self, vocabulary: int, width: int, itemsize: int) -> int:
        """Working memory of one position beside its logits."""
        if self.name == "exact":
            return itemsize * width * (3 * vocabulary + 6 * width)
        if self.name == "taylor":
            return itemsize * 4 * self.order * vocabulary
        if self.top_k is None:
            return itemsize * 2 * self.steps * vocabulary
        return 0  # head and tail works in blocks of its own, whatever the chunk


class Embeddings(NamedTuple):
    """The vectors e_j, and the vocabulary's summary where the solver splits Q into head and tail."""

    rows: Tensor  # (V, D) unit rows, zero where the given row is zero; of any norm where there is a summary
    summary: VocabularySummary | None


@functools.lru_cache(maxsize=4)
def _sketch(width: int, sketch_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SKETCH_SEED)
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.randn(width, sketch_dim, generator=generator, dtype=torch.float64).to(device, dtype)


def unit_rows(
    embeddings: Tensor,  # (V, D) any float dtype, any norm
    *,
    dtype: torch.dtype,
    sketch_dim: int | None = None,
) -> Tensor:
    """Rows scaled to norm 1 in `dtype`; a zero row stays zero. With a sketch, rows of embeddings @ R, R (D, r) N(0, 1/r).

    MCE depends on E only through the cosines e_i . e_j, which a random projection keeps (Johnson & Lindenstrauss).
    Differentiable; the gradient of a zero row is zero.
    """
    e = embeddings.to(dtype)
    largest = (
        e.detach().abs().amax(-1, keepdim=True)
    )  # so that squares neither overflow nor vanish, whatever the rows' norms
    e = e / torch.where(largest > 0, largest, 1.0)
    if sketch_dim is not None:
        e = e @ _sketch(e.shape[1], sketch_dim, dtype, e.device)
    norm = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    zero = norm == 0
    return e * torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, norm))


def prepare_embeddings(
    embeddings: Tensor,  # (V, D) any float dtype, any norm
    solver: Solver,
    dtype: torch.dtype,
    summary: VocabularySummary | None = None,
) -> Embeddings:
    """`summary`: one already made from these embeddings, to be used again."""
    if summary is not None and (embeddings.requires_grad or solver.sketch_dim is not None):
        raise ValueError(
            "summary is that of fixed, unsketched embeddings; leave it out where they require grad or sketch_dim is set."
        )
    if summary is not None and summary.directions.shape[0] != embeddings.shape[1]:
        raise ValueError(
            f"summary is of vectors of width {summary.directions.shape[0]}, but embeddings are {tuple(embeddings.shape)}."
        )
    if summary is not None and (summary.features.shape[0] != embeddings.shape[0] or summary.features.dtype != dtype):
        raise ValueError(
            f"summary is of {summary.features.shape[0]} vectors in {summary.features.dtype}, but embeddings are "
            f"{tuple(embeddings.shape)} and the loss runs in {dtype}. Make it with summarise(embeddings, {dtype})."
        )
    if solver.top_k is None:
        return Embeddings(unit_rows(embeddings, dtype=dtype, sketch_dim=solver.sketch_dim), None)
    rows = embeddings
    if embeddings.requires_grad or solver.sketch_dim is not None:
        rows = unit_rows(embeddings, dtype=dtype, sketch_dim=solver.sketch_dim)
    return Embeddings(rows, summary or summarise(rows.detach(), dtype))


class ChunkTerms(NamedTuple):
    """MCE of one chunk and its gradient g in q, as `g` everywhere except at the tokens `ids`, where it is `at_ids`."""

    value: Tensor  # (C,)
    g: Tensor | None  # (C, V), or (C, 1) where all tokens but `ids` share one
    mean: Tensor | None  # (C, 1) sum_j q_j g_j
    ids: Tensor | None = None  # (C, S)
    at_ids: Tensor | None = None  # (C, S)
    q_ids: Tensor | None = None  # (C, S)


def solve_chunk(
    solver: Solver,
    q: Tensor,  # (C, V)
    labels: Tensor,  # (C,)
    embeddings: Embeddings,
    *,
    ids: Tensor | None = None,  # (C, top_k) the likeliest tokens, where the caller knows them
    want_gradient: bool,
    row_weight: Tensor | None,  # (C,) weight of each position in the gradient of E; given whenever grad_rows is
    grad_rows: Tensor | None,  # (V, D) the gradient of E is added here
) -> ChunkTerms:
    """Where Q is split into head and tail, the head's entries of `q` are zero afterwards; `ChunkTerms.q_ids` has them."""
    if solver.top_k is not None:
        return _solve_head_tail(solver, q, labels, embeddings, ids, row_weight, grad_rows)
    e = embeddings.rows
    if solver.name != "krylov":
        return _solve_dense(solver, q, labels, e, want_gradient, row_weight, grad_rows)
    result = quadrature(VocabularyOperator(q, e), e[labels], solver.steps)
    g = mean = None
    if want_gradient:
        g = forms(result.rows, result.derivative)
        mean = (q * g).sum(-1, keepdim=True)
    if grad_rows is not None and row_weight is not None:
        weighted = -2 * row_weight[:, None] * q
        moved = torch.bmm(result.derivative, result.basis)  # (C, K, D): rows of (V_K M)^T
        for k in range(moved.shape[1]):
            grad_rows.addmm_((weighted * result.rows[:, k]).T, moved[:, k])
        on_target = torch.bmm(result.log_column.unsqueeze(1), result.basis).squeeze(1)
        grad_rows.index_add_(0, labels, -2 * row_weight[:, None] * on_target)
    return ChunkTerms(result.value, g, mean)


def _solve_head_tail(
    solver: Solver,
    q: Tensor,
    labels: Tensor,
    embeddings: Embeddings,
    ids: Tensor | None,
    row_weight: Tensor | None,
    grad_rows: Tensor | None,
) -> ChunkTerms:
    summary = embeddings.summary
    assert solver.top_k is not None
    assert summary is not None
    if ids is None:
        ids = likeliest(q, solver.top_k)[1]
    ids = with_target(ids, labels)
    q_ids = q.gather(1, ids)
    q.scatter_(1, ids, 0.0)
    return head_tail_terms(solver, q_ids, ids, labels, q @ summary.features, embeddings, row_weight, grad_rows)


def with_target(
    ids: Tensor,  # (C, S) by falling probability; changed in place
    labels: Tensor,  # (C,)
) -> Tensor:
    """The target belongs to the head: where it is missing it takes the last place."""
    missing = ~(ids == labels[:, None]).any(-1)
    ids[:, -1] = torch.where(missing, labels, ids[:, -1])
    return ids


def head_tail_terms(
    solver: Solver,
    q_ids: Tensor,  # (C, S) probabilities of the head's tokens
    ids: Tensor,  # (C, S)
    labels: Tensor,  # (C,)
    moments: Tensor,  # (C, p (p + 1) / 2 + 1) of the other tokens
    embeddings: Embeddings,
    row_weight: Tensor | None = None,
    grad_rows: Tensor | None = None,
) -> ChunkTerms:
    summary = embeddings.summary
    assert summary is not None
    result = solve_head_tail(
        q_ids, ids, labels, moments, embeddings.rows, summary, solver.steps, want_rows=grad_rows is not None
    )
    if grad_rows is not None and row_weight is not None and result.row_updates is not None:
        grad_rows.index_add_(0, ids.flatten(), (result.row_updates * row_weight[:, None, None]).flatten(0, 1))
    mass = moments[:, -1:]  # of the tail's tokens with a vector
    g = torch.where(mass > 0, result.tail.unsqueeze(-1) / torch.where(mass > 0, mass, 1.0), 0.0)
    mean = (q_ids * result.at_ids).sum(-1, keepdim=True) + result.tail.unsqueeze(-1)
    return ChunkTerms(result.value, g, mean, ids, result.at_ids, q_ids)


def _solve_dense(
    solver: Solver,
    q: Tensor,
    labels: Tensor,
    e: Tensor,
    want_gradient: bool,
    row_weight: Tensor | None,
    grad_rows: Tensor | None,
) -> ChunkTerms:
    """The reference: autograd through the definition. "exact" takes the (D, D) logarithm, "taylor" the series about I."""
    broken = ~torch.isfinite(q).all(
        -1
    )  # eigh refuses NaN; such a position gets a NaN value, for the trainer's guard to name
    q = torch.where(broken[:, None], 1 / q.shape[-1], q)
    with torch.enable_grad():
        q = q.detach().requires_grad_(want_gradient)
        e = e.detach().requires_grad_(grad_rows is not None)
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
            (g,) = torch.autograd.grad(value.sum(), q, retain_graph=grad_rows is not None)
            mean = (q.detach() * g).sum(-1, keepdim=True)
        if grad_rows is not None:
            (gradient,) = torch.autograd.grad(value, e, row_weight)
            grad_rows.add_(gradient)
    return ChunkTerms(torch.where(broken, torch.nan, value.detach()), g, mean)


def logit_gradient_(
    q: Tensor,  # (C, V), replaced in place
    terms: ChunkTerms,
    constant: Tensor | float,  # (C, 1) or a number
    weight: Tensor | float,  # (C, 1) or a number
) -> Tensor:
    """q <- q o (constant + weight (g - sum_i q_i g_i)): `constant` of softmax's own q, and the chain rule of MCE through it."""
    assert terms.g is not None  # the solver was asked for a gradient
    assert terms.mean is not None
    q.mul_(terms.g.sub_(terms.mean).mul_(weight).add_(constant))
    if terms.ids is not None and terms.at_ids is not None and terms.q_ids is not None:
        q.scatter_(1, terms.ids, terms.q_ids * (constant + weight * (terms.at_ids - terms.mean)))
    return q
