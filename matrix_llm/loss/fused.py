"""The LM head, the loss and their gradients in one pass over chunks of positions; the full (N, V) logits never exist.

    1. logits = hidden W^T (+ bias), scaled and soft-capped as the model does
    2. softmax -> q, CE, entropy, top-1; from them the token loss and its gradient (token_terms.py)
    3. the solver: MCE and its gradient in q
    4. the logits' gradient of both, through softmax, cap and scale, in place of q
    5. gradients of hidden, weight (accumulated in float32) and bias

Steps 2 to 4 are `_chunk_by_torch`, or `_chunk_by_kernels` on a GPU with top_k and a loss whose gradient is A q - B at
the label: then a chunk's float32 logits are read three times and written once, and q and the gradient share one buffer
in the dtype of the products.

Legend: N positions, C positions of one chunk, V vocabulary, H hidden width, D embedding width, S kept tokens,
p directions. "head" is the LM head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrix_llm.loss import solvers
from matrix_llm.loss.chunks import blocks
from matrix_llm.loss.head_tail import include_target_
from matrix_llm.loss.products import add_product, multiply
from matrix_llm.loss.settings import Solver
from matrix_llm.loss.solvers import ChunkTerms, Embeddings, head_tail_terms, logit_gradient_, solve_chunk
from matrix_llm.loss.table import Buffers, loss_terms, make_buffers
from matrix_llm.loss.token_terms import Chunk, LossTerms, TokenLoss
from matrix_llm.loss.vocabulary import find_likeliest


class HeadOptions(NamedTuple):
    """Everything about the pass that is not a tensor."""

    token_loss: TokenLoss  # what MCE is added to
    solver: Solver  # how log Q is evaluated
    mce_weight: float  # finite, at least 0
    logit_scale: float  # factor on the logits
    softcap: float | None  # bound on the logits, above 0; None: no bound
    chunk: int  # positions at a time
    dtype: torch.dtype  # of the statistics: float32, or float64 for float64 hidden states


class HeadGradients(NamedTuple):
    """Gradients of the pass's inputs; None where no gradient was asked for."""

    hidden: Tensor | None  # (N, H) of the hidden states
    weight: Tensor | None  # (V, H) of the LM head's weight
    bias: Tensor | None  # (V,) of its bias
    vectors: Tensor | None  # (V, D) of the token vectors


class HeadPass(NamedTuple):
    """The result of `head_pass`."""

    cross_entropy: Tensor  # (N,) nats
    matrix_cross_entropy: Tensor  # (N,) nats
    value: Tensor  # (N,) of the token loss
    objective: Tensor  # (N,) what is trained: the value, or what ntl makes of it
    floor: Tensor  # (N,) the part of the value that no student can lower; 0 where it is not known
    entropy: Tensor  # (N,) nats, of the predicted distribution
    is_top1: Tensor  # (N,) bool: the label is the likeliest token
    grads: HeadGradients  # of sum_n position_weight_n * loss_n


class ChunkResult(NamedTuple):
    """The result for one chunk of positions."""

    cross_entropy: Tensor  # (C,) nats
    matrix_cross_entropy: Tensor  # (C,) nats
    value: Tensor  # (C,) of the token loss
    objective: Tensor  # (C,) what is trained
    floor: Tensor  # (C,) the part of the value that no student can lower
    entropy: Tensor  # (C,) nats
    is_top1: Tensor  # (C,) bool: the label is the likeliest token
    grad: Tensor | None  # (C, V) the gradient of the logits before cap and scale, in q's buffer


# ----------------------------------------------------------------------------------------------- steps 2 to 4, a chunk


def _features_in(embeddings: Embeddings, dtype: torch.dtype) -> Tensor:
    """The summary's features in `dtype`; in half precision zero-padded to a multiple of 8 columns, for tensor cores."""
    assert embeddings.summary is not None
    features = embeddings.summary.features
    if features.dtype == dtype:
        return features
    vocabulary_size, columns = features.shape
    padded = torch.zeros(vocabulary_size, columns + -columns % 8, dtype=dtype, device=features.device)
    padded[:, :columns] = features
    return padded


