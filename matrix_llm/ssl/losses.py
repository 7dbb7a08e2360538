"""Matrix-SSL and the baselines it is compared with: Zhang et al., ICML 2024 (arXiv 2305.17326), sections 4 and 6, unless named.

Flow of every loss: 1. check the rows; 2. float32 even inside autocast (bfloat16 shifts Matrix-SSL by 2e-4; float64 stays);
3. normalise as the method's released code does; 4. the value, a scalar. Over several ranks, gather the rows first (gather.py).

Speed of Matrix-SSL: traces of powers need few products (polynomials.py), and where B < d the B x B matrix Z2 Z1^T / B has the
non-zero eigenvalues of C12 = Z1^T Z2 / B. `dense_matrix_ssl_loss` is the slow reference, written with `matrix_llm.information`.

Legend: B samples (rows), d embedding width, M prototypes, N queue length. Z1, Z2 are the rows after step 3, C_ij = Z_i^T Z_j / B.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.information import matrix_cross_entropy, matrix_log, outside_autocast
from matrix_llm.ssl.polynomials import gram, log_series, polynomial, trace_of_powers
from matrix_llm.ssl.rows import check_positive, check_rows

__all__ = [
    "barlow_twins_loss",
    "byol_loss",
    "dense_matrix_ssl_loss",
    "matrix_alignment_loss",
    "matrix_ssl_loss",
    "matrix_uniformity_loss",
    "mec_loss",
    "moco_loss",
    "nt_xent_loss",
    "simsiam_loss",
    "sinkhorn",
    "swav_loss",
    "vicreg_loss",
]

PRESETS = ("official", "paper")


def _check_preset(preset: str) -> None:
    if preset not in PRESETS:
        raise ValueError(
            f"preset={preset!r} is none of {', '.join(map(repr, PRESETS))}: the released code, or the paper's equations."
        )


# --- Matrix-SSL ------------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Two views, l2-normalised and centred, and the smaller of their two cross matrices."""

    z1: Tensor  # (B, d)
    z2: Tensor  # (B, d)
    cross: Tensor  # (d, d) C12 = Z1^T Z2 / B; where B < d, (B, B) Z2 Z1^T / B, which has the same non-zero eigenvalues


def _pair(z1: Tensor, z2: Tensor, names: tuple[str, str]) -> _Pair:
    views = (F.normalize(z, dim=1) for z in check_rows(2, **dict(zip(names, (z1, z2), strict=True))))
    z1, z2 = (z - z.mean(0) for z in views)
    rows, width = z1.shape
    return _Pair(z1, z2, (z2 @ z1.T if rows < width else z1.T @ z2) / rows)


def _moment(z: Tensor) -> Tensor:
    return gram(z.T) / len(z)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _log_abs_det(c: Tensor, width: int, ridge: float) -> Tensor:
    """log|det(C + ridge I_width)|, from C or from a smaller matrix with its non-zero eigenvalues."""
    value = torch.linalg.slogdet(c + ridge * _eye(len(c), c)).logabsdet
    return value if len(c) == width else value + (width - len(c)) * math.log(ridge)


def _check_ridge(lambda_: float, pair: _Pair) -> None:
    rows, width = pair.z1.shape
    if not lambda_ >= 0 or (lambda_ == 0 and rows <= width):
        raise ValueError(
            f"lambda_={lambda_} with preset='paper', where it is the ridge of matrices of width {width} and of rank {min(rows - 1, width)} "
            "at most: their logarithm is finite only with a positive one. Give lambda_ > 0."
        )


def _uniformity(pair: _Pair, preset: str, order: int, mu: float, lambda_: float) -> Tensor:
    width = pair.z1.shape[1]
    if preset == "official":
        a = log_series(order, mu - 1)
        return -lambda_ * (a[0] * width + trace_of_powers(pair.cross, a))
    _check_ridge(lambda_, pair)
    return pair.cross.trace() + width * lambda_ - _log_abs_det(pair.cross, width, lambda_) / width


