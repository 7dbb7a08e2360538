"""Token-level matrix cross-entropy, and its fusion with the LM head (the paper's section 7, eq. 16).

For one position with target y, predicted distribution q = softmax(logits) and unit token vectors e_i,

    P = e_y e_y^T     Q = sum_j q_j e_j e_j^T     MCE = -tr(P log Q) = -e_y^T log(Q) e_y
    loss = sum_k CE_k + mce_weight * sum_k MCE_k

(the constant tr Q = 1 is dropped, as in eq. 16). For every position

    -log sum_j q_j (e_j . e_y)^2  <=  MCE  <=  CE,

so MCE forgives probability on tokens whose vectors are close to the target's. Orthonormal vectors give MCE = CE, equal
vectors give 0.

The public functions and their documentation are here; the work is done in `matrix_llm.loss`, whose `__init__` says in
which order to read it.

Legend: N positions, V vocabulary, H hidden width, D embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matrix_llm.loss.chunks import CHUNK_BYTES, positions_per_chunk
from matrix_llm.loss.linear import linear_loss
from matrix_llm.loss.positions import TrainedPositions, check_integers, label_error
from matrix_llm.loss.settings import LossSettings, Solver
from matrix_llm.loss.solvers import Embeddings, logit_gradient_, prepare_embeddings, solve_chunk
from matrix_llm.loss.vocabulary import VocabularySummary

__all__ = ["CHUNK_BYTES", "MatrixLossOutput", "TrainedPositions", "linear_matrix_cross_entropy", "token_mce"]


class MatrixLossOutput(NamedTuple):
    """What `linear_matrix_cross_entropy` returns. Per-position fields are detached, zero where the label is ignored."""

    loss: Tensor  # () for "mean" and "sum", (N,) for "none"; carries the gradient
    cross_entropy: Tensor  # (N,) nats
    matrix_cross_entropy: Tensor  # (N,) nats
    entropy: Tensor  # (N,) nats, of the predicted distribution
    is_top1: Tensor  # (N,) bool: the label is the likeliest token


def _check_labels(labels: Tensor, vocabulary_size: int, positions: int) -> None:
    if labels.ndim != 1 or labels.shape[0] != positions:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but {positions} positions need ({positions},).")
    check_integers(labels)
    if labels.numel() == 0:
        return
    labels = labels.long()  # before any comparison: a vocabulary may not fit a narrow type
    if labels.min() < 0 or labels.max() >= vocabulary_size:
        wrong = int(torch.nonzero((labels < 0) | (labels >= vocabulary_size))[0])
        raise label_error(int(labels[wrong]), wrong, vocabulary_size)


class _TokenMCE(torch.autograd.Function):
    """MCE of every position, in chunks. The gradient in the logits is computed in the forward pass; the gradient in
    the embeddings needs the weight of each position, so it takes a second pass, in the backward pass."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, vectors: Tensor, labels: Tensor, summary, solver: Solver, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        want_logits = ctx.needs_input_grad[0]
        embeddings = Embeddings(vectors, summary)
        values, grads = [], []
        for start in range(0, logits.shape[0], chunk):
            z, y = logits[start : start + chunk].to(dtype), labels[start : start + chunk]
            q = torch.softmax(z, dim=-1)
            terms = solve_chunk(
                solver, q, y, embeddings, want_gradient=want_logits, position_weight=None, grad_vectors=None
            )
            values.append(terms.value)
            if want_logits:
                grads.append(logit_gradient_(q, terms, 0.0, 1.0).to(logits.dtype))
        ctx.solver, ctx.chunk, ctx.summary = solver, chunk, summary
        ctx.save_for_backward(logits, vectors, labels, torch.cat(grads) if want_logits else None)
        return torch.cat(values)

    @staticmethod
    @once_differentiable  # a second derivative is refused: it would be wrong
    def backward(ctx, grad_value: Tensor):  # type: ignore[override]
        logits, vectors, labels, grad_logits = ctx.saved_tensors
        if grad_logits is not None:
            grad_logits = (grad_logits * grad_value.unsqueeze(-1)).to(logits.dtype)
        grad_vectors = None
        if ctx.needs_input_grad[1]:
            grad_vectors = torch.zeros_like(vectors)
            for start in range(0, logits.shape[0], ctx.chunk):
                chunk = slice(start, start + ctx.chunk)
                with torch.autocast(logits.device.type, enabled=False):
                    solve_chunk(
                        ctx.solver,
                        torch.softmax(logits[chunk].to(vectors.dtype), dim=-1),
                        labels[chunk],
                        Embeddings(vectors, ctx.summary),
                        want_gradient=False,
                        position_weight=grad_value[chunk],
                        grad_vectors=grad_vectors,
                    )
        return grad_logits, grad_vectors, None, None, None, None, None


