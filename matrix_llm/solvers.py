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
from matrix_llm.krylov import HeadTailOperator, VocabularyOperator, forms, quadrature

SOLVERS = ("exact", "krylov", "taylor")

# Chosen from the table of docs/solvers.md: well below 1 % mean error in the value and 5 % in the logits' gradient where
# CE <= 2. A sketch and a head with a shared tail are cheaper and missed that on real predictions, so they are options.
DEFAULT_STEPS = 6
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
    ) -> Solver:
        if name not in SOLVERS:
            raise ValueError(f"solver={name!r} is unknown. Use 'krylov' (the default), 'exact' (the reference) or 'taylor'.")
        steps = DEFAULT_STEPS if steps is None else steps
        for key, value in {"steps": steps, "order": order, "sketch_dim": sketch_dim, "top_k": top_k}.items():
            optional = key in ("sketch_dim", "top_k") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}={value!r}, but it must be an integer of at least 1.")
        if name != "krylov" and top_k is not None:
            raise ValueError(f"top_k={top_k} is a form of solver='krylov'; solver={name!r} reads the whole vocabulary. Leave it out.")
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
        return itemsize * (self.top_k * (2 * width + 3 * self.steps) + 4 * self.steps * width)


@dataclass(frozen=True)
class Embeddings:
    """The unit rows e_j (zero where the given row is zero), and the vocabulary's second moment when the solver needs it."""

    rows: Tensor  # (V, D)
    tail_moment: Tensor | None  # (D, D) mean of e_j e_j^T over non-zero rows: trace 1; a constant, no gradient
    nonzero: Tensor | None  # () how many rows that is

    @property
    def fixed(self) -> tuple[Tensor | None, Tensor | None]:
        """What carries no gradient."""
        return self.tail_moment, self.nonzero


@functools.lru_cache(maxsize=4)
def _sketch(width: int, sketch_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SKETCH_SEED)
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
    largest = e.detach().abs().amax(-1, keepdim=True)  # so that squares neither overflow nor vanish, whatever the rows' norms
    e = e / torch.where(largest > 0, largest, 1.0)
    if sketch_dim is not None:
        e = e @ _sketch(e.shape[1], sketch_dim, dtype, e.device)
    norm = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    zero = norm == 0
    return e * torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, norm))


def prepare_embeddings(embeddings: Tensor, solver: Solver, dtype: torch.dtype) -> Embeddings:
    rows = unit_rows(embeddings, dtype=dtype, sketch_dim=solver.sketch_dim)
    if solver.top_k is None:
        return Embeddings(rows, None, None)
    detached = rows.detach()
    nonzero = (detached.abs().amax(-1) > 0).sum().clamp(min=1)
    return Embeddings(rows, detached.T @ detached / nonzero, nonzero)


class ChunkTerms(NamedTuple):
    """MCE of one chunk and its gradient in q, as `base` everywhere except at the tokens `ids`, where it is `at_ids`."""

    value: Tensor  # (C,)
    base: Tensor | None  # (C, V), or (C, 1) where all tokens but `ids` share one
    ids: Tensor | None  # (C, S)
    at_ids: Tensor | None  # (C, S)
    q_ids: Tensor | None  # (C, S)


def solve_chunk(
    solver: Solver,
    q: Tensor,  # (C, V)
    labels: Tensor,  # (C,)
    embeddings: Embeddings,
    *,
    want_gradient: bool,
    row_weight: Tensor | None,  # (C,) weight of each position in the gradient of E; given whenever grad_rows is
    grad_rows: Tensor | None,  # (V, D) the gradient of E is added here
) -> ChunkTerms:
    e, target = embeddings.rows, embeddings.rows[labels]
    if solver.name != "krylov":
        return _solve_dense(solver, q, labels, e, want_gradient, row_weight, grad_rows)

    if solver.top_k is None:
        result = quadrature(VocabularyOperator(q, e), target, solver.steps)
        base = forms(result.rows, result.derivative) if want_gradient else None
        terms = ChunkTerms(result.value, base, None, None, None)
        if grad_rows is not None and row_weight is not None:
            weighted = -2 * row_weight[:, None] * q
            moved = torch.bmm(result.derivative, result.basis)  # (C, K, D): rows of (V_K M)^T
            for k in range(moved.shape[1]):
                grad_rows.addmm_((weighted * result.rows[:, k]).T, moved[:, k])
    else:
        ids = q.topk(solver.top_k, dim=-1, sorted=True).indices
        missing = ~(ids == labels[:, None]).any(-1)
        ids[:, -1] = torch.where(missing, labels, ids[:, -1])  # the target belongs to the head
        q_head = q.gather(1, ids)
        assert embeddings.tail_moment is not None
        assert embeddings.nonzero is not None
        operator = HeadTailOperator(q_head, e[ids], embeddings.tail_moment, embeddings.nonzero)
        result = quadrature(operator, target, solver.steps)
        at_ids, base = operator.gradient_in_q(result) if want_gradient else (None, None)
        terms = ChunkTerms(result.value, base, ids, at_ids, q_head)
        if grad_rows is not None and row_weight is not None:
            moved = torch.bmm(result.derivative, result.basis)
            head_rows = result.rows[..., : solver.top_k]
            per_token = torch.bmm((-2 * row_weight[:, None, None] * q_head.unsqueeze(1) * head_rows).mT, moved)  # (C, S, D)
            grad_rows.index_add_(0, ids.flatten(), per_token.flatten(0, 1))
    if grad_rows is not None and row_weight is not None:
        on_target = torch.bmm(result.log_column.unsqueeze(1), result.basis).squeeze(1)
        grad_rows.index_add_(0, labels, -2 * row_weight[:, None] * on_target)
    return terms


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
    broken = ~torch.isfinite(q).all(-1)  # eigh refuses NaN; such a position gets a NaN value, for the trainer's guard to name
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
        base = None
        if want_gradient:
            (base,) = torch.autograd.grad(value.sum(), q, retain_graph=grad_rows is not None)
        if grad_rows is not None:
            (gradient,) = torch.autograd.grad(value, e, row_weight)
            grad_rows.add_(gradient)
    return ChunkTerms(torch.where(broken, torch.nan, value.detach()), base, None, None, None)


def add_logit_gradient_(
    grad: Tensor,  # (C, V), updated in place
    q: Tensor,  # (C, V)
    terms: ChunkTerms,
    scale: float,
) -> None:
    """grad += scale * q o (g - sum_i q_i g_i), the chain rule through the softmax."""
    assert terms.base is not None  # the solver was asked for a gradient
    if terms.ids is None or terms.at_ids is None or terms.q_ids is None:
        mean = (q * terms.base).sum(-1, keepdim=True)
        grad.addcmul_(q, terms.base - mean, value=scale)
        return
    correction = terms.q_ids * (terms.at_ids - terms.base)  # relative to the shared tail gradient
    mean = terms.base + correction.sum(-1, keepdim=True)
    grad.addcmul_(q, terms.base - mean, value=scale)
    grad.scatter_add_(1, terms.ids, scale * correction)
