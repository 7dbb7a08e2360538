"""Polynomials of a matrix with few products: the Taylor series of the logarithm (theorem A.1) and its trace.

The chain C, C^2, C^3, ... costs one product for each power. Here the highest power computed is C^half, half of the
degree:
- a polynomial of degree 2 half is low(C) + C^half high(C), which takes one more product;
- a trace does not need that product: tr(C^i C^j) = <C^i, (C^j)^T> is a sum over entries, so order 4 computes C^2 alone;
- the gradient of such a trace, sum_k k a_k (C^T)^(k-1), takes one more product, where autograd would make two.

The slow reference is `matrix_llm.information.matrix_log(..., method="taylor")`. Legend: n matrix size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matrix_llm.base.errors import RecipeError

__all__ = ["gram", "log_series", "polynomial", "trace_of_powers"]


def log_series(order: int, shift: float = 0.0) -> list[float]:
    """Coefficients a_0 to a_order of log(1 + shift + x) as a polynomial in x, by theorem A.1 about 1:

    sum_k a_k x^k = sum_{j=1}^{order} (-1)^(j+1) / j (x + shift)^j
    """
    if order < 1:
        raise RecipeError(f"order={order}, but the Taylor series of the logarithm starts at order 1.")
    terms = range(1, order + 1)
    return [
        sum((-1) ** (j + 1) / j * math.comb(j, k) * shift ** (j - k) for j in terms if j >= k) for k in range(order + 1)
    ]


def _powers(c: Tensor, highest: int) -> list[Tensor]:
    """[C, C^2, ..., C^highest]"""
    powers = [c]
    while len(powers) < highest:
        powers.append(powers[-1] @ c)
    return powers


def _weighted(constant: float, weights: Sequence[float], powers: Sequence[Tensor]) -> Tensor:
    """constant I + sum_i weights[i] powers[i]; powers beyond the last weight are not used."""
    total = constant * torch.eye(powers[0].shape[-1], dtype=powers[0].dtype, device=powers[0].device)
    for weight, power in zip(weights, powers, strict=False):
        total = torch.add(total, power, alpha=weight)
    return total


def polynomial(c: Tensor, a: Sequence[float]) -> Tensor:
    """sum_k a_k C^k, with half the products of the chain: low(C) + C^half high(C)."""
    half = len(a) // 2
    if half == 0:
        return _weighted(a[0], [], [c])
    powers = _powers(c, half)
    low = _weighted(a[0], a[1:half], powers)
    if len(a) - half == 1:
        return torch.add(low, powers[-1], alpha=a[half])
    return low + powers[-1] @ _weighted(a[half], a[half + 1 :], powers)


class _TraceOfPowers(torch.autograd.Function):
    """sum_{k>=1} a_k tr C^k, and its gradient sum_k k a_k (C^T)^(k-1). One product each at order 4."""

    @staticmethod
    def forward(ctx, c: Tensor, a: Sequence[float]) -> Tensor:
        half = len(a) // 2  # order 2 half or 2 half - 1
        powers = _powers(c, half)
        ctx.save_for_backward(*powers)
        ctx.a = a
        traces = (weight * power.trace() for weight, power in zip(a[1:], powers, strict=False))
        value = sum(traces, start=c.new_zeros(()))
        if len(a) > half + 1:  # tr(C^half C^i) for the higher powers, without their product
            value = value + (powers[-1] * _weighted(0.0, a[half + 1 :], powers).T).sum()
        return value

    @staticmethod
    @once_differentiable  # the saved powers are constants here: a second derivative would be silently wrong
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        powers = ctx.saved_tensors
        slope = [k * weight for k, weight in enumerate(ctx.a)][1:]
        half = len(powers)
        total = _weighted(slope[0], slope[1:half], powers)
        if len(slope) > half:
            total = total + powers[-1] @ _weighted(slope[half], slope[half + 1 :], powers)
        return grad * total.T, None


def trace_of_powers(
    c: Tensor,  # (n, n), not necessarily symmetric
    a: Sequence[float],
) -> Tensor:
    """sum_{k=1}^{order} a_k tr C^k. The caller adds a_0 times the width of the space, which a smaller Gram matrix
    does not know.

    >>> round(trace_of_powers(torch.eye(2) / 2, log_series(4)).item(), 4)  # 2 (1/2 - 1/8 + 1/24 - 1/64)
    0.8021
    """
    return _TraceOfPowers.apply(c, a)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z @ z.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return (grad + grad.T) @ z


def gram(
    z: Tensor,  # (n, m)
) -> Tensor:
    """Z Z^T, (n, n). The gradient takes one product, where autograd would make two.

    >>> gram(torch.tensor([[1.0, 2.0]]))
    tensor([[5.]])
    """
    return _Gram.apply(z)
