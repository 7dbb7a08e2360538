"""A token loss + mce_weight * MCE from hidden states and the LM head, as an autograd function around `fused.head_pass`.

`linear_loss` is what `mce.linear_matrix_cross_entropy`, `losses.linear_token_loss` and the model's own forward
(model/lm_head.py) call. It

    1. checks the shapes and works out the solver
    2. drops the positions without a label, before the first product
    3. prepares the token vectors and the token loss, and chooses the chunk length
    4. runs the pass, and spreads the results back over all N positions

Legend: N positions, n those with a label, V vocabulary, H hidden width, D embedding width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matrix_llm.base.errors import RecipeError
from matrix_llm.loss.choice import NEEDS_NUMBERS, NEEDS_TEACHER, check_settings
from matrix_llm.loss.chunks import positions_per_chunk
from matrix_llm.loss.fused import HeadGradients, HeadOptions, head_pass
from matrix_llm.loss.positions import TrainedPositions
from matrix_llm.loss.settings import TARGET_TOKENS, LossSettings, Solver
from matrix_llm.loss.soft_targets import soft_terms, teacher_matrix_entropy
from matrix_llm.loss.solvers import Embeddings, prepare_embeddings
from matrix_llm.loss.table import count_buffers
from matrix_llm.loss.teachers import Teacher, TopTokens, check_soft_target, check_teacher, select_positions
from matrix_llm.loss.token_terms import TokenLoss, is_finite_everywhere, keeps, number_share
from matrix_llm.loss.vocabulary import VocabularySummary, inverse_norms


class TokenLossOutput(NamedTuple):
    """What `linear_token_loss` returns. Per-position fields are detached, zero where the label is ignored."""

    loss: Tensor  # () for "mean" and "sum", (N,) for "none"; carries the gradient
    cross_entropy: Tensor  # (N,) nats
    matrix_cross_entropy: Tensor  # (N,) nats
    value: Tensor  # (N,) of the chosen token loss
    entropy: Tensor  # (N,) nats, of the predicted distribution
    is_top1: Tensor  # (N,) bool: the label is the likeliest token
    floor: Tensor  # (N,) soft_ce and soft_mce: the teacher's own (matrix) entropy, below which no value falls; else 0


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
        ce, mce, value, objective, floor, entropy, is_top1, grads = head_pass(
            hidden,
            weight.to(hidden.dtype),
            bias,
            labels,
            Embeddings(vectors, summary),
            options,
            ones,
            needs if summed else (False, False, False, False),
        )
        loss = objective + options.mce_weight * mce
        ctx.options, ctx.summary, ctx.summed = options, summary, summed
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.grads = grads  # not save_for_backward: hooks that offload saved tensors would only move it back and forth
        if not summed:
            ctx.save_for_backward(hidden, weight, bias, vectors, labels)
        ctx.mark_non_differentiable(ce, mce, value, entropy, is_top1, floor)
        return (loss.sum() if summed else loss), ce, mce, value, entropy, is_top1, floor

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
    settings: LossSettings,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    embeddings: Tensor,
    softcap: float | None,
    reduction: str,
    trained: TrainedPositions | None,
) -> None:
    if settings.target == "teacher" and embeddings.requires_grad:
        raise RecipeError(
            "target='teacher' with embeddings that require grad: the gradient of MCE towards a teacher flows into the "
            "logits alone. Detach the embeddings, or set target='label'."
        )
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


TeacherLike = Teacher | TopTokens | Tensor | tuple[Tensor, ...]


def make_token_loss(
    name: str,
    given: Mapping[str, Any] | None,  # its settings, and ntl's number_ids and number_values
    labels: Tensor,  # (n,) of the trained positions
    bias: Tensor | None,  # (V,)
    embeddings: Tensor,  # (V, D)
    teacher: Teacher | TopTokens | Tensor | None,  # of the trained positions
    own_scale: float | None,  # None: for a mean over these labels
    dtype: torch.dtype,  # of the products
) -> TokenLoss:
    """The token loss with everything that it reads, but for soft_mce's solver.

    Raises:
        RecipeError: an unknown loss or setting, a value out of range, or no teacher or number tokens where one is
            needed.
    """
    # 1. settings; what ntl reads travels with them
    given = dict(given or {})
    ids, values = (given.pop(key, None) for key in ("number_ids", "number_values"))
    settings = check_settings(name, given)
    if (ids is None or values is None) and name in NEEDS_NUMBERS:
        raise RecipeError(f"{name} needs number_ids and number_values: the tokens that are numbers. Give both.")
    if teacher is None and name in NEEDS_TEACHER:
        raise RecipeError(f"{name} needs a teacher, whose distribution is its target. Give one.")

    # 2. tensors
    loss: dict[str, Any] = {"teacher": teacher}
    if name in NEEDS_NUMBERS:
        loss["number_ids"] = torch.as_tensor(ids, device=labels.device)
        loss["number_values"] = torch.as_tensor(values, device=labels.device)
        loss["own_scale"] = number_share(labels, loss["number_ids"]) if own_scale is None else own_scale
    if name in ("label_smoothing", *NEEDS_TEACHER) and bias is not None and not is_finite_everywhere(bias):
        loss["allowed"] = torch.isfinite(bias.detach())
    if name == "emo":
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = embeddings.detach()
        vectors = vectors.to(dtype) if vectors.is_cuda or vectors.dtype == torch.float64 else vectors
        loss["inverse_norm"] = inverse_norms(vectors, statistics)
        loss["vectors"] = vectors
    return TokenLoss(name, settings, **loss)


def linear_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    settings: LossSettings,  # whose `embeddings` and `embedding_grad` the caller has applied to `embeddings`
    *,
    embeddings: Tensor,  # (V, D)
    teacher: TeacherLike | None = None,
    own_scale: float | None = None,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    summary: VocabularySummary | None = None,
    trained: TrainedPositions | None = None,
) -> TokenLossOutput:
    """`losses.linear_token_loss` (which documents the arguments) with the settings of both terms in one object.

    Args:
        own_scale: factor on ntl's term. A caller who divides the sum by the trained positions of a larger batch gives
            those / the positions of that batch whose label is a number. None: 1, and for "mean" that of this batch.
    """
    # 1. checks, and the solver
    _check(settings, hidden, weight, labels, embeddings, softcap, reduction, trained)
    vocabulary_size, positions = weight.shape[0], hidden.shape[0]
    name = settings.token_loss
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
    of_teacher = _trained_teacher(teacher, name, index, positions, vocabulary_size, hidden.dtype)

    with torch.autocast(hidden.device.type, enabled=False):
        # 3. token vectors and token loss, and chunks as large as the weight's gradient, so that there are few passes
        #    over the weight
        vectors, summary = prepare_embeddings(embeddings, solver, dtype, summary)
        if own_scale is None and reduction != "mean":
            own_scale = 1.0
        token_loss = make_token_loss(
            name, settings.token_loss_settings, trained_labels, bias, embeddings, of_teacher, own_scale, hidden.dtype
        )
        if settings.target == "teacher":
            token_loss = dataclasses.replace(token_loss, target_tokens=TARGET_TOKENS)
        if name == "soft_mce" or settings.target == "teacher":
            token_loss = _with_soft_matrix(token_loss, Embeddings(vectors, summary), solver, vocabulary_size)
        per_position = (2 + count_buffers(token_loss, softcap)) * dtype.itemsize * vocabulary_size
        per_position += solver.bytes_per_position(vocabulary_size, vectors.shape[1], dtype.itemsize)
        chunk = positions_per_chunk(max(1, count), per_position, least_budget=weight.numel() * dtype.itemsize)

        # 4. the pass
        options = HeadOptions(token_loss, solver, float(settings.mce_weight), float(logit_scale), softcap, chunk, dtype)
        of_kept = name == "threshold" and reduction == "mean"  # its mean is over the positions that it keeps
        if of_kept and options.mce_weight:  # MCE's is not: one scale for both would not do
            options = _with_kept_share(
                options, trained_hidden, weight, bias, Embeddings(vectors, summary), trained_labels
            )
        summed, grad_enabled = reduction != "none", torch.is_grad_enabled()
        loss, *statistics = _LinearLoss.apply(
            trained_hidden, weight, bias, vectors, summary, trained_labels, options, summed, grad_enabled
        )
    if reduction == "mean" and of_kept and not options.mce_weight:
        loss = loss / keeps(statistics[0], token_loss.settings).sum().clamp(min=1)
    elif reduction == "mean":
        loss = loss / max(1, count)
    elif reduction == "none":
        loss = _spread(loss, index, positions)
    return TokenLossOutput(loss, *(_spread(each, index, positions) for each in statistics))


def _trained_teacher(
    teacher: TeacherLike | None,
    name: str,  # of the token loss
    index: Tensor,  # (n,) the trained positions
    positions: int,  # N
    vocabulary_size: int,
    dtype: torch.dtype,  # of the student's hidden states
) -> Teacher | TopTokens | Tensor | None:
    """The teacher at the trained positions; None for a loss that reads none."""
    if teacher is None or name not in NEEDS_TEACHER:
        return None
    checked = check_teacher(teacher, positions, vocabulary_size)
    if isinstance(checked, Teacher) and checked.hidden.dtype == torch.float32:  # as autocast does to the student's
        checked = checked._replace(hidden=checked.hidden.to(dtype))
    return checked if index.shape[0] == positions else select_positions(checked, index)


def _with_soft_matrix(loss: TokenLoss, embeddings: Embeddings, solver: Solver, vocabulary_size: int) -> TokenLoss:
    """A loss with a soft target for MCE, by MCE's token vectors and solver."""
    assert loss.teacher is not None
    if loss.name == "soft_mce":
        stored = loss.teacher.ids.shape[1] if isinstance(loss.teacher, TopTokens) else vocabulary_size
        check_soft_target(loss.settings["top_k"], stored)
    soft_matrix = functools.partial(soft_terms, embeddings=embeddings, solver=solver, want_gradient=True)
    target_entropy = functools.partial(teacher_matrix_entropy, embeddings=embeddings)
    return dataclasses.replace(loss, soft_matrix=soft_matrix, target_entropy=target_entropy)


def _with_kept_share(
    options: HeadOptions,
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    embeddings: Embeddings,
    labels: Tensor,  # (n,)
) -> HeadOptions:
    """The options of a thresholded loss whose mean is over the positions that it keeps: a pass to count them."""
    ones = torch.ones(hidden.shape[0], dtype=options.dtype, device=hidden.device)
    with torch.no_grad():
        needs = (False, False, False, False)
        ce = head_pass(hidden, weight.to(hidden.dtype), bias, labels, embeddings, options, ones, needs).cross_entropy
    kept = int(keeps(ce, options.token_loss.settings).sum())
    return options._replace(token_loss=dataclasses.replace(options.token_loss, own_scale=len(labels) / max(1, kept)))


def _spread(
    values: Tensor,  # (n,) of the positions in `index`
    index: Tensor,  # (n,)
    positions: int,
) -> Tensor:
    """(N,), zero at all other positions."""
    return torch.zeros(positions, dtype=values.dtype, device=values.device).index_copy(0, index, values)
