"""Token-level matrix cross-entropy, and its fusion with the LM head (the paper's section 7, eq. 16).

For one position with target y, predicted distribution q = softmax(logits) and unit rows e_i of the embedding matrix,

    P = e_y e_y^T     Q = sum_j q_j e_j e_j^T     MCE = -tr(P log Q) = -e_y^T log(Q) e_y
    loss = sum_k CE_k + mce_weight * sum_k MCE_k

(the constant tr Q = 1 is dropped, as in eq. 16). For every position

    -log sum_j q_j (e_j . e_y)^2  <=  MCE  <=  CE,

so MCE forgives mass on tokens whose vectors are close to the target's. Orthonormal rows give MCE = CE, equal rows 0.

How log Q is evaluated is solvers.py's matter.

Legend: N positions, C positions of one chunk, V vocabulary, H hidden width, D embedding width, S head tokens, K steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matrix_llm.loss.fused import HeadGradients, HeadOptions, head_pass
from matrix_llm.loss.head_tail import VocabularySummary
from matrix_llm.loss.solvers import Embeddings, Solver, logit_gradient_, prepare_embeddings, solve_chunk

__all__ = ["MatrixLossOutput", "linear_matrix_cross_entropy", "token_mce"]

# Working memory of one chunk of positions; the fused head takes as much as its weight's gradient where that is more, so that
# passes over the weight stay few.
CHUNK_BYTES = 256 * 2**20


def _chunk_size(positions: int, bytes_per_position: int, budget: int) -> int:
    """Chunks of even size, as few as fit the budget."""
    most = max(1, min(positions, budget // max(1, bytes_per_position)))
    return math.ceil(positions / math.ceil(positions / most))


def _check_labels(labels: Tensor, vocabulary: int, positions: int) -> None:
    if labels.ndim != 1 or labels.shape[0] != positions:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but {positions} positions need ({positions},).")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels are {labels.dtype}, but token ids are integers.")
    if labels.numel() == 0:
        return
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= vocabulary:
        wrong = int(torch.nonzero((labels < 0) | (labels >= vocabulary))[0])
        raise ValueError(
            f"label {int(labels[wrong])} at position {wrong} lies outside the vocabulary of {vocabulary}. "
            "The tokenizer may hold more tokens than the model has rows; resize the embeddings, or mask the position with ignore_index."
        )


class _TokenMCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, rows: Tensor, labels: Tensor, summary, solver: Solver, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        want_logits = ctx.needs_input_grad[0]
        embeddings = Embeddings(rows, summary)
        values, grads = [], []
        for start in range(0, logits.shape[0], chunk):
            z, y = logits[start : start + chunk].to(dtype), labels[start : start + chunk]
            q = torch.softmax(z, dim=-1)
            terms = solve_chunk(solver, q, y, embeddings, want_gradient=want_logits, row_weight=None, grad_rows=None)
            values.append(terms.value)
            if want_logits:
                grads.append(logit_gradient_(q, terms, 0.0, 1.0).to(logits.dtype))
        ctx.solver, ctx.chunk, ctx.summary = solver, chunk, summary
        ctx.save_for_backward(logits, rows, labels, torch.cat(grads) if want_logits else None)
        return torch.cat(values)

    @staticmethod
    @once_differentiable  # a second derivative is refused, not made up
    def backward(ctx, grad_value: Tensor):  # type: ignore[override]
        logits, rows, labels, grad_logits = ctx.saved_tensors
        if grad_logits is not None:
            grad_logits = (grad_logits * grad_value.unsqueeze(-1)).to(logits.dtype)
        grad_rows = None
        if ctx.needs_input_grad[1]:  # a second pass, now that the weight of each position is known
            grad_rows = torch.zeros_like(rows)
            for start in range(0, logits.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                with torch.autocast(logits.device.type, enabled=False):
                    solve_chunk(
                        ctx.solver,
                        torch.softmax(logits[part].to(rows.dtype), dim=-1),
                        labels[part],
                        Embeddings(rows, ctx.summary),
                        want_gradient=False,
                        row_weight=grad_value[part],
                        grad_rows=grad_rows,
                    )
        return grad_logits, grad_rows, None, None, None, None, None


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
        embeddings: (V, D) of any norm; rows are scaled to norm 1 inside, a zero row stays zero.
        solver: "krylov", "exact" or "taylor".
        steps: Lanczos steps, None for the measured default. "krylov" only.
        order: terms of the series. "taylor" only.
        sketch_dim: replace E by normalise(E R) with a fixed Gaussian R (D, sketch_dim); None: no sketch.
        top_k: "krylov" only: keep this many likeliest tokens (the target among them) exactly and the others through their
            second moments (head_tail.py); None, or V and more: the whole vocabulary.

    Returns:
        (N,) in nats, float32 or float64; 0 where the target's row is zero. Differentiable in logits, and in embeddings
        where they require grad (the shape of the tail counts as a constant).

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, NaN or +inf logits, unknown solver.

    >>> orthonormal = torch.eye(3, dtype=torch.float64)
    >>> token_mce(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]), orthonormal)  # = CE = log 3
    tensor([1.0986], dtype=torch.float64)
    """
    if logits.ndim != 2 or embeddings.ndim != 2 or logits.shape[1] != embeddings.shape[0]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and embeddings {tuple(embeddings.shape)} do not fit: "
            "they must be (N, V) and (V, D) with the same V."
        )
    positions, vocabulary = logits.shape
    _check_labels(labels, vocabulary, positions)
    labels = labels.long()
    bad = torch.isnan(logits) | (logits == torch.inf)
    if bad.any():
        n, v = (int(i) for i in torch.nonzero(bad)[0])
        raise ValueError(f"logits[{n}, {v}] is {logits[n, v].item()}, so there is no distribution at position {n}.")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    chosen = Solver.create(solver, vocabulary=vocabulary, steps=steps, order=order, sketch_dim=sketch_dim, top_k=top_k)
    if positions == 0:
        return (logits.sum() + embeddings.sum()).to(dtype) * torch.zeros(0, dtype=dtype, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        rows, summary = prepare_embeddings(embeddings, chosen, dtype)
        per_position = 3 * dtype.itemsize * vocabulary + chosen.bytes_per_position(
            vocabulary, rows.shape[1], dtype.itemsize
        )
        chunk = _chunk_size(positions, per_position, CHUNK_BYTES)
        return _TokenMCE.apply(logits, rows, labels, summary, chosen, chunk, dtype)


class MatrixLossOutput(NamedTuple):
    """What `linear_matrix_cross_entropy` returns. Per-position fields are detached, zero where the label is ignored."""

    loss: Tensor  # () for "mean" and "sum", (N,) for "none"; carries the gradient
    cross_entropy: Tensor  # (N,) nats
    matrix_cross_entropy: Tensor  # (N,) nats
    entropy: Tensor  # (N,) nats, of the predicted distribution
    is_top1: Tensor  # (N,) bool: the label is the likeliest token


class TrainedPositions:
    """Which positions carry a label, and whether every label is a token.

    On a GPU the counts travel to the host behind whatever runs next: make this before the backbone's forward and ask for
    `index()` after it, and the host never waits for the device.

    >>> TrainedPositions(torch.tensor([-100, 4, 1]), vocabulary=5).index()
    tensor([1, 2])
    """

    def __init__(self, labels: Tensor, vocabulary: int, ignore_index: int = -100) -> None:
        if labels.ndim != 1:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, but one label a position needs (N,).")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels are {labels.dtype}, but token ids are integers.")
        labels = labels.long()  # before any comparison: -100 is 156 among uint8
        keep = labels != ignore_index
        self.labels, self.vocabulary = labels, vocabulary
        self._wrong = keep & ((labels < 0) | (labels >= vocabulary))
        self._order = torch.argsort(~keep, stable=True)  # the kept positions first, in order
        counts = torch.stack([keep.sum(), self._wrong.sum()])
        self._event = None
        if labels.is_cuda:
            self._counts = torch.empty(2, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._counts = counts

    def index(self) -> Tensor:
        """The kept positions, (n,) int64.

        Raises:
            ValueError: a label outside the vocabulary.
        """
        if self._event is not None:
            self._event.synchronize()
        kept, wrong = self._counts.tolist()
        if wrong:
            position = int(torch.nonzero(self._wrong)[0])
            raise ValueError(
                f"label {int(self.labels[position])} at position {position} lies outside the vocabulary of {self.vocabulary}. "
                "The tokenizer may hold more tokens than the model has rows; resize the embeddings, or mask the position with ignore_index."
            )
        return self._order[:kept]


def _graph_is_kept() -> bool:
    """Whether this backward pass may run again (retain_graph=True): then the made gradients must survive it."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class _LinearMCE(torch.autograd.Function):
    """The loss is a weighted sum over positions, so "mean" and "sum" make their gradient in the forward pass and scale it
    in the backward pass; nothing of size (N, V) is saved and no product is repeated. "none" learns its weights only in
    the backward pass and takes a second pass there."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, summary, labels, options, summed, grad_enabled):
        needs = tuple(grad_enabled and n for n in ctx.needs_input_grad[:4])
        compute_weight = weight.to(hidden.dtype)
        ones = torch.ones(hidden.shape[0], dtype=options.dtype, device=hidden.device)
        ce, mce, entropy, top1, grads = head_pass(
            hidden,
            compute_weight,
            bias,
            labels,
            Embeddings(rows, summary),
            options,
            ones,
            needs if summed else (False, False, False, False),
        )
        loss = ce + options.mce_weight * mce
        ctx.options, ctx.summary, ctx.dtypes = (
            options,
            summary,
            (hidden.dtype, weight.dtype, None if bias is None else bias.dtype),
        )
        ctx.summed = summed
        ctx.made = grads  # not through save_for_backward: hooks that offload it would only move it about
        if not summed:
            ctx.save_for_backward(hidden, weight, bias, rows, labels)
        ctx.mark_non_differentiable(ce, mce, entropy, top1)
        return (loss.sum() if summed else loss), ce, mce, entropy, top1

    @staticmethod
    @once_differentiable  # a second derivative is refused, not made up
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        if ctx.summed:
            if ctx.made is None:
                raise RuntimeError("backward ran twice over one loss. Pass retain_graph=True to the first backward().")
            if _graph_is_kept():
                made = HeadGradients(*(None if g is None else g * grad_loss for g in ctx.made))
            else:  # scaled in place and handed over: the LM head's gradient exists once
                made = HeadGradients(*(None if g is None else g.mul_(grad_loss) for g in ctx.made))
                ctx.made = None
        else:
            hidden, weight, bias, rows, labels = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                made = head_pass(
                    hidden,
                    weight.to(hidden.dtype),
                    bias,
                    labels,
                    Embeddings(rows, ctx.summary),
                    ctx.options,
                    grad_loss.to(ctx.options.dtype),
                    ctx.needs_input_grad[:4],
                )[-1]
        cast = [None if g is None else g.to(d) for g, d in zip(made[:3], ctx.dtypes, strict=True)]
        return (*cast, made[3], None, None, None, None, None)


@torch.compiler.disable
def linear_matrix_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    embeddings: Tensor | None = None,
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
    """CE + mce_weight * MCE straight from hidden states, never holding the (N, V) logits whole.

    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap), or without the cap where softcap is None.

    Args:
        hidden: (N, H) float64, float32, bfloat16 or float16. Statistics are float32 (float64 for float64 input), and
            half-precision products accumulate in float32.
        weight: (V, H) the LM head; cast to hidden's dtype for the products (float32 master weights under autocast).
        labels: (N,) integers in [0, V), or ignore_index; ignored positions are dropped before the first product.
        bias: (V,) shifts the logits; it is no part of e_i.
        embeddings: (V, D) the vectors e_i, of any norm; None: the LM head's rows, detached. Give `weight` itself to let
            gradients through (beware: MCE is 0 where all rows are equal, so that rewards collapse).
        mce_weight: 0 leaves plain cross-entropy; MCE is still measured.
        solver, steps, order, sketch_dim, top_k: see `token_mce`; but top_k=None, with no sketch and detached embeddings, is
            the measured default: the whole vocabulary up to 1,024 tokens, 16 exact tokens and the tail's moments above.
            Ask for the whole vocabulary with top_k=V.
        summary: `head_tail.summarise` of the embeddings, to use it for several micro-batches of one optimizer step.
        trained: `TrainedPositions` of the labels, made early so that the host need not wait for a GPU.
        reduction: "mean" over the positions that count, "sum", or "none".

    Returns:
        `MatrixLossOutput`. With every label ignored the loss is a zero still connected to the graph.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, unknown solver or reduction.

    >>> h, w = torch.zeros(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    >>> linear_matrix_cross_entropy(h, w, torch.tensor([0, -100])).loss  # CE + MCE = 2 log 3: orthonormal rows
    tensor(2.1972, dtype=torch.float64)
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: they must be (N, H) and (V, H). "
            "An empty weight means that the head is sharded and must be gathered first (matrix_llm.model.lm_head does that)."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown. Use 'mean', 'sum' or 'none'.")
    if not (math.isfinite(mce_weight) and mce_weight >= 0):
        raise ValueError(f"mce_weight={mce_weight}, but the weight of a loss term is a finite number of at least 0.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}, but logits are divided by it: give a positive number, or None.")
    vocabulary, positions = weight.shape[0], hidden.shape[0]
    source = weight.detach() if embeddings is None else embeddings
    if source.ndim != 2 or source.shape[0] != vocabulary:
        raise ValueError(
            f"embeddings {tuple(source.shape)} must have one row for each of the {vocabulary} rows of weight."
        )
    if labels.shape != (positions,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but {positions} positions need ({positions},).")
    chosen = Solver.create(
        solver,
        vocabulary=vocabulary,
        steps=steps,
        order=order,
        sketch_dim=sketch_dim,
        top_k=top_k,
        fused=not source.requires_grad,
    )
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype == torch.float32:
        hidden = hidden.to(
            torch.get_autocast_dtype(hidden.device.type)
        )  # what autocast does to the LM head's own product
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if trained is not None and (trained.labels.shape != labels.shape or trained.vocabulary != vocabulary):
        raise ValueError(
            f"trained was made of {tuple(trained.labels.shape)} labels for a vocabulary of {trained.vocabulary}, but labels are "
            f"{tuple(labels.shape)} and weight has {vocabulary} rows. Make it of these labels."
        )
    index = (trained or TrainedPositions(labels, vocabulary, ignore_index)).index().to(hidden.device)
    kept_hidden, kept_labels = hidden, labels.long()
    if index.shape[0] < positions:
        kept_hidden, kept_labels = hidden.index_select(0, index), kept_labels[index]
    with torch.autocast(hidden.device.type, enabled=False):
        rows, summary = prepare_embeddings(source, chosen, dtype, summary)
        per_position = 2 * dtype.itemsize * vocabulary + chosen.bytes_per_position(
            vocabulary, rows.shape[1], dtype.itemsize
        )
        budget = max(CHUNK_BYTES, weight.numel() * dtype.itemsize)
        chunk = _chunk_size(max(1, index.shape[0]), per_position, budget)
        options = HeadOptions(chosen, float(mce_weight), float(logit_scale), softcap, chunk, dtype)
        loss, ce, mce, entropy, top1 = _LinearMCE.apply(
            kept_hidden, weight, bias, rows, summary, kept_labels, options, reduction != "none", torch.is_grad_enabled()
        )

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(positions, dtype=values.dtype, device=values.device).index_copy(0, index, values)

    if reduction == "mean":
        loss = loss / max(1, index.shape[0])
    elif reduction == "none":
        loss = spread(loss)
    return MatrixLossOutput(loss, spread(ce), spread(mce), spread(entropy), spread(top1))
