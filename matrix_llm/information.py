"""Matrix information theory on batched symmetric positive semi-definite (PSD) matrices.

Zhang, Tan, Yang, Huang, Yuan, "Matrix Information Theory for Self-Supervised Learning", ICML 2024, section 2.
Everything here takes (..., n, n) float32 or float64 tensors, is differentiable, and needs torch alone.

The delicate part is the logarithm's gradient. Autograd through `torch.linalg.eigh` divides by differences of
eigenvalues and gives NaN as soon as two coincide. `matrix_log` uses the Frechet derivative instead (Daleckii & Krein),
which is finite for repeated and for zero eigenvalues.

Legend: n matrix size, B samples, D embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "effective_rank",
    "log_divided_differences",
    "matrix_cross_entropy",
    "matrix_entropy",
    "matrix_kl",
    "matrix_log",
    "total_coding_rate",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def outside_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run `function` in the precision of its inputs, positional or keyword: autocast would round them to bfloat16."""

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def log_divided_differences(
    eigenvalues: Tensor,  # (..., n), > 0
) -> Tensor:
    """F_ij = (log w_i - log w_j) / (w_i - w_j), with F_ii = 1 / w_i: the kernel of the logarithm's Frechet derivative.

    With x = (w_i - w_j) / (w_i + w_j) the quotient is 2 atanh(x) / (x (w_i + w_j)), which loses no digits where the two
    are close; where they are far apart, the difference of logarithms is accurate.

    Returns:
        (..., n, n), symmetric, positive, same dtype.

    >>> log_divided_differences(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))[0]
    tensor([1.0000, 1.0000, 0.6931], dtype=torch.float64)
    """
    w_i, w_j = eigenvalues.unsqueeze(-1), eigenvalues.unsqueeze(-2)
    difference, total = w_i - w_j, w_i + w_j
    x = difference / total
    near = x.abs() < 0.5
    same = difference == 0
    x_safe = torch.where(near & ~same, x, 0.25)  # 0.25: any value inside (0, 0.5), so that no branch divides by zero
    close = torch.where(same, 1.0, torch.atanh(x_safe) / x_safe) * 2 / total
    logs = eigenvalues.log()
    far = (logs.unsqueeze(-1) - logs.unsqueeze(-2)) / torch.where(near, 1.0, difference)
    return torch.where(near, close, far)


def _check_square(name: str, a: Tensor) -> None:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(a.shape)}, but a matrix logarithm needs (..., n, n) with n >= 1.")
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} is {a.dtype}, but eigenvalues need float32 or float64. Convert it with `.float()` first."
        )


def _check_finite(name: str, a: Tensor) -> None:
    if not torch.isfinite(a).all():
        raise ValueError(f"{name} of shape {tuple(a.shape)} holds NaN or infinity, so it has no eigenvalues.")