def _finish(
    terms: LossTerms,
    ce: Tensor,  # (C,)
    mce: Tensor,  # (C,)
    entropy: Tensor,  # (C,)
    is_top1: Tensor,  # (C,)
    grad: Tensor | None,  # (C, V)
) -> ChunkResult:
    objective = terms.value if terms.objective is None else terms.objective
    floor = torch.zeros_like(ce) if terms.floor is None else terms.floor
    return ChunkResult(ce, mce, terms.value, objective, floor, entropy, is_top1, grad)


def _scaled(weight: Tensor, coefficient: Tensor | None) -> Tensor:
    """(C, 1) weight times a coefficient of `LossTerms`, where None is 1."""
    return weight if coefficient is None else weight * coefficient[:, None]


def _expected_logit(
    z: Tensor,  # (C, V)
    q: Tensor,  # (C, V)
    biased: bool,  # some z may be -inf: 0 * -inf, of a token that is removed, would be NaN
    overwrite: bool,  # z
) -> Tensor:
    """(C,) sum_j q_j z_j."""
    parts = []
    for block in blocks(z):
        product = z[block] if overwrite else z[block].clone()
        if biased:
            product.clamp_(min=torch.finfo(z.dtype).min)
        parts.append(product.mul_(q[block]).sum(-1))
    return torch.cat(parts)


def _chunk_by_torch(
    z: Tensor,  # (C, V) logits; overwritten
    labels: Tensor,  # (C,)
    at: slice,  # the chunk's positions
    q: Tensor,  # (C, V) buffer of the same dtype
    weight: Tensor,  # (C, 1) d(objective) / d(loss of a position)
    embeddings: Embeddings,
    options: HeadOptions,
    want_logits: bool,
    grad_vectors: Tensor | None,  # (V, D) the gradient of E is added here
    buffers: Buffers,
    biased: bool,
) -> ChunkResult:
    solver, cap, token_loss = options.solver, options.softcap, options.token_loss

    # 2. softmax, statistics and the token loss
    likeliest = top = None
    count = min(max(solver.top_k or 0, token_loss.top), z.shape[1])
    if count:
        top, likeliest = find_likeliest(z, count)
        largest, likeliest, top = top[:, 0], likeliest[:, : solver.top_k], top[:, : token_loss.top]
    else:
        largest = z.amax(-1)
    of_label = z.gather(1, labels[:, None]).squeeze(1)
    torch.softmax(z, dim=-1, out=q)
    # log sum exp z = largest - log(largest probability), which saves a second pass over the logits
    q_largest = q.amax(-1) if likeliest is None else q.gather(1, likeliest[:, :1]).squeeze(1)
    log_z = largest - q_largest.log()
    entropy = log_z - _expected_logit(z, q, biased, overwrite=cap is None and not token_loss.needs_extra)
    # From here on, only the token loss and the cap need z: the loss may overwrite it where there is no cap.
    of_loss = loss_terms(Chunk(z, q, log_z, of_label, labels, top, at), token_loss, buffers)

    # 3. MCE, towards the label or the teacher's distribution
    of_target = None
    if of_loss.target is not None:
        assert token_loss.soft_matrix is not None
        mce, of_target = token_loss.soft_matrix(q, *of_loss.target)
        terms = ChunkTerms(mce, None, None)
    else:
        terms = solve_chunk(
            solver,
            q,
            labels,
            embeddings,
            likeliest=likeliest,
            want_gradient=want_logits and options.mce_weight != 0,
            position_weight=weight.squeeze(1) * options.mce_weight,
            grad_vectors=grad_vectors,
        )

    # 4. the logits' gradient
    grad = None
    if want_logits:
        grad = _gradient_by_torch(z, q, labels, weight, terms, of_loss, of_target, options)
    return _finish(of_loss, log_z - of_label, terms.value, entropy, of_label >= largest, grad)


