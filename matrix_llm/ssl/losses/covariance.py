"""Losses over the covariance of the embedding's dimensions: Barlow Twins and VICReg.

Both read the sum of squares off the diagonal of a (d, d) matrix. With few rows that sum comes from (B, B) Gram
matrices instead.

Legend: B samples (rows), d embedding width. Z1, Z2 are the two views' rows after normalisation.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from matrix_llm.information import outside_autocast
from matrix_llm.ssl.losses.checks import check_rows
from matrix_llm.ssl.losses.polynomials import gram

__all__ = ["barlow_twins_loss", "vicreg_loss"]


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

    C = BN(Z1)^T BN(Z2) / B, with batch normalisation without affine parameters (variance biased, plus eps), as in
    Meta's code.

    Args:
        scale: 1 is Meta's final code; 0.025 is solo-learn's (and 0.024 or 1/32 older ones'). It scales loss and
            gradient.

    Returns:
        (), dimensionless: 0 where the views are equal and their dimensions uncorrelated.

    >>> import torch
    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(barlow_twins_loss(z, z).item(), 6), round(barlow_twins_loss(z, -z).item(), 3)  # 2 (1 - -1)^2
    (0.0, 8.0)
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True, eps=eps) for z in check_rows(2, z1=z1, z2=z2))
    rows, width = z1.shape
    if 2 * rows < width:
        # |Z1^T Z2|^2 = <Z1 Z1^T, Z2 Z2^T>. Only where the rank of C is far below d: there the part off the diagonal
        # is large, and subtracting the diagonal's squares loses no digits.
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
    cov = sum over views of sum_{i != j} Cov_ij^2 / d; variance and covariance unbiased. The paper adds the two std
    terms; Meta's code and lightly average them, and so does this.

    >>> import torch
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


def _off_diagonal_square(c: Tensor) -> Tensor:
    """The sum of squares off the diagonal of a (d, d) matrix, without a copy.

    Without its first entry, the matrix reads as d - 1 rows of d + 1 entries, the last of which is on the diagonal.
    """
    width = len(c)
    return c.flatten()[1:].view(width - 1, width + 1)[:, :-1].square().sum()