def _alignment(pair: _Pair, preset: str, gamma: float, order: int, mu: float, lambda_: float) -> Tensor:
    z1, z2, cross = pair
    rows, width = z1.shape
    if preset == "paper":
        _check_ridge(lambda_, pair)
        trace = cross.trace()
        if 2 * rows < width:
            # The part of both matrices outside all rows is lambda I, in value and in gradient: work in a basis of the rows.
            with torch.no_grad():
                basis = torch.linalg.qr(torch.cat([z1, z2]).T).Q  # (d, 2 B)
            z1, z2 = z1 @ basis, z2 @ basis
        ridge = lambda_ * _eye(z1.shape[1], z1)
        value = matrix_cross_entropy(_moment(z1) + ridge, _moment(z2) + ridge)
        outside = width - z1.shape[1]
        return gamma * (value + (outside * lambda_ * (1 - math.log(lambda_)) if outside else 0.0)) - trace
    a = log_series(order, mu - 1)
    if rows >= width:
        return -gamma * ((_moment(z1) + mu * _eye(width, z1)) * polynomial(_moment(z2), a)).sum()
    # tr(C11 C22^k) = tr(R R^T N^(k-1)) and tr C22^k = tr(N N^(k-1)) with R = Z2 Z1^T / B and N = Z2 Z2^T / B, for k >= 1.
    gram_22 = gram(z2) / rows
    weight = gram(cross) + mu * gram_22
    constant = a[0] * (mu * width + z1.square().sum() / rows)
    return -gamma * (constant + (weight * polynomial(gram_22, a[1:])).sum())


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

    official: -tr(P log Q), P = lambda I, Q = C12 + mu I, by the Taylor series of this order about I (the released code).
    paper:    MCE(I / d, C12 + lambda I) = -1/d log|det Q| + tr Q, exact; `order` and `mu` are not used. C12 is not symmetric:
              tr log Q is log det Q, and where det Q < 0 its real part is taken. For equal views this is
              -log lambda - 2/d TCR(Z) + tr Q with eps^2 = d lambda (theorem 3.1, errata mended).

    Args:
        z1, z2: rows are samples, of any norm: l2-normalised inside, then centred over the batch. z1 is the target branch. Neither is
            detached here; gradients go to both.
        order: terms of the series, which converges where the eigenvalues of Q are inside (0, 2): always, at mu = 1.
        mu, lambda_: 1.0 in the release's README, 0.5 in its script. In the paper's preset lambda_ is the ridge, > 0 where B <= d.

    Returns:
        () in nats; float32, or float64 for float64 rows.

    Raises:
        ValueError: fewer than two rows, different shapes, NaN or infinity, order < 1, no ridge where one is needed.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_uniformity_loss(z, z, order=64).item(), 3), round(matrix_uniformity_loss(z, z).item(), 3)  # log 2 is 0.693
    (-0.685, -0.583)
    """
    _check_preset(preset)
    return _uniformity(_pair(z1, z2, ("z1", "z2")), preset, order, mu, lambda_)


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

    official: gamma * -tr(P log Q), P = C11 + mu I, Q = C22 + mu I, by the Taylor series about I (the released code).
    paper:    -tr C12 + gamma MCE(C11 + lambda I, C22 + lambda I), exact, with the Frechet gradient of the logarithm, which is finite
              on the rank-deficient C22 that a predictor's bottleneck guarantees. `order` and `mu` are not used.

    Args, returns and errors as in `matrix_uniformity_loss`; `lambda_` is not used by the official preset.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_alignment_loss(z, z).item(), 3)  # -tr(P log Q) = -2 (1 - 1/2 + 1/3 - 1/4)
    -1.167
    """
    _check_preset(preset)
    return _alignment(_pair(z1, z2, ("z1", "z2")), preset, gamma, order, mu, lambda_)


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
    """Matrix uniformity + alignment (eq. 14) of one pair of views; see the two for the terms, arguments and errors.

    The released code trains (loss(target of view 2, online of view 1) + loss(target of view 1, online of view 2)) / 2, and the paper
    writes the one-sided loss: which pairs to add is the caller's. Pass `target` detached, from the averaged teacher.

    Returns:
        () in nats.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_ssl_loss(z, z).item(), 3)
    -1.75
    """
    _check_preset(preset)
    pair = _pair(target, online, ("target", "online"))
    return _uniformity(pair, preset, order, mu, lambda_) + _alignment(pair, preset, gamma, order, mu, lambda_)


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
    """The slow reference of `matrix_ssl_loss`: every d x d matrix and logarithm written out, for tests.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(dense_matrix_ssl_loss(z, z).item(), 3)
    -1.75
    """
    _check_preset(preset)
    z1, z2, _ = _pair(target, online, ("target", "online"))
    width, eye = z1.shape[1], _eye(z1.shape[1], z1)
    c11, c12, c22 = _moment(z1), z1.T @ z2 / len(z1), _moment(z2)
    if preset == "official":
        log_12, log_22 = (matrix_log(c + mu * eye, method="taylor", order=order) for c in (c12, c22))
        return -(lambda_ * eye * log_12).sum() - gamma * ((c11 + mu * eye) * log_22.T).sum()
    q = c12 + lambda_ * eye
    uniformity = q.trace() - torch.linalg.slogdet(q).logabsdet / width
    return uniformity - c12.trace() + gamma * matrix_cross_entropy(c11 + lambda_ * eye, c22 + lambda_ * eye)