def _gradient_by_torch(
    z: Tensor,  # (C, V) logits; overwritten
    q: Tensor,  # (C, V) as `solve_chunk` left it; overwritten
    labels: Tensor,  # (C,)
    weight: Tensor,  # (C, 1) d(objective) / d(loss of a position)
    terms: ChunkTerms,  # of MCE
    of_loss: LossTerms,
    of_target: Tensor | None,  # (C, V) the gradient of MCE in the logits, where its target is the teacher's
    options: HeadOptions,
) -> Tensor:
    """(C, V) the gradient of the logits before cap and scale, in q's buffer."""
    of_mce = weight * options.mce_weight if options.mce_weight else None
    grad = logit_gradient_(q, terms, _scaled(weight, of_loss.of_q), None if of_target is not None else of_mce)
    if of_target is not None and of_mce is not None:
        grad.addcmul_(of_target, of_mce)
    grad.scatter_add_(1, labels[:, None], -_scaled(weight, of_loss.at_label))
    if of_loss.extra is not None:
        grad.addcmul_(of_loss.extra, weight * of_loss.factor)
    if of_loss.columns is not None:
        ids, added = of_loss.columns
        grad.scatter_add_(1, ids, weight * added)
    if options.softcap is not None:
        grad *= z.div_(options.softcap).square_().neg_().add_(1)
    if options.logit_scale != 1.0:
        grad *= options.logit_scale
    return grad


def _chunk_by_kernels(
    z: Tensor,  # (C, V) logits, float32
    labels: Tensor,  # (C,)
    at: slice,  # the chunk's positions
    q: Tensor,  # (C, V) buffer in the products' dtype
    weight: Tensor,  # (C, 1) d(objective) / d(loss of a position)
    features: Tensor,  # (V, p (p + 1) / 2 + 1 or more) the summary's, in the products' dtype
    embeddings: Embeddings,
    options: HeadOptions,
    want_logits: bool,
    kernels: Any,  # the module matrix_llm.loss.kernels
) -> ChunkResult:
    """The kept tokens' q and gradient come from the float32 logits; all others are rounded once, when written."""
    solver, cap, summary, token_loss = options.solver, options.softcap, embeddings.summary, options.token_loss
    assert solver.top_k is not None
    assert summary is not None

    # 2. statistics, the token loss, and q without the kept tokens
    statistics = kernels.logit_statistics(z, labels)
    log_z, of_label = statistics.log_z, statistics.of_label
    count = min(max(solver.top_k, token_loss.top), z.shape[1])
    top, likeliest = find_likeliest(z, count, statistics.group_max)
    chunk = Chunk(z, None, log_z, of_label, labels, top[:, : token_loss.top], at)
    of_loss = loss_terms(chunk, token_loss, Buffers(None, None))
    kept = include_target_(likeliest[:, : solver.top_k].contiguous(), labels)
    z_kept = z.gather(1, kept)
    q_kept = (z_kept - log_z[:, None]).exp_()
    kernels.probabilities(z, log_z, q)
    q.scatter_(1, kept, 0.0)

    # 3. MCE
    moments = z.new_empty(z.shape[0], features.shape[1])
    multiply(q, features, out=moments)
    terms = head_tail_terms(solver, q_kept, kept, labels, moments[:, : summary.features.shape[1]], embeddings)

    # 4. the logits' gradient
    grad = None
    if want_logits:
        assert terms.mean is not None
        assert terms.kept is not None
        mce_weight, of_q = weight * options.mce_weight, _scaled(weight, of_loss.of_q)
        kernels.logit_gradient(
            z, log_z, of_q - mce_weight * terms.mean, mce_weight * terms.kept.form, features, q,
            softcap=cap, logit_scale=options.logit_scale,
        )  # fmt: skip
        at_kept = q_kept * (of_q + mce_weight * (terms.kept.at_kept - terms.mean))
        at_kept -= _scaled(weight, of_loss.at_label) * (kept == labels[:, None])
        if cap is not None:
            at_kept *= 1 - (z_kept / cap).square_()
        grad = q.scatter_(1, kept, (at_kept * options.logit_scale).to(q.dtype))
    is_top1 = of_label >= statistics.largest
    return _finish(of_loss, log_z - of_label, terms.value, statistics.entropy, is_top1, grad)


