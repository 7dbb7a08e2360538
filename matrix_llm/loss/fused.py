"""The LM head, the loss and their gradients in one pass over chunks of positions; the (N, V) logits are never whole.

    1. logits = hidden W^T (+ bias), scaled and soft-capped as the model does
    2. softmax -> q, CE, entropy, top-1
    3. the solver: MCE and its gradient in q
    4. the logits' gradient, through softmax, cap and scale, in place of q
    5. gradients of hidden, weight (accumulated in float32), bias

Steps 2 to 4 are `_by_torch` or, on a GPU and for the split into head and tail, `_by_kernels`: then a chunk's logits (float32) are read
three times and written once, and q and the gradient share one buffer in the products' own dtype.

Legend: N positions, C positions of one chunk, V vocabulary, H hidden width, D embedding width, S head tokens, K steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrix_llm.loss import head_tail
from matrix_llm.loss.head_tail import likeliest
from matrix_llm.loss.solvers import Embeddings, Solver, head_tail_terms, logit_gradient_, solve_chunk, with_target

ADDS_WIDE = torch.__version__ >= "2.10"  # addmm of half-precision factors to a float32 sum (pytorch/pytorch#167931)


class HeadOptions(NamedTuple):
    solver: Solver
    mce_weight: float
    logit_scale: float
    softcap: float | None
    chunk: int
    dtype: torch.dtype


class HeadGradients(NamedTuple):
    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)
    rows: Tensor | None  # (V, D)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b; half-precision products accumulate in float32, and stay in it where `out` is float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_mm(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b where it is the `first`, accumulated in the dtype of `total`."""
    if a.dtype != total.dtype and not a.is_cuda:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if first:
        _mm(a, b, out=total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif ADDS_WIDE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


class ChunkResult(NamedTuple):
    """Of one chunk of positions."""

    cross_entropy: Tensor  # (C,)
    matrix_cross_entropy: Tensor  # (C,)
    entropy: Tensor  # (C,)
    is_top1: Tensor  # (C,) bool
    grad: Tensor | None  # (C, V) the logits' gradient, before cap and scale, in q's buffer


def _by_torch(
    z: Tensor,  # (C, V) logits; overwritten
    labels: Tensor,  # (C,)
    q: Tensor,  # (C, V) buffer of the same dtype
    weight: Tensor,  # (C, 1) d(objective) / d(loss of a position)
    embeddings: Embeddings,
    options: HeadOptions,
    want_logits: bool,
    grad_rows: Tensor | None,
    biased: bool,
) -> ChunkResult:
    solver, cap = options.solver, options.softcap
    if solver.top_k is not None:
        largest, ids = likeliest(z, solver.top_k)
        largest = largest[:, 0]
    else:
        largest, ids = z.amax(-1), None
    of_label = z.gather(1, labels[:, None]).squeeze(1)
    torch.softmax(z, dim=-1, out=q)
    log_z = largest - q.amax(-1).log() if ids is None else largest - q.gather(1, ids[:, :1]).squeeze(1).log()
    if biased:
        z.clamp_(min=torch.finfo(z.dtype).min)  # a bias of -inf removes a token: 0 * -inf would be NaN
    entropy = log_z - (z.mul_(q) if cap is None else z * q).sum(-1)  # from here on z is only the cap's
    terms = solve_chunk(
        solver,
        q,
        labels,
        embeddings,
        ids=ids,
        want_gradient=want_logits,
        row_weight=weight.squeeze(1) * options.mce_weight,
        grad_rows=grad_rows,
    )
    grad = None
    if want_logits:
        grad = logit_gradient_(q, terms, weight, weight * options.mce_weight)
        grad.scatter_add_(1, labels[:, None], -weight)
        if cap is not None:
            grad *= 1 - (z / cap).square_()
        if options.logit_scale != 1.0:
            grad *= options.logit_scale
    return ChunkResult(log_z - of_label, terms.value, entropy, of_label >= largest, grad)


def _by_kernels(
    z: Tensor,  # (C, V) logits, float32
    labels: Tensor,  # (C,)
    q: Tensor,  # (C, V) buffer in the products' dtype
    weight: Tensor,  # (C, 1) d(objective) / d(loss of a position)
    features: Tensor,  # (V, p (p + 1) / 2 + 1 or more) the summary's, in the products' dtype
    embeddings: Embeddings,
    options: HeadOptions,
    want_logits: bool,
    kernels: Any,
) -> ChunkResult:
    """The head's entries of q and of the gradient come from the logits in float32; all others are rounded once, where written."""
    solver, cap, summary = options.solver, options.softcap, embeddings.summary
    assert solver.top_k is not None
    assert summary is not None
    statistics = kernels.row_statistics(z, labels)
    log_z, of_label = statistics.log_z, statistics.of_label
    ids = with_target(likeliest(z, solver.top_k, statistics.group_max)[1], labels)
    z_ids = z.gather(1, ids)
    q_ids = (z_ids - log_z[:, None]).exp_()
    kernels.probabilities(z, log_z, q)
    q.scatter_(1, ids, 0.0)
    moments = z.new_empty(z.shape[0], features.shape[1])
    _mm(q, features, out=moments)
    terms = head_tail_terms(solver, q_ids, ids, labels, moments[:, : summary.features.shape[1]], embeddings)
    grad = None
    if want_logits:
        assert terms.g is not None
        assert terms.mean is not None
        assert terms.at_ids is not None
        mce_weight = weight * options.mce_weight
        kernels.logit_gradient(
            z, log_z, weight + mce_weight * (terms.g - terms.mean), q, softcap=cap, logit_scale=options.logit_scale
        )
        at_ids = q_ids * (weight + mce_weight * (terms.at_ids - terms.mean)) - weight * (ids == labels[:, None])
        if cap is not None:
            at_ids *= 1 - (z_ids / cap).square_()
        grad = q.scatter_(1, ids, (at_ids * options.logit_scale).to(q.dtype))
    return ChunkResult(log_z - of_label, terms.value, statistics.entropy, of_label >= statistics.largest, grad)


def _features(embeddings: Embeddings, dtype: torch.dtype) -> Tensor:
    """The summary's features for a product in `dtype`; in half precision with zero columns up to a multiple of 8, which tensor cores
    want."""
    assert embeddings.summary is not None
    features = embeddings.summary.features
    if features.dtype == dtype:
        return features
    rows, columns = features.shape
    padded = torch.zeros(rows, columns + -columns % 8, dtype=dtype, device=features.device)
    padded[:, :columns] = features
    return padded


def head_pass(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), dtype of hidden
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    embeddings: Embeddings,
    options: HeadOptions,
    row_weight: Tensor,  # (N,) d(objective) / d(loss of position n)
    needs: tuple[bool, bool, bool, bool],  # gradients of hidden, weight, bias, rows
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradients]:
    """CE, MCE, entropy, top-1, each (N,), and the gradients."""
    dtype, scale, cap = options.dtype, options.logit_scale, options.softcap
    positions, vocabulary = hidden.shape[0], weight.shape[0]
    device = hidden.device
    ce, mce, entropy = (torch.empty(positions, dtype=dtype, device=device) for _ in range(3))
    top1 = torch.empty(positions, dtype=torch.bool, device=device)
    grads = HeadGradients(
        torch.empty_like(hidden) if needs[0] else None,
        torch.empty(weight.shape, dtype=dtype, device=device) if needs[1] else None,
        torch.zeros(vocabulary, dtype=dtype, device=device) if needs[2] else None,
        torch.zeros_like(embeddings.rows) if needs[3] else None,
    )
    want_logits = any(needs[:3])
    kernels = None
    if options.solver.top_k is not None and dtype == torch.float32 and not needs[3]:
        kernels = head_tail.kernels_for(hidden)
    features = None if kernels is None else _features(embeddings, hidden.dtype)
    rows = min(options.chunk, positions)
    z_buffer = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    q_buffer = torch.empty(rows, vocabulary, dtype=dtype if kernels is None else hidden.dtype, device=device)
    for start in range(0, positions, options.chunk):
        part = slice(start, start + options.chunk)
        h, y, w = hidden[part], labels[part], row_weight[part, None]
        z, q = z_buffer[: len(y)], q_buffer[: len(y)]
        _mm(h, weight.T, out=z)
        if bias is not None:
            z += bias
        if scale != 1.0:
            z *= scale
        if cap is not None:
            z.div_(cap).tanh_().mul_(cap)
        if features is None:
            chunk = _by_torch(z, y, q, w, embeddings, options, want_logits, grads.rows, bias is not None)
        else:
            chunk = _by_kernels(z, y, q, w, features, embeddings, options, want_logits, kernels)
        ce[part], mce[part], entropy[part], top1[part] = chunk[:4]
        if chunk.grad is None:
            continue
        if grads.bias is not None:
            grads.bias.add_(chunk.grad.sum(0, dtype=dtype))
        grad = chunk.grad.to(hidden.dtype)
        if grads.hidden is not None:
            torch.mm(grad, weight, out=grads.hidden[part])
        if grads.weight is not None:
            _add_mm(grads.weight, grad.T, h, first=start == 0)
    if grads.weight is not None and positions == 0:
        grads.weight.zero_()
    return ce, mce, entropy, top1, grads
