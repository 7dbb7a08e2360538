"""Matrix-SSL (Zhang et al., ICML 2024, arXiv 2305.17326, section 4) and MEC, the losses on the matrix of two views'
covariance.

Every loss here works in four steps:
1. check the rows (`checks.check_rows`)
2. compute in float32, inside autocast too, because bfloat16 shifts Matrix-SSL by 2e-4; float64 rows stay float64
3. normalise as the method's released code does
4. return the value, a scalar

Two things make Matrix-SSL fast. Traces of matrix powers need few products (`polynomials.py`). And where B < d, the
(B, B) matrix Z2 Z1^T / B replaces the (d, d) matrix C12 = Z1^T Z2 / B, because both have the same non-zero
eigenvalues. `dense_matrix_ssl_loss` is the slow reference without either.

Legend: B samples (rows), d embedding width. Z1, Z2 are the rows after step 3; C_ij = Z_i^T Z_j / B.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.base.errors import RecipeError
from matrix_llm.information import matrix_cross_entropy, matrix_log, outside_autocast
from matrix_llm.ssl.losses.checks import check_positive, check_preset, check_rows
from matrix_llm.ssl.losses.polynomials import gram, log_series, polynomial, trace_of_powers

__all__ = [
    "dense_matrix_ssl_loss",
    "matrix_alignment_loss",
    "matrix_ssl_loss",
    "matrix_uniformity_loss",
    "mec_loss",
]


@outside_autocast
def matrix_ssl_loss(
    target: Tensor,  # (B, d)
    online: Tensor,  # (B, d)
    *,
    gamma: float = 1.0,
    preset: str = "official",
    order: int = 4,
    mu: float = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """Matrix uniformity plus alignment (eq. 14) of one pair of views.

    The terms, the arguments and the errors are those of `matrix_uniformity_loss` and `matrix_alignment_loss`. The
    caller decides which pairs of views to add. The released code trains
    (loss(target of view 2, online of view 1) + loss(target of view 1, online of view 2)) / 2; the paper writes the
    one-sided loss. Pass `target` detached, from the averaged teacher.

    Returns:
        () in nats.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_ssl_loss(z, z).item(), 3)
    -1.75
    """
    check_preset(preset)
    views = _normalise_views(target=target, online=online)
    return _uniformity(views, preset, order, mu, lambda_) + _alignment(views, preset, gamma, order, mu, lambda_)


@outside_autocast
def matrix_uniformity_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    preset: str = "official",
    order: int = 4,
    mu: float = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """Uniformity of the cross-covariance C12 (eq. 12).

    official: -tr(P log Q) with P = lambda I and Q = C12 + mu I, by the Taylor series of this order about I (the
              released code).
    paper:    MCE(I / d, C12 + lambda I) = -1/d log|det Q| + tr Q, exact; `order` and `mu` are not used. C12 is not
              symmetric, so tr log Q is log det Q, and its real part is taken where det Q < 0. For equal views the
              value is -log lambda - 2/d TCR(Z) + tr Q with eps^2 = d lambda (theorem 3.1 with its errata corrected).

    Args:
        z1, z2: rows are samples of any norm; they are l2-normalised and then centred over the batch. z1 is the target
            branch. Neither is detached here: gradients flow to both.
        order: terms of the series. It converges where the eigenvalues of Q lie inside (0, 2), which is always so at
            mu = 1.
        mu, lambda_: 1.0 in the release's README, 0.5 in its script. With preset="paper", lambda_ is the ridge and
            must be above 0 where B <= d.

    Returns:
        () in nats; float32, or float64 for float64 rows.

    Raises:
        ValueError: fewer than two rows, or different shapes.
        NonFiniteRowsError: NaN or infinity in the rows.
        RecipeError: another preset, order < 1, or no ridge where one is needed.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_uniformity_loss(z, z).item(), 3)
    -0.583
    >>> round(matrix_uniformity_loss(z, z, order=64).item(), 3)  # -log 2 is -0.693
    -0.685
    """
    check_preset(preset)
    return _uniformity(_normalise_views(z1=z1, z2=z2), preset, order, mu, lambda_)


@outside_autocast
def matrix_alignment_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    preset: str = "official",
    gamma: float = 1.0,
    order: int = 4,
    mu: float = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """Alignment of the two auto-covariances (eq. 13).

    official: gamma * -tr(P log Q) with P = C11 + mu I and Q = C22 + mu I, by the Taylor series about I (the released
              code).
    paper:    -tr C12 + gamma MCE(C11 + lambda I, C22 + lambda I), exact. The gradient is the Frechet derivative of
              the logarithm, which is finite on the rank-deficient C22 that a predictor's bottleneck guarantees.
              `order` and `mu` are not used.

    Arguments, value and errors as in `matrix_uniformity_loss`; the official preset does not use `lambda_`.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_alignment_loss(z, z).item(), 3)  # -tr(P log Q) = -2 (1 - 1/2 + 1/3 - 1/4)
    -1.167
    """
    check_preset(preset)
    return _alignment(_normalise_views(z1=z1, z2=z2), preset, gamma, order, mu, lambda_)


@outside_autocast
def dense_matrix_ssl_loss(
    target: Tensor,  # (B, d)
    online: Tensor,  # (B, d)
    *,
    gamma: float = 1.0,
    preset: str = "official",
    order: int = 4,
    mu: float = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """The slow reference of `matrix_ssl_loss`: every (d, d) matrix and logarithm written out, for tests.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(dense_matrix_ssl_loss(z, z).item(), 3)
    -1.75
    """
    check_preset(preset)
    z1, z2, _ = _normalise_views(target=target, online=online)
    width, eye = z1.shape[1], _eye(z1.shape[1], z1)
    c11, c12, c22 = _second_moment(z1), z1.T @ z2 / len(z1), _second_moment(z2)
    if preset == "official":
        log_12, log_22 = (matrix_log(c + mu * eye, method="taylor", order=order) for c in (c12, c22))
        return -(lambda_ * eye * log_12).sum() - gamma * ((c11 + mu * eye) * log_22.T).sum()
    q = c12 + lambda_ * eye
    uniformity = q.trace() - torch.linalg.slogdet(q).logabsdet / width
    return uniformity - c12.trace() + gamma * matrix_cross_entropy(c11 + lambda_ * eye, c22 + lambda_ * eye)


@outside_autocast
def mec_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    eps: float = 64.0,
    order: int | None = 4,
    preset: str = "official",
) -> Tensor:
    """Maximum entropy coding, eq. 2 of Liu et al. 2022 (arXiv 2210.11464): -scale * logdet(I + d / (B eps) Z1 Z2^T).

    Rows are l2-normalised, not centred. `eps` is the release's `--eps`, which is eps^2 in the equation. The release's
    eps_d is eps / d, and its lamda is 1 / (B eps_d), the factor above.
    official: scale = eps / d, which the release trains: it divides the trace by B and multiplies by 1 / lamda = B
              eps_d.
    paper:    scale = mu = (B + d) / 2, eq. 2. The release logs this divided by B, with the opposite sign, as "MEC".
    The release trains (loss(p1, z2) + loss(p2, z1)) / 2, and lowers eps from 8 times its value to its value over 10
    epochs.

    Args:
        z1, z2: rows of any norm; p1 and z2 in the release's names.
        order: of the Taylor series of log(I + C); None takes the exact log|det|.
        preset: chooses the scale.

    Returns:
        () in nats times the scale.

    >>> z = torch.eye(2)
    >>> round(mec_loss(z, z, eps=2.0, order=None).item(), 4)  # -2 log(1 + 1/2)
    -0.8109
    >>> round(mec_loss(z, z, eps=2.0).item(), 4)
    -0.8021
    """
    check_preset(preset)
    check_positive(eps=eps)
    z1, z2 = (F.normalize(z, dim=1) for z in check_rows(2, z1=z1, z2=z2))
    rows, width = z1.shape
    c = (z1 @ z2.T if rows < width else z1.T @ z2) * (width / (rows * eps))
    logdet = _log_abs_det(c, len(c), 1.0) if order is None else trace_of_powers(c, log_series(order))
    return -(eps / width if preset == "official" else (rows + width) / 2) * logdet


# --- the two terms of Matrix-SSL, on normalised views -----------------------------------------------------------------


class _Views(NamedTuple):
    """Two views, l2-normalised and centred, and the smaller of their two cross matrices."""

    z1: Tensor  # (B, d)
    z2: Tensor  # (B, d)
    cross: Tensor  # (d, d) C12 = Z1^T Z2 / B; where B < d, (B, B) Z2 Z1^T / B, with the same non-zero eigenvalues


def _normalise_views(**views: Tensor) -> _Views:
    unit = (F.normalize(z, dim=1) for z in check_rows(2, **views))
    z1, z2 = (z - z.mean(0) for z in unit)
    rows, width = z1.shape
    return _Views(z1, z2, (z2 @ z1.T if rows < width else z1.T @ z2) / rows)


def _uniformity(views: _Views, preset: str, order: int, mu: float, lambda_: float) -> Tensor:
    width = views.z1.shape[1]
    if preset == "official":
        a = log_series(order, mu - 1)
        return -lambda_ * (a[0] * width + trace_of_powers(views.cross, a))
    _check_ridge(lambda_, views)
    return views.cross.trace() + width * lambda_ - _log_abs_det(views.cross, width, lambda_) / width


def _alignment(views: _Views, preset: str, gamma: float, order: int, mu: float, lambda_: float) -> Tensor:
    if preset == "paper":
        return _paper_alignment(views, gamma, lambda_)
    z1, z2, cross = views
    rows, width = z1.shape
    a = log_series(order, mu - 1)
    if rows >= width:
        return -gamma * ((_second_moment(z1) + mu * _eye(width, z1)) * polynomial(_second_moment(z2), a)).sum()
    # For k >= 1, with R = Z2 Z1^T / B and N = Z2 Z2^T / B: tr(C11 C22^k) = tr(R R^T N^(k-1)) and
    # tr C22^k = tr(N N^(k-1)).
    gram_22 = gram(z2) / rows
    weight = gram(cross) + mu * gram_22
    constant = a[0] * (mu * width + z1.square().sum() / rows)
    return -gamma * (constant + (weight * polynomial(gram_22, a[1:])).sum())


def _paper_alignment(views: _Views, gamma: float, lambda_: float) -> Tensor:
    _check_ridge(lambda_, views)
    z1, z2, cross = views
    rows, width = z1.shape
    if 2 * rows < width:
        # Outside the span of all rows, both matrices are lambda I in value and in gradient: work in a basis of it.
        with torch.no_grad():
            basis = torch.linalg.qr(torch.cat([z1, z2]).T).Q  # (d, 2 B)
        z1, z2 = z1 @ basis, z2 @ basis
    ridge = lambda_ * _eye(z1.shape[1], z1)
    value = matrix_cross_entropy(_second_moment(z1) + ridge, _second_moment(z2) + ridge)
    outside = width - z1.shape[1]
    return gamma * (value + (outside * lambda_ * (1 - math.log(lambda_)) if outside else 0.0)) - cross.trace()


def _check_ridge(lambda_: float, views: _Views) -> None:
    rows, width = views.z1.shape
    if not lambda_ >= 0 or (lambda_ == 0 and rows <= width):
        raise RecipeError(
            f"lambda_={lambda_} with preset='paper', where it is the ridge of matrices of width {width} and of rank "
            f"at most {min(rows - 1, width)}: their logarithm is finite only with a positive ridge. Give lambda_ > 0."
        )


def _log_abs_det(c: Tensor, width: int, ridge: float) -> Tensor:
    """log|det(C + ridge I_width)|, from C or from a smaller matrix with the same non-zero eigenvalues."""
    value = torch.linalg.slogdet(c + ridge * _eye(len(c), c)).logabsdet
    return value if len(c) == width else value + (width - len(c)) * math.log(ridge)


def _second_moment(z: Tensor) -> Tensor:
    return gram(z.T) / len(z)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
