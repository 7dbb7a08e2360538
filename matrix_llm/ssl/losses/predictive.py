"""Losses that predict one view from the other, row by row, without negatives: BYOL and SimSiam.

Legend: B samples (rows), d embedding width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from matrix_llm.information import outside_autocast
from matrix_llm.ssl.losses.checks import check_rows

__all__ = ["byol_loss", "simsiam_loss"]


@outside_autocast
def byol_loss(
    prediction: Tensor,  # (B, d)
    target: Tensor,  # (B, d)
) -> Tensor:
    """2 - 2 cos(prediction, target), mean over rows: eq. 2 of Grill et al. 2020 (BYOL, arXiv 2006.07733), one pair of
    views.

    BYOL adds the losses of the two swapped pairs (not halved). `target` gets no gradient. A batch of one row is
    allowed.

    >>> import torch
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

    p are the predictor's outputs and z the projector's; z gets no gradient. A batch of one row is allowed.

    >>> import torch
    >>> simsiam_loss(*[torch.eye(2)] * 4).item()
    -1.0
    """
    p1, p2, z1, z2 = (F.normalize(z, dim=1) for z in check_rows(1, p1=p1, p2=p2, z1=z1.detach(), z2=z2.detach()))
    return -((p1 * z2).sum(1).mean() + (p2 * z1).sum(1).mean()) / 2