def _psd_eigh(name: str, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (..., n) ascending, eigenvectors (..., n, n), and the floor (..., 1) under which one counts as 0."""
    _check_finite(name, a)
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    asymmetry = (a - a.mT).abs().amax((-2, -1))
    if (asymmetry > tolerance * a.abs().amax((-2, -1))).any():
        raise ValueError(
            f"{name} is not symmetric: its largest |a - a.T| is {asymmetry.max().item():.3g}. "
            "Pass (a + a.T) / 2, or method='taylor'."
        )
    w, u = torch.linalg.eigh(a)
    largest = w[..., -1:].clamp(min=0)
    negative = w[..., :1] < -tolerance * largest.clamp(min=torch.finfo(a.dtype).tiny)
    if negative.any():
        raise ValueError(
            f"{name} is not positive semi-definite: its smallest eigenvalue is {w.amin().item():.3g}. "
            "Matrix entropy is defined on PSD matrices; add a ridge to the diagonal, or check how the matrix was made."
        )
    info = torch.finfo(a.dtype)
    floor = (a.shape[-1] * info.eps * largest).clamp(min=info.tiny)
    return w, u, floor


class _PSDLog(torch.autograd.Function):
    """log(max(w, floor)) on the spectrum, with its exact Frechet derivative.

    Also returns the spectrum, undifferentiated, for the range test of `matrix_cross_entropy`.
    """

    @staticmethod
    def forward(ctx, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w, u, floor = _psd_eigh("the matrix", a)
        null = w <= floor
        w = torch.maximum(w, floor)
        ctx.save_for_backward(w, u, null)
        ctx.mark_non_differentiable(u, null)
        return (u * w.log().unsqueeze(-2)) @ u.mT, w.detach(), u, null

    @staticmethod
    @once_differentiable  # the saved eigenpairs are constants here: a second derivative would be silently wrong
    def backward(ctx, grad: Tensor, *_: Tensor | None) -> Tensor:  # type: ignore[override]
        w, u, null = ctx.saved_tensors
        # The function is constant below the floor, so two null directions do not interact: derivative 0, not 1 / 0.
        kernel = log_divided_differences(w).masked_fill(null.unsqueeze(-1) & null.unsqueeze(-2), 0.0)
        return u @ (kernel * (u.mT @ grad @ u)) @ u.mT


def _taylor_log(a: Tensor, order: int) -> Tensor:
    """-sum_{m=1}^{order} (I - A)^m / m, theorem A.1. It converges if every eigenvalue lies in (0, 2)."""
    if order < 1:
        raise ValueError(f"order={order}, but the Taylor series of the logarithm starts at order 1.")
    residual = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - a
    power, total = residual, -residual
    for m in range(2, order + 1):
        power = power @ residual
        total = total - power / m
    return total


@outside_autocast
def matrix_log(a: Tensor, *, method: str = "eigh", order: int = 4) -> Tensor:
    """Principal logarithm of PSD matrices (section 2.1), or its Taylor series about I (theorem A.1).

    Args:
        a: (..., n, n) float32 or float64; symmetric PSD for "eigh", any square matrix for "taylor".
        method: "eigh", exact; or "taylor", -sum_{m=1}^{order} (I - A)^m / m, accurate only near the identity.
        order: terms of the series, at least 1; "taylor" only.

    Returns:
        (..., n, n), same dtype. An eigenvalue at or below n * eps * (the largest one) counts as zero, and its logarithm
        is that of this floor, so that traces follow 0 log 0 = 0. The gradient is the Frechet derivative
        U (F o (U^T G U)) U^T with F from `log_divided_differences`, zero between two null directions; always finite.

    Raises:
        ValueError: not square, not finite, not symmetric or not PSD ("eigh"), unknown method, order < 1.
        TypeError: neither float32 nor float64.

    >>> matrix_log(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))).diagonal()
    tensor([0.0000, 0.6931], dtype=torch.float64)
    """
    _check_square("the matrix", a)
    return _log(a, method, order)[0]


def _log(a: Tensor, method: str, order: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The logarithm, and for "eigh" the eigenvectors with the mask of null ones."""
    if method == "eigh":
        log_a, _, u, null = _PSDLog.apply(a)
        return log_a, (u, null)
    if method == "taylor":
        _check_finite("the matrix", a)
        return _taylor_log(a, order), None
    raise ValueError(f"method={method!r} is not a matrix logarithm. Use 'eigh' (exact) or 'taylor' (theorem A.1).")


def _trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def _trace_of_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.mT).sum((-2, -1))


@outside_autocast
def matrix_entropy(a: Tensor) -> Tensor:
    """ME(A) = -tr(A log A) + tr(A), definition 2.1; 0 log 0 = 0.

    Args:
        a: (..., n, n) symmetric PSD, float32 or float64.

    Returns:
        (...) in nats. Gradient -log A on the range of A, finite on its null space.

    >>> round(matrix_entropy(torch.eye(2, dtype=torch.float64) / 2).item(), 6)  # log 2 + 1
    1.693147
    """
    _check_square("a", a)
    return _trace(a) - _trace_of_product(a, _log(a, "eigh", 0)[0])