# --- baselines -------------------------------------------------------------------------------------------------------------


@outside_autocast
def mec_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    eps: float = 64.0,
    order: int | None = 4,
    preset: str = "official",
) -> Tensor:
    """Maximum entropy coding, eq. 2: -scale * logdet(I + d / (B eps) Z1 Z2^T). Rows are l2-normalised, not centred.

    `eps` is the release's `--eps`, eps^2 in the equation. The release's eps_d is eps / d, its lamda 1 / (B eps_d), the factor above.
    official: scale = eps / d, which the release trains: it divides the trace by B and multiplies by 1 / lamda = B eps_d.
    paper:    scale = mu = (B + d) / 2, eq. 2. The release logs this divided by B, and with the opposite sign, as "MEC".
    The release trains (loss(p1, z2) + loss(p2, z1)) / 2, and lowers eps from 8 times its value to it over 10 epochs.

    Args:
        z1, z2: any norm; p1 and z2 in the release's names.
        order: of the Taylor series of log(I + C); None is the exact log|det|.
        preset: the scale.

    Returns:
        () in nats times the scale.

    >>> z = torch.eye(2)
    >>> round(mec_loss(z, z, eps=2.0, order=None).item(), 4), round(mec_loss(z, z, eps=2.0).item(), 4)  # -2 log(1 + 1/2)
    (-0.8109, -0.8021)
    """
    _check_preset(preset)
    check_positive(eps=eps)
    z1, z2 = (F.normalize(z, dim=1) for z in check_rows(2, z1=z1, z2=z2))
    rows, width = z1.shape
    c = (z1 @ z2.T if rows < width else z1.T @ z2) * (width / (rows * eps))
    logdet = _log_abs_det(c, len(c), 1.0) if order is None else trace_of_powers(c, log_series(order))
    return -(eps / width if preset == "official" else (rows + width) / 2) * logdet


def _off_diagonal_square(c: Tensor) -> Tensor:
    """The sum of squares off the diagonal of (d, d), without a copy: rows of d + 1 entries put the diagonal into one column."""
    width = len(c)
    return c.flatten()[1:].view(width - 1, width + 1)[:, :-1].square().sum()