# ------------------------------------------------------------------------------------------------------------ the pass


def head_pass(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), dtype of hidden
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    embeddings: Embeddings,
    options: HeadOptions,
    position_weight: Tensor,  # (N,) d(objective) / d(loss of position n)
    needs: tuple[bool, bool, bool, bool],  # gradients of hidden, weight, bias, vectors
) -> HeadPass:
    """Loss terms of every position, and the gradients that are needed."""
    dtype, scale, cap = options.dtype, options.logit_scale, options.softcap
    positions, vocabulary_size = hidden.shape[0], weight.shape[0]
    device = hidden.device

    # results, and the two buffers that all chunks share
    ce, mce, value, objective, floor, entropy = (torch.empty(positions, dtype=dtype, device=device) for _ in range(6))
    is_top1 = torch.empty(positions, dtype=torch.bool, device=device)
    grads = HeadGradients(
        torch.empty_like(hidden) if needs[0] else None,
        torch.empty(weight.shape, dtype=dtype, device=device) if needs[1] else None,
        torch.zeros(vocabulary_size, dtype=dtype, device=device) if needs[2] else None,
        torch.zeros_like(embeddings.vectors) if needs[3] else None,
    )
    want_logits = any(needs[:3])
    kernels = None
    if (
        options.solver.top_k is not None
        and dtype == torch.float32
        and not needs[3]
        and not options.token_loss.needs_extra
    ):
        kernels = solvers.kernels_for(hidden)
    features = None if kernels is None else _features_in(embeddings, hidden.dtype)
    most = min(options.chunk, positions)
    z_buffer = torch.empty(most, vocabulary_size, dtype=dtype, device=device)
    q_buffer = torch.empty(most, vocabulary_size, dtype=dtype if kernels is None else hidden.dtype, device=device)
    buffers = make_buffers(options.token_loss, cap, z_buffer)

    for start in range(0, positions, options.chunk):
        chunk = slice(start, start + options.chunk)
        h, y, w = hidden[chunk], labels[chunk], position_weight[chunk, None]
        z, q = z_buffer[: len(y)], q_buffer[: len(y)]

        # 1. logits
        multiply(h, weight.T, out=z)
        if bias is not None:
            z += bias
        if scale != 1.0:
            z *= scale
        if cap is not None:
            z.div_(cap).tanh_().mul_(cap)

        # 2. to 4.
        if features is None:
            result = _chunk_by_torch(
                z, y, chunk, q, w, embeddings, options, want_logits, grads.vectors, buffers, bias is not None
            )
        else:
            result = _chunk_by_kernels(z, y, chunk, q, w, features, embeddings, options, want_logits, kernels)
        ce[chunk], mce[chunk], value[chunk], objective[chunk], floor[chunk], entropy[chunk] = result[:6]
        is_top1[chunk] = result.is_top1

        # 5. gradients of hidden, weight and bias
        if result.grad is None:
            continue
        if grads.bias is not None:
            grads.bias.add_(result.grad.sum(0, dtype=dtype))
        grad = result.grad.to(hidden.dtype)
        if grads.hidden is not None:
            torch.mm(grad, weight, out=grads.hidden[chunk])
        if grads.weight is not None:
            add_product(grads.weight, grad.T, h, first=start == 0)
    if grads.weight is not None and positions == 0:
        grads.weight.zero_()
    return HeadPass(ce, mce, value, objective, floor, entropy, is_top1, grads)
