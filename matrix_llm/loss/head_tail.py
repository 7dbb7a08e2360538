"""MCE without a product over the vocabulary: the likeliest tokens exactly, the rest through its second moments.

    Q = sum_{j in S} q_j e_j e_j^T  +  U B U^T  +  c (I - U U^T)

S      the likeliest tokens and the target, each with its own vector
U      p directions of R^D in which the vocabulary's vectors vary most (from the weight alone, once an optimizer step)
B      sum_{j not in S} q_j (U^T e_j) (U^T e_j)^T: this position's own tail, exact within U
c      (sum_{j not in S} q_j |e_j|^2 - tr B) / (D - p): what is left of the tail's mass, spread evenly over the other directions

B and the tail's mass are one product of the probabilities with the (V, p (p + 1) / 2 + 1) products of coordinates, so the
price beside cross-entropy's own three products is p (p + 1) / (6 H) of them. Q is PSD with the true trace, dominates
q_y e_y e_y^T (hence MCE <= CE), depends on this position alone, and is the true Q where S holds the vocabulary or p = D.

All that follows lives in the span of the S rows and U, in coefficients: with R = [E_S; U^T] (S + p rows of R^D), the vector
v = R^T a is `a`, its products R v are G a for the Gram matrix G = R R^T, and Q v = R^T (W G a + c a) with
W = diag(q_S) + (B - c I). Lanczos (krylov.py) then costs k products with (S + p)-square matrices.

The gradient in q treats the tail's shape as a constant: g_j = -u_j^T M u_j at the head's tokens, and one mean value
-tr(M V^T Q_tail V) / (the tail's mass) at all others.

Legend: C positions, V vocabulary, D embedding width, S head tokens, p directions, n = S + p, K Lanczos steps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrix_llm.information import outside_autocast
from matrix_llm.loss.krylov import EIGENVALUE_FLOOR, forms, tridiagonal_log

DIRECTIONS = 12  # p
BASIS_ROWS = 4096  # rows of the vocabulary that U is found from
BASIS_ITERATIONS = 4
BASIS_SEED = 20240723  # one fixed start: U is equal on every rank and at every resume
GROUPS = 512  # of tokens, by id modulo GROUPS, whose largest logits lead `likeliest` to few candidates
BLOCK_ELEMENTS = 2**22  # of the gathered (C, S, D) rows at a time: they stay in cache


def kernels_for(tensor: Tensor) -> Any:
    """The Triton kernels where `tensor` is on a GPU, None elsewhere: Triton is imported here and needed nowhere else."""
    if not tensor.is_cuda:
        return None
    from matrix_llm.loss import kernels

    return kernels


class VocabularySummary(NamedTuple):
    """What the tail needs of the vocabulary, read from the weight once. Constants: no gradient flows through them."""

    inverse_norm: Tensor  # (V,) 1 / |row|, 0 for a zero row
    directions: Tensor  # (D, p) U, orthonormal columns
    coordinates: Tensor  # (V, p) U^T e_j
    features: Tensor  # (V, p (p + 1) / 2 + 1) products x_a x_b of coordinates with a <= b, then |e_j|^2 (1, or 0 for a zero row)


def inverse_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(V,) 1 / |row| in `dtype`, 0 for a row that is zero (or denormal); NaN stays NaN."""
    norm = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    doubtful = ~((norm > 1e-15) & (norm < 1e15))  # where squares overflow or vanish, and where the row is zero
    if rows.is_cuda or bool(doubtful.any()):  # no host synchronisation on a GPU
        largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=-1, dtype=dtype)
        unit = rows.to(dtype) / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
        norm = torch.where(doubtful, largest * torch.linalg.vector_norm(unit, dim=-1), norm)
    nothing = norm < 2 / torch.finfo(dtype).max  # its inverse is no number: such a row counts as zero
    return torch.where(nothing, 0.0, 1 / torch.where(nothing, 1.0, norm))


