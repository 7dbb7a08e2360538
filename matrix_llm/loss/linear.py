"""CE + mce_weight * MCE from hidden states and the LM head's weight, as an autograd function around `fused.head_pass`.

`linear_loss` is what `mce.linear_matrix_cross_entropy` and the model's own forward (model/lm_head.py) call. It

    1. checks the shapes and works out the solver
    2. drops the positions without a label, before the first product
    3. prepares the token vectors and chooses the chunk length
    4. runs the pass, and spreads the results back over all N positions

Legend: N positions, n those with a label, V vocabulary, H hidden width, D embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matrix_llm.loss.chunks import positions_per_chunk
from matrix_llm.loss.fused import HeadGradients, HeadOptions, head_pass
from matrix_llm.loss.positions import TrainedPositions
from matrix_llm.loss.settings import LossSettings
from matrix_llm.loss.solvers import Embeddings, prepare_embeddings
from matrix_llm.loss.vocabulary import VocabularySummary


class MatrixLossOutput(NamedTuple):
    """What `linear_matrix_cross_entropy` returns. Per-position fields are detached, zero where the label is ignored."""

    loss: Tensor  # () for "mean" and "sum", (N,) for "none"; carries the gradient
    cross_entropy: Tensor  # (N,) nats
    matrix_cross_entropy: Tensor  # (N,) nats
    entropy: Tensor  # (N,) nats, of the predicted distribution
    is_top1: Tensor  # (N,) bool: the label is the likeliest token


def _graph_is_retained() -> bool:
    """Whether this backward pass may run again (retain_graph=True), so that the gradients must survive it."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class _LinearLoss(torch.autograd.Function):
    """The loss is a weighted sum over positions.

    "mean" and "sum" compute the gradient in the forward pass and scale it in the backward pass: nothing of size (N, V)
    is saved, and no product is repeated. "none" learns the positions' weights only in the backward pass, and makes a
    second pass there.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, vectors, summary, labels, options, summed, grad_enabled):
        needs = tuple(grad_enabled and n for n in ctx.needs_input_grad[:4])
        ones = torch.ones(hidden.shape[0], dtype=options.dtype, device=hidden.device)
        ce, mce, entropy, is_top1, grads = head_pass(
            hidden,
            weight.to(hidden.dtype),
            bias,
            labels,
            Embeddings(vectors, summary),
            options,
            ones,
            needs if summed else (False, False, False, False),
        )
        loss = ce + options.mce_weight * mce
        ctx.options, ctx.summary, ctx.summed = options, summary, summed
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.grads = grads  # not save_for_backward: hooks that offload saved tensors would only move it back and forth
        if not summed:
            ctx.save_for_backward(hidden, weight, bias, vectors, labels)
        ctx.mark_non_differentiable(ce, mce, entropy, is_top1)
        return (loss.sum() if summed else loss), ce, mce, entropy, is_top1

    @staticmethod
    @once_differentiable  # a second derivative is refused: it would be wrong
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        if ctx.summed:
            if ctx.grads is None:
                raise RuntimeError("backward ran twice over one loss. Pass retain_graph=True to the first backward().")
            if _graph_is_retained():
                grads = HeadGradients(*(None if g is None else g * grad_loss for g in ctx.grads))
            else:  # scaled in place and handed over, so that only one copy of the LM head's gradient exists
                grads = HeadGradients(*(None if g is None else g.mul_(grad_loss) for g in ctx.grads))
                ctx.grads = None
        else:
            hidden, weight, bias, vectors, labels = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                grads = head_pass(
                    hidden,
                    weight.to(hidden.dtype),
                    bias,
                    labels,
                    Embeddings(vectors, ctx.summary),
                    ctx.options,
                    grad_loss.to(ctx.options.dtype),
                    ctx.needs_input_grad[:4],
                ).grads
        cast = [None if g is None else g.to(d) for g, d in zip(grads[:3], ctx.dtypes, strict=True)]
        return (*cast, grads.vectors, None, None, None, None, None)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    embeddings: Tensor,
    softcap: float | None,
    reduction: str,
    trained: TrainedPositions | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: they must be (N, H) and (V, H)."
            " An empty weight means that the LM head is sharded: gather it first, as matrix_llm.model.lm_head does."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown. Use 'mean', 'sum' or 'none'.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}, but logits are divided by it. Give a positive number, or None.")
    positions, vocabulary_size = hidden.shape[0], weight.shape[0]
    if embeddings.ndim != 2 or embeddings.shape[0] != vocabulary_size:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} must be ({vocabulary_size}, D): weight has {vocabulary_size} "
            "vectors, and each is a token."
        )
    if labels.shape != (positions,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but {positions} positions need ({positions},).")
    if trained is not None and (trained.labels.shape != labels.shape or trained.vocabulary != vocabulary_size):
        raise ValueError(
            f"trained was made from {tuple(trained.labels.shape)} labels for a vocabulary of {trained.vocabulary}, but "
            f"labels are {tuple(labels.shape)} and weight has {vocabulary_size} vectors. Make it from these labels."
        )


def linear_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    settings: LossSettings,  # whose `embeddings` and `embedding_grad` the caller has applied to `embeddings`
    *,
    embeddings: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    summary: VocabularySummary | None = None,
    trained: TrainedPositions | None = None,
) -> MatrixLossOutput:
    """`mce.linear_matrix_cross_entropy` (which documents the arguments) with the settings in one object."""
    # 1. checks, and the solver
    _check(hidden, weight, labels, embeddings, softcap, reduction, trained)
    vocabulary_size, positions = weight.shape[0], hidden.shape[0]
    solver = settings.solver_for(vocabulary_size, choose_top_k=not embeddings.requires_grad)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype == torch.float32:
        hidden = hidden.to(
            torch.get_autocast_dtype(hidden.device.type)
        )  # as autocast does to the LM head's own product
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    # 2. only positions with a label
    index = (trained or TrainedPositions(labels, vocabulary_size, ignore_index)).index().to(hidden.device)
    count = index.shape[0]
    trained_hidden, trained_labels = hidden, labels.long()
    if count < positions:
        trained_hidden, trained_labels = hidden.index_select(0, index), trained_labels[index]

    with torch.autocast(hidden.device.type, enabled=False):
        # 3. token vectors, and chunks as large as the weight's gradient, so that there are few passes over the weight
        vectors, summary = prepare_embeddings(embeddings, solver, dtype, summary)
        per_position = 2 * dtype.itemsize * vocabulary_size
        per_position += solver.bytes_per_position(vocabulary_size, vectors.shape[1], dtype.itemsize)
        chunk = positions_per_chunk(max(1, count), per_position, least_budget=weight.numel() * dtype.itemsize)

        # 4. the pass
        options = HeadOptions(solver, float(settings.mce_weight), float(logit_scale), softcap, chunk, dtype)
        summed, grad_enabled = reduction != "none", torch.is_grad_enabled()
        loss, *statistics = _LinearLoss.apply(
            trained_hidden, weight, bias, vectors, summary, trained_labels, options, summed, grad_enabled
        )
    if reduction == "mean":
        loss = loss / max(1, count)
    elif reduction == "none":
        loss = _spread(loss, index, positions)
    return MatrixLossOutput(loss, *(_spread(each, index, positions) for each in statistics))


def _spread(
    values: Tensor,  # (n,) of the positions in `index`
    index: Tensor,  # (n,)
    positions: int,
) -> Tensor:
    """(N,), zero at all other positions."""
    return torch.zeros(positions, dtype=values.dtype, device=values.device).index_copy(0, index, values)
