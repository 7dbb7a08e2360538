"""Losses that tell an image's other view from other images: NT-Xent (SimCLR) and InfoNCE with a queue (MoCo).

Legend: B samples (rows), d embedding width, N queue length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.information import outside_autocast
from matrix_llm.ssl.losses.checks import check_positive, check_rows

__all__ = ["moco_loss", "nt_xent_loss"]


@outside_autocast
def nt_xent_loss(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    temperature: float = 0.5,
) -> Tensor:
    """NT-Xent, eq. 1 of Chen et al. 2020 (SimCLR, arXiv 2002.05709), averaged over all 2 B rows as anchors.

    -log exp(s_ij / t) / sum_{k != i} exp(s_ik / t), where s is the cosine and j the other view of i. SimCLR's
    TensorFlow code adds the means over the two views, which is twice this value.

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

    -log exp(q k / t) / (exp(q k / t) + sum_n exp(q queue_n / t)), all rows l2-normalised. `key` and `queue` get no
    gradient.

    Args:
        queue: keys of earlier batches, one a row (MoCo's buffer is the transpose, (d, N)). Add `key` to it after the
            step.

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