@outside_autocast
def barlow_twins_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    lambd: float = 0.0051,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambd sum_{i != j} C_ij^2, eq. 1 and 2 of Zbontar et al. 2021 (arXiv 2103.03230).

    C = BN(Z1)^T BN(Z2) / B, with batch normalisation without affine parameters (variance biased, plus eps), as in Meta's code.

    Args:
        scale: 1 is Meta's final code; 0.025 is solo-learn's (and 0.024 or 1/32 older ones'). It scales loss and gradient.

    Returns:
        (), dimensionless: 0 where the views are equal and their dimensions uncorrelated.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(barlow_twins_loss(z, z).item(), 6), round(barlow_twins_loss(z, -z).item(), 3)  # 2 (1 - -1)^2
    (0.0, 8.0)
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True, eps=eps) for z in check_rows(2, z1=z1, z2=z2))
    rows, width = z1.shape
    if (
        2 * rows < width
    ):  # |Z1^T Z2|^2 = <Z1 Z1^T, Z2 Z2^T>; C has a rank far below d: the rest off the diagonal is no small difference
        diagonal = (z1 * z2).sum(0) / rows
        off = (gram(z1) * gram(z2)).sum() / rows**2 - diagonal.square().sum()
    else:
        c = z1.T @ z2
        diagonal, off = c.diagonal() / rows, _off_diagonal_square(c) / rows**2
    return scale * ((1 - diagonal).square().sum() + lambd * off)


@outside_autocast
def vicreg_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """Variance, invariance, covariance: eq. 1 to 6 of Bardes et al. 2022 (arXiv 2105.04906), as in Meta's code.

    sim = mean over entries of (Z1 - Z2)^2; std = 1/2 sum over views of mean_j max(0, 1 - sqrt(var_j + eps));
    cov = sum over views of sum_{i != j} Cov_ij^2 / d; variance and covariance unbiased. The paper adds the two std terms;
    Meta and lightly average them.

    >>> z = torch.tensor([[1.0], [-1.0]])
    >>> vicreg_loss(z, z).item(), round(vicreg_loss(z, -z).item(), 3)  # 25 * 4
    (0.0, 100.0)
    """
    z1, z2 = check_rows(2, z1=z1, z2=z2)
    rows, width = z1.shape
    loss = sim_coeff * F.mse_loss(z1, z2)
    for z in (z1, z2):
        z = z - z.mean(0)
        if rows < width:  # |Z^T Z|^2 = |Z Z^T|^2
            variance = z.square().sum(0) / (rows - 1)
            off = gram(z).square().sum() / (rows - 1) ** 2 - variance.square().sum()
        else:
            c = gram(z.T)
            variance, off = c.diagonal() / (rows - 1), _off_diagonal_square(c) / (rows - 1) ** 2
        loss = loss + std_coeff * F.relu(1 - (variance + eps).sqrt()).mean() / 2 + cov_coeff * off / width
    return loss


@outside_autocast
def nt_xent_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    temperature: float = 0.5,
) -> Tensor:
    """NT-Xent, eq. 1 of Chen et al. 2020 (SimCLR, arXiv 2002.05709), its mean over the 2 B rows as positives' anchors.

    -log exp(s_ij / t) / sum_{k != i} exp(s_ik / t), s the cosine, j the other view of i. SimCLR's TensorFlow code adds the means over
    the two views: twice this value.

    >>> round(nt_xent_loss(torch.eye(2), torch.eye(2)).item(), 4)  # log(1 + 2 / e^2)
    0.2395
    """
    check_positive(temperature=temperature)
    views = check_rows(2, z1=z1, z2=z2)
    z = F.normalize(torch.cat(views), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


@outside_autocast
def moco_loss(
    query: Tensor,  # (B, d)
    key: Tensor,  # (B, d)
    queue: Tensor,  # (N, d)
    *,
    temperature: float = 0.2,
) -> Tensor:
    """InfoNCE, eq. 1 of He et al. 2020 (MoCo, arXiv 1911.05722) with MoCo v2's temperature: mean over queries.

    -log exp(q k / t) / (exp(q k / t) + sum_n exp(q queue_n / t)), all rows l2-normalised. No gradient reaches `key` and `queue`.

    Args:
        queue: keys of earlier batches, one a row (MoCo's buffer is the transpose, (d, N)). Enqueue `key` after the step.

    >>> round(moco_loss(torch.eye(2), torch.eye(2), torch.eye(2)[:1]).item(), 4)  # mean of log 2 and log(1 + e^-5)
    0.3499
    """
    check_positive(temperature=temperature)
    if queue.ndim != 2 or query.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            f"queue is {tuple(queue.shape)}, but it holds one key a row, of the width of query {tuple(query.shape)}."
        )
    q, k = (F.normalize(z, dim=1) for z in check_rows(1, query=query, key=key.detach()))
    (old,) = check_rows(0, queue=queue.detach())
    old = F.normalize(old, dim=1).to(q.dtype)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ old.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@outside_autocast