@functools.lru_cache(maxsize=4)
def _start(width: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept on the device: a copy from the host would wait for the GPU at every optimizer step."""
    generator = torch.Generator().manual_seed(BASIS_SEED)
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.randn(width, columns, generator=generator, dtype=torch.float64).to(device, dtype)


@outside_autocast  # which rounds to half precision, and CUDA has no QR of that
@torch.no_grad()
def summarise(
    source: Tensor,  # (V, D) rows of any norm
    dtype: torch.dtype,  # float32 or float64, of the result
) -> VocabularySummary:
    """U by orthogonal iteration on a stride of the vocabulary's unit rows, and the features of every row."""
    vocabulary, width = source.shape
    device = source.device
    inverse_norm = inverse_norms(source, dtype)
    if width <= DIRECTIONS:
        directions = torch.eye(width, dtype=dtype, device=device)
    else:
        stride = max(1, vocabulary // BASIS_ROWS)
        rows = source[::stride].to(dtype) * inverse_norm[::stride, None]
        directions = _start(width, min(width, 2 * DIRECTIONS), dtype, device)
        for _ in range(BASIS_ITERATIONS):
            directions = torch.linalg.qr(rows.T @ (rows @ directions)).Q  # columns in the order of their weight
        directions = directions[:, :DIRECTIONS].contiguous()
    p = directions.shape[1]
    coordinates = torch.empty(vocabulary, p, dtype=dtype, device=device)
    if source.dtype == dtype:
        torch.mm(source, directions, out=coordinates)
    else:  # half-precision rows: widened a block at a time
        block = max(1, BLOCK_ELEMENTS // width)
        for start in range(0, vocabulary, block):
            coordinates[start : start + block] = source[start : start + block].to(dtype) @ directions
    coordinates *= inverse_norm.unsqueeze(-1)
    features = torch.empty(vocabulary, p * (p + 1) // 2 + 1, dtype=dtype, device=device)
    column = 0
    for i in range(p):
        torch.mul(coordinates[:, i:], coordinates[:, i : i + 1], out=features[:, column : column + p - i])
        column += p - i
    features[:, -1] = torch.where(inverse_norm == 0, 0.0, torch.where(inverse_norm.isnan(), inverse_norm, 1.0))
    return VocabularySummary(inverse_norm, directions, coordinates, features)


def likeliest(
    logits: Tensor,  # (C, V)
    count: int,
    group_max: Tensor
    | None = None,  # (C, GROUPS) largest logit of each group's first V // GROUPS tokens, where already known
) -> tuple[Tensor, Tensor]:
    """`logits.topk(count)`, values in falling order and ids, for a small count.

    The largest `count` entries lie in the `count` groups with the largest maxima, so one cheap pass for the maxima of
    groups leaves few candidates. torch.topk alone takes several times as long on a wide row.
    """
    positions, vocabulary = logits.shape
    depth = vocabulary // GROUPS
    if depth < 2 or count > GROUPS // 4:
        return logits.topk(count)
    if group_max is None:
        group_max = logits[:, : depth * GROUPS].unflatten(1, (depth, GROUPS)).amax(1)  # token g + GROUPS * d in group g
    best = group_max.topk(count, sorted=False).indices  # (C, count)
    offsets = torch.arange(depth, device=logits.device) * GROUPS
    candidates = (best.unsqueeze(-1) + offsets).flatten(1)
    rest = torch.arange(depth * GROUPS, vocabulary, device=logits.device).expand(positions, -1)
    candidates = torch.cat([candidates, rest], dim=1)
    values, at = logits.gather(1, candidates).topk(count)
    return values, candidates.gather(1, at)


class HeadTail(NamedTuple):
    value: Tensor  # (C,) MCE
    at_ids: Tensor  # (C, S) d MCE / d q_j at the head's tokens
    tail: Tensor  # (C,) sum of q_j d MCE / d q_j over all other tokens
    row_updates: Tensor | None  # (C, S, D) d MCE / d e_j, for the head's tokens


def unpack_moments(moments: Tensor, p: int) -> Tensor:
    """(C, p (p + 1) / 2) upper triangles to (C, p, p) symmetric matrices."""
    upper = torch.triu_indices(p, p, device=moments.device)
    full = moments.new_empty(moments.shape[0], p, p)
    full[:, upper[0], upper[1]] = moments
    full[:, upper[1], upper[0]] = moments
    return full


def solve_head_tail(
    q: Tensor,  # (C, S) probabilities of the head's tokens
    ids: Tensor,  # (C, S) their ids; the target is among them
    labels: Tensor,  # (C,)
    moments: Tensor,  # (C, p (p + 1) / 2 + 1) sum over the other tokens of q_j features_j
    source: Tensor,  # (V, D) rows of any norm
    summary: VocabularySummary,
    steps: int,
    *,
    want_rows: bool = False,
) -> HeadTail:
    """MCE and its gradient for positions whose Q is the module's Q. The small problem is solved in float64."""
    kernels = None if want_rows else kernels_for(q)
    if kernels is not None and kernels.can_solve(ids.shape[1], steps, q.dtype):
        return kernels.solve_head_tail(q, ids, labels, moments, source, summary, steps)
    block = max(1, BLOCK_ELEMENTS // (ids.shape[1] * source.shape[1]))
    parts = [
        _solve_block(q[at], ids[at], labels[at], moments[at], source, summary, steps, want_rows)
        for at in (slice(start, start + block) for start in range(0, ids.shape[0], block))
    ]
    if len(parts) == 1:
        return parts[0]
    values, at_ids, tails, updates = zip(*parts, strict=True)
    return HeadTail(torch.cat(values), torch.cat(at_ids), torch.cat(tails), torch.cat(updates) if want_rows else None)


def _solve_block(
    q: Tensor,
    ids: Tensor,
    labels: Tensor,
    moments: Tensor,
    source: Tensor,
    summary: VocabularySummary,
    steps: int,
    want_rows: bool,
) -> HeadTail:
    positions, head = ids.shape
    dtype, (width, p) = q.dtype, summary.directions.shape
    n = head + p
    rows = source[ids].to(dtype)  # (C, S, D)
    rows *= summary.inverse_norm[ids].unsqueeze(-1)
    gram = torch.empty(positions, n, n, dtype=torch.float64, device=q.device)
    gram[:, :head, :head] = torch.bmm(rows, rows.mT)
    gram[:, :head, head:] = summary.coordinates[ids]
    gram[:, head:, :head] = gram[:, :head, head:].mT
    gram[:, head:, head:] = torch.eye(p, dtype=gram.dtype, device=q.device)

    q, moments = q.double(), moments.double()
    tail_moment = unpack_moments(moments[:, :-1], p)  # B
    even = torch.zeros_like(moments[:, -1])  # c; with p = D nothing is left to spread
    if p < width:
        even = ((moments[:, -1] - tail_moment.diagonal(dim1=1, dim2=2).sum(-1)) / (width - p)).clamp(min=0)
    tail_excess = tail_moment - torch.diag_embed(even.unsqueeze(-1).expand(-1, p))  # B - c I

    # Where n > D, coefficients grow along the null space of G, 0 up to rounding: |v|^2 = a^T G a is known to eps |a|^2.
    noise = 16 * torch.finfo(dtype).eps
    steps = min(steps, n)
    coefficients = gram.new_zeros(positions, steps, n)
    products = gram.new_zeros(positions, steps, n)  # G a: the coordinates of every basis vector along the head and U
    a = (ids == labels.unsqueeze(-1)).double()
    a = torch.cat([a, a.new_zeros(positions, p)], dim=1)
    u = torch.bmm(gram, a.unsqueeze(-1)).squeeze(-1)
    alive = ~((a * u).sum(-1) < 0.5)  # |e_y|^2 is 1, 0 for a zero row, or NaN, which must stay NaN
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for k in range(steps):
        coefficients[:, k], products[:, k] = a, u
        moved = torch.cat([q * u[:, :head], torch.bmm(tail_excess, u[:, head:].unsqueeze(-1)).squeeze(-1)], dim=1)
        residual = torch.addcmul(moved, even.unsqueeze(-1), a)  # Q v in coefficients
        alpha = (u * residual).sum(-1)
        alphas.append(torch.where(alive, alpha, 1.0))
        if k == steps - 1:
            break
        for _ in range(2):  # against every earlier vector, twice: rounding would let them creep back in
            overlap = torch.bmm(products[:, : k + 1], residual.unsqueeze(-1))
            residual = residual - torch.bmm(coefficients[:, : k + 1].mT, overlap).squeeze(-1)
        u = torch.bmm(gram, residual.unsqueeze(-1)).squeeze(-1)
        square = (residual * u).sum(-1)
        alive = alive & (square > noise * (residual * residual).sum(-1))
        beta = torch.where(alive, square, 0.0).sqrt()
        betas.append(beta)
        inverse = torch.where(alive, 1 / torch.where(alive, beta, 1.0), 0.0).unsqueeze(-1)
        a, u = residual * inverse, u * inverse

    value, derivative, log_column = tridiagonal_log(alphas, betas, EIGENVALUE_FLOOR[dtype])
    at_ids = forms(products[..., :head], derivative)
    along = products[..., head:]  # (C, K, p) U^T v_k
    gathered = torch.bmm(torch.bmm(along, tail_excess), along.mT)  # V^T Q_tail V, with V^T V for the even part
    gathered += even[:, None, None] * torch.bmm(coefficients, products.mT)
    tail = -(derivative * gathered).sum((1, 2))
    updates = None
    if want_rows:
        vectors = torch.cat([rows, summary.directions.T.expand(positions, -1, -1)], dim=1).double()
        basis_vectors = torch.bmm(coefficients, vectors)  # (C, K, D)
        weighted = -2 * q.unsqueeze(1) * products[..., :head]  # (C, K, S)
        updates = torch.bmm(weighted.mT, torch.bmm(derivative, basis_vectors))
        on_target = torch.bmm(log_column.unsqueeze(1), basis_vectors)  # (C, 1, D)
        updates = (updates - 2 * (ids == labels.unsqueeze(-1)).unsqueeze(-1) * on_target).to(dtype)
    return HeadTail(value.to(dtype), at_ids.to(dtype), tail.to(dtype), updates)
