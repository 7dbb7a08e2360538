"""Triton kernels for the loss's element-wise work and small problems; fused.py and solvers.py decide when to use them.

    logit_statistics  one read of the logits: log-sum-exp, entropy, the largest logit, the label's, and maxima of groups
    probabilities     one read of the logits, one write of q in the products' dtype
    logit_gradient    one read of the logits, one write of the gradient over q; the tail's own by one small product
    solve_head_tail   one read of the kept vectors: their Gram matrices; then one warp or a few per position for
                      Lanczos, the tridiagonal eigenproblem and its logarithm, all in registers

They compute what fused.py, head_tail.py, krylov.py and information.py compute, and the tests compare them. Nothing
here waits for the device: no value is read on the host, and the eigenproblem takes a fixed number of sweeps
(torch.linalg.eigh asks the device whether it converged). Statistics are float32 and the small problem float64, whatever
the inputs.

Legend: C positions, V vocabulary, D embedding width, S kept tokens, P directions, K Lanczos steps; n = S + P is padded
to N and K to KP, both powers of two.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from matrix_llm.loss.head_tail import HeadTail
from matrix_llm.loss.krylov import EIGENVALUE_FLOOR
from matrix_llm.loss.vocabulary import GROUPS, VocabularySummary

MOST_KEPT, MOST_STEPS = 64, 16  # beyond these the tiles no longer fit into registers
LEVELS = 4  # of GROUPS logits each: what one program holds at a time, while as many more are being loaded
BLOCK = 4096  # logits of one element-wise program

# ------------------------------------------------------------------------------------------------------ wide logits


@triton.jit(do_not_specialize_on_alignment=["labels"])
def statistics_kernel(
    z,  # (C, V)
    labels,  # (C,)
    largest,  # (C,)
    log_z,  # (C,)
    entropy,  # (C,)
    of_label,  # (C,)
    group_max,  # (C, GROUPS)
    stride,
    vocabulary,
    GROUPS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Online softmax: each slot of the tile has its own sums, and all are rescaled whenever a larger logit appears."""
    position = tl.program_id(0).to(tl.int64)
    z += position * stride
    group = tl.arange(0, GROUPS)[None, :]
    level = tl.arange(0, LEVELS)[:, None]
    depth = vocabulary // GROUPS  # of full levels: the groups exclude the remainder
    best = tl.full((LEVELS, GROUPS), float("-inf"), tl.float32)
    total = tl.zeros((LEVELS, GROUPS), tl.float32)  # sum of e^(x - top)
    moment = tl.zeros((LEVELS, GROUPS), tl.float32)  # sum of (x - top) e^(x - top)
    top = tl.max(tl.max(best, 1), 0)
    at = level * GROUPS + group
    coming = tl.load(z + at, mask=at < vocabulary, other=float("-inf"))
    for start in range(0, tl.cdiv(vocabulary, GROUPS), LEVELS):
        x = coming.to(tl.float32)
        at = (start + LEVELS + level) * GROUPS + group
        coming = tl.load(z + at, mask=at < vocabulary, other=float("-inf"))  # while this tile is summed
        best = tl.where(start + level < depth, tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL), best)
        new = tl.maximum(top, tl.max(tl.max(x, 1), 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
        shift = tl.where(top == float("-inf"), 0.0, top - base)
        ratio = tl.exp(shift)
        e = tl.exp(x - base)
        moment = (moment + shift * total) * ratio + tl.where(x == float("-inf"), 0.0, (x - base) * e)
        total = total * ratio + e
        top = new
    total_all = tl.sum(tl.sum(total, 1), 0)
    moment_all = tl.sum(tl.sum(moment, 1), 0)
    log_total = tl.log(total_all)
    defined = top > float("-inf")  # there is no distribution where all logits are -inf
    tl.store(largest + position, tl.where(total_all == total_all, top, float("nan")))
    tl.store(log_z + position, tl.where(defined, top + log_total, float("nan")))
    tl.store(entropy + position, tl.where(defined, log_total - moment_all / total_all, float("nan")))
    tl.store(of_label + position, tl.load(z + tl.load(labels + position)).to(tl.float32))
    broken = tl.max((best != best).to(tl.int32), 0) > 0  # tl.max passes over NaN
    tl.store(group_max + position * GROUPS + tl.arange(0, GROUPS), tl.where(broken, float("nan"), tl.max(best, 0)))


@triton.jit
def probabilities_kernel(z, log_z, out, stride, out_stride, vocabulary, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocabulary
    x = tl.load(z + position * stride + at, mask=inside, other=0.0).to(tl.float32)
    q = tl.exp(x - tl.load(log_z + position))
    tl.store(out + position * out_stride + at, q.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["constant", "slope"])
def gradient_kernel(
    z,  # (C, V)
    log_z,  # (C,)
    constant,  # (C,)
    slope,  # (C,)
    form,  # (C, F) in the features' dtype
    features,  # (V, F)
    out,  # (C, V)
    positions,
    vocabulary,
    stride,
    out_stride,
    form_stride,
    feature_stride,
    cap,
    scale,
    CAPPED: tl.constexpr,
    F: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """LINES positions by BLOCK tokens at a time, so that a token's features are read once for LINES positions."""
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counted, inside = line < positions, at < vocabulary
    both = counted[:, None] & inside[None, :]
    g = tl.zeros((LINES, BLOCK), tl.float32)
    for start in range(0, F, 16):
        column = start + tl.arange(0, 16)
        known = column < F
        a = tl.load(
            form + line[:, None] * form_stride + column[None, :], mask=counted[:, None] & known[None, :], other=0
        )
        b = tl.load(
            features + at[None, :].to(tl.int64) * feature_stride + column[:, None],
            mask=known[:, None] & inside[None, :],
            other=0,
        )
        g = tl.dot(a, b, g, input_precision="ieee")
    wide = line.to(tl.int64)
    x = tl.load(z + wide[:, None] * stride + at[None, :], mask=both, other=0.0).to(tl.float32)
    factor = tl.load(constant + line, mask=counted, other=0.0)[:, None]
    factor += tl.load(slope + line, mask=counted, other=0.0)[:, None] * g
    grad = tl.exp(x - tl.load(log_z + line, mask=counted, other=0.0)[:, None]) * (factor * scale)
    if CAPPED:
        grad = grad * (1.0 - (x / cap) * (x / cap))
    tl.store(out + wide[:, None] * out_stride + at[None, :], grad.to(out.dtype.element_ty), mask=both)


# -------------------------------------------------------------------------------------------------- small problems


@triton.jit(do_not_specialize_on_alignment=["kept"])
def gram_kernel(
    vectors,  # (V, D)
    inverse_norm,  # (V,)
    centre,  # (D,) float32; not read unless CENTRED
    kept,  # (C, S)
    out,  # (C, S, S) float32
    stride,
    width,
    CENTRED: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gram matrices of unit vectors. Each vector is scaled to about norm 1 by a power of two, which is exact in every
    dtype, and by the rest of 1 / |vector| after the product, so that no square overflows or underflows.
    A half-precision vector minus the mean is no longer exact in its dtype, so its products are float32."""
    position = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, TILE)
    is_kept = slot < S
    token = tl.load(kept + position * S + slot, mask=is_kept, other=0)
    inverse = tl.load(inverse_norm + token, mask=is_kept, other=0.0)
    power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # its exponent alone
    rest = tl.where(inverse == 0.0, 0.0, inverse / tl.where(power == 0.0, 1.0, power))
    start_of = vectors + token[:, None] * stride
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(start_of + column[None, :], mask=is_kept[:, None] & (column < width)[None, :], other=0.0)
        if CENTRED:
            mean = tl.load(centre + column, mask=column < width, other=0.0)
            x = (x.to(tl.float32) - mean[None, :]) * power[:, None]
        else:
            x = (x.to(tl.float32) * power[:, None]).to(vectors.dtype.element_ty)
        total = tl.dot(x, tl.trans(x), total, input_precision="ieee")
    total = total * (rest[:, None] * rest[None, :])
    at = out + position * S * S + slot[:, None] * S + slot[None, :]
    tl.store(at, total, mask=is_kept[:, None] & is_kept[None, :])


@triton.jit
def _apply(matrix, vector):
    """matrix @ vector in float64."""
    return tl.sum(matrix.to(tl.float64) * vector[None, :], 1)


@triton.jit
def _multiply(a, b, KP: tl.constexpr):
    """(KP, KP) @ (KP, any) in float64, which tl.dot has no small tile for."""
    index = tl.arange(0, KP)
    total = tl.zeros_like(b)
    for k in range(KP):
        column = tl.sum(tl.where(index[None, :] == k, a, 0.0), 1)
        line = tl.sum(tl.where(index[:, None] == k, b, 0.0), 0)
        total += column[:, None] * line[None, :]
    return total


@triton.jit
def _eigen(t, KP: tl.constexpr, SWEEPS: tl.constexpr):
    """(T in its eigenbasis, the eigenvectors in columns) of a symmetric T (KP, KP), by Jacobi's rotations.

    A round rotates KP / 2 disjoint pairs (i, i ^ m) at once; KP - 1 rounds, m = 1 .. KP - 1, sweep over all pairs.
    """
    index = tl.arange(0, KP)
    row, column = index[:, None], index[None, :]
    diagonal = row == column
    z = tl.where(diagonal, 1.0, 0.0).to(tl.float64)
    for turn in range(SWEEPS * (KP - 1)):
        m = 1 + turn % (KP - 1)
        mate_row = tl.broadcast_to(row ^ m, (KP, KP))
        mate_column = tl.broadcast_to(column ^ m, (KP, KP))
        above = tl.gather(t, mate_row, 0)  # T_{i ^ m, j}
        beside = tl.gather(t, mate_column, 1)  # T_{i, j ^ m}
        across = tl.gather(above, mate_column, 1)
        off = tl.sum(tl.where(diagonal, above + beside, 0.0), 1)  # 2 T_{i, i ^ m}, equal for both of a pair
        gap = tl.sum(tl.where(diagonal, across - t, 0.0), 1)  # opposite for both of a pair
        sign = tl.where(gap == 0.0, tl.where(index < (index ^ m), 1.0, -1.0), tl.where(gap > 0.0, 1.0, -1.0))
        size = tl.abs(gap) + tl.sqrt(gap * gap + off * off)
        tangent = tl.where(size == 0.0, 0.0, sign * off / tl.where(size == 0.0, 1.0, size))
        c = 1.0 / tl.sqrt(1.0 + tangent * tangent)
        s = -tangent * c
        c_row, c_column, s_row, s_column = c[:, None], c[None, :], s[:, None], s[None, :]
        t = (
            t * (c_row * c_column)
            + across * (s_row * s_column)
            + (beside * (c_row * s_column) + above * (s_row * c_column))
        )
        z = z * c_column + tl.gather(z, mate_column, 1) * s_column
    return t, z


@triton.jit
def _divided_differences(w_row, w_column):
    """information.log_divided_differences; the series of atanh(x) / x in place of atanh, and only where |x| < 1 / 8."""
    difference, total = w_row - w_column, w_row + w_column
    y = (difference / total) * (difference / total)
    near = y < 0.015625
    series = tl.zeros_like(y) + 1.0 / 19.0
    for odd in tl.static_range(17, 0, -2):
        series = series * y + 1.0 / odd
    return tl.where(near, 2.0 / total * series, (tl.log(w_row) - tl.log(w_column)) / tl.where(near, 1.0, difference))


@triton.jit(do_not_specialize_on_alignment=["q", "kept", "labels", "moments"])
def solve_kernel(
    gram,  # (C, S, S) of the kept unit vectors
    q,  # (C, S)
    kept,  # (C, S)
    labels,  # (C,)
    moments,  # (C, P (P + 1) / 2 + 1), positions `stride` apart
    coordinates,  # (V, P)
    value,  # (C,)
    at_kept,  # (C, S)
    tail,  # (C,)
    form,  # (C, P (P + 1) / 2 + 1)
    stride,
    width,
    S: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    KP: tl.constexpr,
    SWEEPS: tl.constexpr,
    NOISE: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """What `head_tail.solve_by_torch` does, for one position; names as there."""
    position = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, N)
    is_kept, is_direction = slot < S, (slot >= S) & (slot < S + P)
    r, c = slot[:, None], slot[None, :]
    token = tl.load(kept + position * S + slot, mask=is_kept, other=-1)
    p_r = tl.load(q + position * S + slot, mask=is_kept, other=0.0).to(tl.float64)
    kept_r, kept_c, direction_r, direction_c = (
        is_kept[:, None],
        is_kept[None, :],
        is_direction[:, None],
        is_direction[None, :],
    )
    # Symmetric to the last bit: rounding that differs above and below the diagonal disturbs Lanczos 1,000 times more.
    low, high = tl.minimum(r, c), tl.maximum(r, c)
    g = tl.load(gram + position * S * S + high * S + low, mask=kept_r & kept_c, other=0.0)
    g += tl.load(coordinates + token[:, None] * P + (c - S), mask=kept_r & direction_c, other=0.0)
    g += tl.load(coordinates + token[None, :] * P + (r - S), mask=direction_r & kept_c, other=0.0)
    g += tl.where((r == c) & direction_r, 1.0, 0.0)
    moments += position * stride
    b = tl.load(
        moments + (low - S) * (2 * P - (low - S) + 1) // 2 + high - low, mask=direction_r & direction_c, other=0.0
    )
    mass = tl.load(moments + P * (P + 1) // 2).to(tl.float64)
    trace = tl.sum(tl.sum(tl.where(r == c, b, 0.0).to(tl.float64), 1), 0)
    even = (mass - trace) / tl.maximum(width - P, 1).to(tl.float64)  # c; with P = D nothing is left to spread
    even = tl.where((width == P) | (even < 0.0), 0.0, even)

    k_index = tl.arange(0, KP)
    coefficients = tl.zeros((KP, N), tl.float64)
    products = tl.zeros((KP, N), tl.float64)  # G a
    spread = tl.zeros((KP, N), tl.float64)  # Q_tail v in coefficients
    alphas = tl.full((KP,), 1.0, tl.float64)
    betas = tl.zeros((KP,), tl.float64)
    a = tl.where(is_kept & (token == tl.load(labels + position)), 1.0, 0.0).to(tl.float64)
    u = _apply(g, a)
    alive = tl.where(tl.sum(a * u, 0) < 0.5, 0, 1)  # NaN stays alive, and must stay NaN
    for k in range(K):
        here = k_index == k
        shared = _apply(b, u) + even * (a - tl.where(is_direction, u, 0.0))
        coefficients = tl.where(here[:, None], a[None, :], coefficients)
        products = tl.where(here[:, None], u[None, :], products)
        spread = tl.where(here[:, None], shared[None, :], spread)
        residual = p_r * u + shared
        alphas = tl.where(here & (alive > 0), tl.sum(u * residual, 0), alphas)
        for _ in range(2):  # against all earlier vectors, and once more: rounding lets them creep back in
            overlap = tl.sum(products * residual[None, :], 1)
            residual = residual - tl.sum(coefficients * overlap[:, None], 0)
        u = _apply(g, residual)
        square = tl.sum(residual * u, 0)
        alive = tl.where(square > NOISE * tl.sum(residual * residual, 0), alive, 0)
        beta = tl.sqrt(tl.where(alive > 0, square, 0.0))
        betas = tl.where(here & (k < K - 1), beta, betas)
        inverse = tl.where(alive > 0, 1.0 / tl.where(alive > 0, beta, 1.0), 0.0)
        a, u = residual * inverse, u * inverse

    row, column = k_index[:, None], k_index[None, :]
    t = tl.where(row == column, alphas[:, None], 0.0)
    t += tl.where(column == row + 1, betas[:, None], 0.0) + tl.where(row == column + 1, betas[None, :], 0.0)
    broken = tl.max(tl.max(tl.where(tl.abs(t) < float("inf"), 0, 1), 1), 0) > 0
    t = tl.where(broken, tl.where(row == column, 1.0, 0.0).to(tl.float64), t)
    t, z = _eigen(t, KP, SWEEPS)
    w_row = tl.maximum(tl.sum(tl.where(row == column, t, 0.0), 1), FLOOR)[:, None]
    w_column = tl.maximum(tl.sum(tl.where(row == column, t, 0.0), 0), FLOOR)[None, :]
    first = tl.sum(tl.where(row == 0, z, 0.0), 0)  # e_1 in the eigenbasis
    minus_log = -tl.sum(tl.sum(tl.where(row == 0, z * z * tl.log(w_column), 0.0), 1), 0)
    tl.store(value + position, tl.where(broken, float("nan"), minus_log).to(tl.float32))
    kernel = _divided_differences(w_row, w_column) * first[:, None] * first[None, :]
    derivative = _multiply(_multiply(z, kernel, KP), tl.trans(z), KP)  # M
    moved = _multiply(derivative, products, KP)
    tl.store(at_kept + position * S + slot, -tl.sum(moved * products, 0).to(tl.float32), mask=is_kept)
    tl.store(tail + position, -tl.sum(tl.sum(moved * spread, 1), 0).to(tl.float32))

    # A^T M A at [S:, S:] of an (N, N) tile, r, and the form
    inner = tl.zeros((N, N), tl.float64)
    outside = tl.sum(tl.sum(moved * coefficients, 1), 0)  # tr(M V^T V), of which tr(M A A^T) is taken below
    for k in range(KP):
        here = (k_index == k)[:, None]
        a_k, moved_k = tl.sum(tl.where(here, products, 0.0), 0), tl.sum(tl.where(here, moved, 0.0), 0)
        inner += a_k[:, None] * moved_k[None, :]
    diagonal = (r == c) & direction_r
    outside -= tl.sum(tl.sum(tl.where(diagonal, inner, 0.0), 1), 0)
    rest = tl.where(width == P, 0.0, outside / tl.maximum(width - P, 1).to(tl.float64))
    form += position * (P * (P + 1) // 2 + 1)
    value_at = tl.where(r == c, rest - inner, -2.0 * inner)
    at = form + (r - S) * (2 * P - (r - S) + 1) // 2 + c - r
    tl.store(at, value_at.to(tl.float32), mask=direction_r & direction_c & (r <= c))
    tl.store(form + P * (P + 1) // 2, -rest.to(tl.float32))


# -------------------------------------------------------------------------------------------------------- wrappers


class LogitStatistics(NamedTuple):
    """Statistics of each position's logits, in float32. NaN where they contain NaN or +inf, or only -inf."""

    largest: Tensor  # (C,) the largest logit
    log_z: Tensor  # (C,) log sum exp
    entropy: Tensor  # (C,) nats
    of_label: Tensor  # (C,) the label's logit
    group_max: Tensor  # (C, GROUPS) maxima of groups, for vocabulary.find_likeliest


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current device, which may be another one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def logit_statistics(
    z: Tensor,  # (C, V) each position contiguous
    labels: Tensor,  # (C,)
) -> LogitStatistics:
    """One read of the logits."""
    positions, vocabulary = z.shape
    largest, log_z, entropy, of_label = (torch.empty(positions, dtype=torch.float32, device=z.device) for _ in range(4))
    group_max = torch.empty(positions, GROUPS, dtype=torch.float32, device=z.device)
    with _device_of(z):
        statistics_kernel[(positions,)](
            z, labels.contiguous(), largest, log_z, entropy, of_label, group_max, z.stride(0), vocabulary,
            GROUPS=GROUPS, LEVELS=LEVELS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return LogitStatistics(largest, log_z, entropy, of_label, group_max)


def probabilities(
    z: Tensor,  # (C, V) each position contiguous
    log_z: Tensor,  # (C,)
    out: Tensor,  # (C, V) of any float dtype
) -> None:
    """out = exp(z - log_z), rounded once."""
    positions, vocabulary = z.shape
    with _device_of(z):
        probabilities_kernel[(positions, triton.cdiv(vocabulary, BLOCK))](
            z, log_z, out, z.stride(0), out.stride(0), vocabulary, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True
        )


def gradient_tiles(columns: int) -> dict[str, Any]:
    return {"F": columns, "LINES": 64, "BLOCK": 128, "num_warps": 8}


def logit_gradient(
    z: Tensor,  # (C, V) after scale and cap; each position contiguous
    log_z: Tensor,  # (C,)
    constant: Tensor,  # (C, 1)
    form: Tensor,  # (C, F), or fewer columns than the features', whose others are zero
    features: Tensor,  # (V, F) in the products' dtype
    out: Tensor,  # (C, V) of any float dtype
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """out = (constant + form features^T) exp(z - log_z), through cap and scale, rounded once.

    Each position's form is scaled to a largest element of 1 before it is rounded to the features' dtype: derivatives
    of unlikely targets exceed float16.
    """
    positions, vocabulary = z.shape
    largest = form.abs().amax(1, keepdim=True)
    form = (form / torch.where(largest > 0, largest, 1.0)).to(features.dtype)
    tiles = gradient_tiles(form.shape[1])
    with _device_of(z):
        gradient_kernel[(triton.cdiv(vocabulary, tiles["BLOCK"]), triton.cdiv(positions, tiles["LINES"]))](
            z, log_z, constant.contiguous(), largest, form, features, out, positions, vocabulary,
            z.stride(0), out.stride(0), form.stride(0), features.stride(0), float(softcap or 1.0), float(logit_scale),
            CAPPED=softcap is not None, **tiles, enable_fp_fusion=True,
        )  # fmt: skip


def can_solve(size: int, steps: int, dtype: torch.dtype) -> bool:
    """Whether `solve_head_tail` can handle this many kept tokens and steps; the torch path handles any."""
    return dtype == torch.float32 and size <= MOST_KEPT and steps <= MOST_STEPS


def gram_tiles(size: int, width: int) -> dict[str, int]:
    tile = _power_of_two(size, 16)
    return {"S": size, "TILE": tile, "BLOCK": min(2048 // tile, _power_of_two(width, 16)), "num_warps": 4}


def solve_tiles(size: int, p: int, steps: int) -> dict[str, Any]:
    """Sizes of `solve_kernel`'s tiles, and at least one more Jacobi sweep than any spectrum was seen to need."""
    n, kp = _power_of_two(size + p, 16), _power_of_two(steps, 2)
    return {
        "S": size, "P": p, "K": steps, "N": n, "KP": kp, "SWEEPS": 2 * kp.bit_length() - 1,
        "NOISE": 16 * torch.finfo(torch.float32).eps, "FLOOR": EIGENVALUE_FLOOR[torch.float32],
        "num_warps": min(8, max(n * n // 1024, kp * n // 256, 1)),
    }  # fmt: skip


def solve_head_tail(
    q: Tensor,  # (C, S) float32
    kept: Tensor,  # (C, S)
    labels: Tensor,  # (C,)
    moments: Tensor,  # (C, p (p + 1) / 2 + 1) float32
    vectors: Tensor,  # (V, D) of any norm
    summary: VocabularySummary,
    steps: int,
) -> HeadTail:
    """`head_tail.solve_by_torch`, without the derivatives at the vectors."""
    (positions, size), (width, p) = kept.shape, summary.directions.shape
    kept, q, labels, vectors = (x.contiguous() for x in (kept, q, labels, vectors))
    gram = torch.empty(positions, size, size, dtype=torch.float32, device=q.device)
    value, tail = (torch.empty(positions, dtype=torch.float32, device=q.device) for _ in range(2))
    at_kept = torch.empty_like(q)
    form = torch.empty(positions, p * (p + 1) // 2 + 1, dtype=torch.float32, device=q.device)
    with _device_of(q):
        gram_kernel[(positions,)](
            vectors,
            summary.inverse_norm,
            summary.inverse_norm if summary.centre is None else summary.centre,
            kept,
            gram,
            vectors.stride(0),
            width,
            CENTRED=summary.centre is not None,
            **gram_tiles(size, width),
            enable_fp_fusion=True,
        )
        solve_kernel[(positions,)](
            gram, q, kept, labels, moments, summary.coordinates, value, at_kept, tail, form, moments.stride(0), width,
            **solve_tiles(size, p, min(steps, size + p)), enable_fp_fusion=True,
        )  # fmt: skip
    return HeadTail(value, at_kept, tail, form, None)
