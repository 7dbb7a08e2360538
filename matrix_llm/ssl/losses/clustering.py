"""SwAV: predict from one view the cluster that the other view is assigned to, with clusters of equal size.

Legend: B samples (rows), M prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.information import outside_autocast
from matrix_llm.ssl.losses.checks import check_positive, check_rows

__all__ = ["sinkhorn", "swav_loss"]


@torch.no_grad()
def sinkhorn(
    scores: Tensor,  # (B, M)
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Assignments Q = diag(u) exp(scores / epsilon) diag(v), eq. 5 of Caron et al. 2020 (SwAV): every prototype gets
    B / M rows.

    Computed in logarithms, so that exp(1 / 0.05) does not overflow and small weights do not vanish. Each iteration
    balances the prototypes, then the rows.

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
    """Swapped prediction, eq. 1 and 2 of Caron et al. 2020 (SwAV, arXiv 2006.09882), halved as in the paper's
    pseudo-code.

    -1/2 mean over rows of sum_m (q2 log softmax(scores1 / t) + q1 log softmax(scores2 / t)), with
    q = `sinkhorn(scores)`. Written from the paper, because the released code is CC-BY-NC.

    Args:
        scores1, scores2: cosines of the rows with the M prototypes, for two crops of the same images.

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