def byol_loss(
    prediction: Tensor,  # (B, d)
    target: Tensor,  # (B, d)
) -> Tensor:
    """2 - 2 cos(prediction, target), mean over rows: eq. 2 of Grill et al. 2020 (BYOL, arXiv 2006.07733), one pair of views.

    BYOL adds the losses of the two swapped pairs (not halved). No gradient reaches `target`. A batch of one row is allowed.

    >>> byol_loss(torch.eye(2), -torch.eye(2)).item()
    4.0
    """
    p, t = (F.normalize(z, dim=1) for z in check_rows(1, prediction=prediction, target=target.detach()))
    return (2 - 2 * (p * t).sum(1)).mean()


@outside_autocast
def simsiam_loss(
    p1: Tensor,  # (B, d)
    p2: Tensor,  # (B, d)
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
) -> Tensor:
    """-cos(p1, z2) / 2 - cos(p2, z1) / 2, mean over rows: eq. 1 to 4 of Chen & He 2021 (SimSiam, arXiv 2011.10566).

    p are the predictor's outputs, z the projector's; no gradient reaches z (stop-gradient). A batch of one row is allowed.

    >>> simsiam_loss(*[torch.eye(2)] * 4).item()
    -1.0
    """
    p1, p2, z1, z2 = (F.normalize(z, dim=1) for z in check_rows(1, p1=p1, p2=p2, z1=z1.detach(), z2=z2.detach()))
    return -((p1 * z2).sum(1).mean() + (p2 * z1).sum(1).mean()) / 2


@torch.no_grad()
def sinkhorn(
    scores: Tensor,  # (B, M)
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Assignments Q = diag(u) exp(scores / epsilon) diag(v), eq. 5 of Caron et al. 2020 (SwAV): every prototype gets B / M rows.

    In the logarithm, where exp(1 / 0.05) and far smaller weights neither overflow nor vanish. Each iteration balances the prototypes,
    then the rows.

    Returns:
        (B, M), rows sum to 1; without gradient.

    >>> sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # equal rows share both prototypes
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    q = scores / epsilon
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True)
        q = q - q.logsumexp(1, keepdim=True)
    return q.softmax(1)


@outside_autocast
def swav_loss(
    scores1: Tensor,  # (B, M)
    scores2: Tensor,  # (B, M)
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Swapped prediction, eq. 1 and 2 of Caron et al. 2020 (SwAV, arXiv 2006.09882), halved as in the paper's pseudo-code.

    -1/2 mean over rows of sum_m (q2 log softmax(scores1 / t) + q1 log softmax(scores2 / t)), q = `sinkhorn(scores)`.
    Written from the paper.

    Args:
        scores1, scores2: cosines of the rows with the M prototypes, two crops of the same images.

    >>> round(swav_loss(torch.eye(2), torch.eye(2)).item(), 6)  # log(1 + e^-10)
    4.5e-05
    """
    check_positive(temperature=temperature, epsilon=epsilon)
    scores1, scores2 = check_rows(2, scores1=scores1, scores2=scores2)
    loss = scores1.new_zeros(())
    for scores, others in ((scores1, scores2), (scores2, scores1)):
        q = sinkhorn(others, epsilon=epsilon, iterations=iterations)
        loss = loss - (q * F.log_softmax(scores / temperature, dim=1)).sum(1).mean() / 2
    return loss