def token_mce(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    embeddings: Tensor,  # (V, D)
    *,
    solver: str = "krylov",
    steps: int | None = None,
    order: int = 4,
    sketch_dim: int | None = None,
    top_k: int | None = None,
) -> Tensor:
    """MCE_n = -e_y^T log(Q_n) e_y for each position n, with Q_n = sum_j softmax(logits_n)_j e_j e_j^T (eq. 16).

    Args:
        logits: (N, V) any float dtype; the statistics are float32, or float64 for float64 logits. -inf is allowed.
        labels: (N,) integers in [0, V).
        embeddings: (V, D) of any norm; vectors are scaled to norm 1 inside, a zero vector stays zero.
        solver: "krylov", "exact" or "taylor".
        steps: Lanczos steps of "krylov", at least 1; None: the measured default, 6.
        order: terms of "taylor", at least 1.
        sketch_dim: replace E by normalise(E R) with a fixed Gaussian R (D, sketch_dim); None: no sketch.
        top_k: "krylov" only: keep this many of the likeliest tokens exactly, the target among them, and the others
            through their second moments (head_tail.py). None, or V and more: the whole vocabulary.

    Returns:
        (N,) in nats, float32 or float64; 0 where the target's vector is zero. Differentiable in logits, and in
        embeddings where they require grad (with top_k, the vectors outside the kept tokens count as constants).

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, NaN or +inf in logits, unknown solver.
        TypeError: labels that are not integers.

    >>> orthonormal = torch.eye(3, dtype=torch.float64)
    >>> token_mce(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]), orthonormal)  # = CE = log 3
    tensor([1.0986], dtype=torch.float64)
    """
    # 1. checks
    if logits.ndim != 2 or embeddings.ndim != 2 or logits.shape[1] != embeddings.shape[0]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and embeddings {tuple(embeddings.shape)} do not fit: "
            "they must be (N, V) and (V, D) with the same V."
        )
    positions, vocabulary_size = logits.shape
    _check_labels(labels, vocabulary_size, positions)
    labels = labels.long()
    bad = torch.isnan(logits) | (logits == torch.inf)
    if bad.any():
        n, v = (int(i) for i in torch.nonzero(bad)[0])
        raise ValueError(f"logits[{n}, {v}] is {logits[n, v].item()}, so position {n} has no distribution.")
    settings = LossSettings(solver=solver, steps=steps, order=order, sketch_dim=sketch_dim, top_k=top_k)
    chosen = settings.solver_for(vocabulary_size, choose_top_k=False)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    # 2. no positions: an empty result, connected to the graph
    if positions == 0:
        return (logits.sum() + embeddings.sum()).to(dtype) * torch.zeros(0, dtype=dtype, device=logits.device)

    # 3. chunks of positions
    with torch.autocast(logits.device.type, enabled=False):
        vectors, summary = prepare_embeddings(embeddings, chosen, dtype)
        per_position = 3 * dtype.itemsize * vocabulary_size
        per_position += chosen.bytes_per_position(vocabulary_size, vectors.shape[1], dtype.itemsize)
        chunk = positions_per_chunk(positions, per_position)
        return _TokenMCE.apply(logits, vectors, labels, summary, chosen, chunk, dtype)


@torch.compiler.disable
def linear_matrix_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    embeddings: Tensor | None = None,  # (V, D)
    mce_weight: float = 1.0,
    solver: str = "krylov",
    steps: int | None = None,
    order: int = 4,
    sketch_dim: int | None = None,
    top_k: int | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    summary: VocabularySummary | None = None,
    trained: TrainedPositions | None = None,
) -> MatrixLossOutput:
    """CE + mce_weight * MCE straight from hidden states; the full (N, V) logits never exist.

    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap), or without the cap if softcap is None.

    Args:
        hidden: (N, H) float64, float32, bfloat16 or float16. Statistics are float32 (float64 for float64 input), and
            half-precision products accumulate in float32.
        weight: (V, H) of the LM head; cast to hidden's dtype for the products (float32 master weights under autocast).
        labels: (N,) integers in [0, V), or ignore_index; ignored positions are dropped before the first product.
        bias: (V,) shifts the logits; it is not part of e_i. -inf removes a token.
        embeddings: (V, D) the vectors e_i, of any norm; None: the LM head's weight, detached. Give `weight` itself to
            let gradients through (beware: MCE is 0 where all vectors are equal, so this rewards collapse).
        mce_weight: finite, at least 0. 0 leaves plain cross-entropy; MCE is still measured.
        solver, steps, order, sketch_dim, top_k: see `token_mce`. But top_k=None, without a sketch and with detached
            embeddings, is the measured default: the whole vocabulary up to 1,024 tokens, and above that 16 tokens kept
            exactly and the moments of the others. Ask for the whole vocabulary with top_k=V.
        ignore_index: the label of positions that do not count.
        logit_scale, softcap: as the model does to its logits; softcap above 0, or None.
        reduction: "mean" over the positions that count, "sum", or "none".
        summary: `loss.vocabulary.summarise` of the embeddings, to share it between the micro-batches of one optimizer
            step.
        trained: `TrainedPositions` of the labels, created early so that the host need not wait for the GPU.

    Returns:
        `MatrixLossOutput`. If every label is ignored, the loss is a zero still connected to the graph.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, unknown solver or reduction.
        TypeError: labels that are not integers.

    >>> h, w = torch.zeros(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    >>> linear_matrix_cross_entropy(h, w, torch.tensor([0, -100])).loss  # CE + MCE = 2 log 3: orthonormal vectors
    tensor(2.1972, dtype=torch.float64)
    """
    settings = LossSettings(mce_weight, solver, steps, order, sketch_dim, top_k)
    out = linear_loss(
        hidden,
        weight,
        labels,
        settings,
        embeddings=weight.detach() if embeddings is None else embeddings,
        bias=bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        reduction=reduction,
        summary=summary,
        trained=trained,
    )
    return MatrixLossOutput(out.loss, out.cross_entropy, out.matrix_cross_entropy, out.entropy, out.is_top1)