@outside_autocast
def matrix_cross_entropy(p: Tensor, q: Tensor, *, method: str = "eigh", order: int = 4) -> Tensor:
    """MCE(P, Q) = tr(-P log Q + Q), definition 2.3. Convex in Q and smallest, at ME(P), where Q = P (prop. 2.6).

    Args:
        p, q: (..., n, n) symmetric PSD, float32 or float64, broadcast together.
        method, order: how log Q is computed, see `matrix_log`.

    Returns:
        (...) in nats, in the dtype of the inputs; `inf` where P has mass outside the range of Q ("eigh").
        The gradient in Q is I - Dlog_Q[P] (the paper's -P Q^-1 + I holds only where P and Q commute).

    >>> half = torch.eye(2, dtype=torch.float64) / 2
    >>> round(matrix_cross_entropy(half, half).item(), 6)  # log 2 + 1
    1.693147
    """
    _check_square("p", p)
    _check_square("q", q)
    if p.shape[-1] != q.shape[-1] or p.dtype != q.dtype:
        raise ValueError(
            f"p is {tuple(p.shape)} {p.dtype} and q is {tuple(q.shape)} {q.dtype}, but both must be (..., n, n) "
            "of one n and one dtype."
        )
    _check_finite("p", p)
    log_q, spectrum = _log(q, method, order)
    value = _trace(q) - _trace_of_product(p, log_q)
    if spectrum is None:
        return value
    u, null = spectrum
    with torch.no_grad():
        mass = ((u * (p @ u)).sum(-2) * null).sum(-1)  # tr of P on the null space of Q
        outside = mass > 100 * p.shape[-1] * torch.finfo(p.dtype).eps * _trace(p)
    return torch.where(outside, torch.inf, value)


def matrix_kl(p: Tensor, q: Tensor) -> Tensor:
    """MKL(P || Q) = tr(P log P - P log Q - P + Q), definition 2.2. Non-negative, zero iff P = Q, jointly convex.

    Args:
        p, q: (..., n, n) symmetric PSD, float32 or float64, broadcast together.

    Returns:
        (...) in nats; `inf` where P has mass outside the range of Q.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> round(matrix_kl(eye, 2 * eye).item(), 6)  # 2 (1 - log 2)
    0.613706
    """
    return matrix_cross_entropy(p, q) - matrix_entropy(p)


@outside_autocast
def effective_rank(a: Tensor) -> Tensor:
    """erank(A) = exp(H(s / sum s)), s the singular values of A (Roy & Vetterli 2007).

    Between 1 and min(m, n). For unit-norm columns, erank(Z Z^T / B) = d / exp(MKL(Z Z^T / B || I / d)) (prop. 5.1).

    Args:
        a: (..., m, n) float32 or float64; square or not.

    Returns:
        (...), dimensionless; 0 for a zero matrix.

    >>> round(effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))).item(), 6)
    2.0
    """
    if a.ndim < 2 or a.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"effective_rank needs (..., m, n) float32 or float64, not {tuple(a.shape)} {a.dtype}.")
    _check_finite("a", a)
    singular = torch.linalg.svdvals(a)
    total = singular.sum(-1, keepdim=True)
    info = torch.finfo(a.dtype)
    p = singular / total.clamp(min=info.tiny)
    entropy = -(p * p.clamp(min=info.tiny).log()).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


@outside_autocast
def total_coding_rate(
    z: Tensor,  # (B, d), rows are samples
    *,
    eps_squared: float,
) -> Tensor:
    """TCR(Z) = 1/2 logdet(I_d + d / (B eps^2) Z^T Z), eq. 1, with rows as samples.

    With lambda = eps^2 / d and unit-norm rows (theorem 3.1 with its missing factor and sign restored):
    MCE((1/d + lambda) I, Z^T Z / B + lambda I) = (1 + d lambda) (-log lambda + 1 - (2 / d) TCR(Z)).

    Args:
        z: (B, d) or (..., B, d), float32 or float64; not normalised here.
        eps_squared: the squared distortion, > 0.

    Returns:
        () or (...), in nats.

    >>> round(total_coding_rate(torch.eye(2, dtype=torch.float64), eps_squared=1.0).item(), 6)  # log 2
    0.693147
    """
    if z.ndim < 2 or z.shape[-2] == 0 or z.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"total_coding_rate needs (B, d) float32 or float64 with B >= 1, not {tuple(z.shape)} {z.dtype}."
        )
    if not eps_squared > 0:
        raise ValueError(
            f"eps_squared={eps_squared}, but the coding rate divides by it. Give a positive number, such as 0.5."
        )
    _check_finite("z", z)
    samples, width = z.shape[-2:]
    gram = z @ z.mT if samples < width else z.mT @ z  # the smaller side: both have the same determinant
    eye = torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device)
    cholesky = torch.linalg.cholesky(eye + width / (samples * eps_squared) * gram)
    return cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
