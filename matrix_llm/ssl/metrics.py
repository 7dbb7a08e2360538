"""How much of its space a representation uses: the effective rank of a batch, within classes and between classes.

An estimate from B rows is biased low (128 isotropic dimensions: 50, 78, 113, 124 at B = 64, 128, 512, 2048), so
report B with it. Nothing here has gradients. The spectrum is that of the smaller of the (d, d) second moment and the
(B, B) Gram matrix, which share their non-zero eigenvalues.

Legend: B samples (rows), d embedding width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.base.errors import NonFiniteRowsError, ProbeError
from matrix_llm.information import effective_rank

__all__ = [
    "batch_effective_rank",
    "class_effective_ranks",
    "inter_class_effective_rank",
    "intra_class_effective_rank",
]


def batch_effective_rank(features: Tensor, *, center: bool = True) -> float:
    """erank(C(Z, Z)) of l2-normalised rows, section 5.

    Args:
        features: (B, d), any norm.
        center: subtract the batch mean, as the losses do. False gives Z^T Z / B, which has trace 1, so that prop. 5.1
            holds: erank = d / exp(MKL(Z^T Z / B || I / d)). An offset that all rows share then counts as a direction.

    Returns:
        1 to min(B - 1, d), or to min(B, d) where not centred; 0 if all rows are equal and the mean is subtracted.

    >>> round(batch_effective_rank(torch.eye(4), center=False), 4)
    4.0
    """
    z = F.normalize(_check_features(features, 2 if center else 1), dim=1)
    return float(effective_rank(_second_moment(z - z.mean(0) if center else z)))


def intra_class_effective_rank(
    features: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
) -> float:
    """1/K sum_k erank(1/n_k sum_{i in k} (z_i - mean_k)(z_i - mean_k)^T), eq. 20: how many directions a class varies
    in.

    Args:
        features: (B, d), taken as they are, not normalised.
        labels: (B,) whole numbers, any values.

    Returns:
        The mean over classes with at least two rows; a class whose rows are all equal counts 0.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [5.0, 1.0], [5.0, -1.0]])
    >>> round(intra_class_effective_rank(z, torch.tensor([0, 0, 1, 1])), 4)
    1.0
    """
    features = _check_features(features, 2)
    index = _class_index(features, labels)
    classes = [features[index == k] for k in range(int(index.max()) + 1)]
    ranks = [effective_rank(_second_moment(rows - rows.mean(0))) for rows in classes if len(rows) > 1]
    if not ranks:
        raise ProbeError(
            f"each of the {len(classes)} classes has a single row, so none varies. Give at least two rows of some "
            "class."
        )
    return float(torch.stack(ranks).mean())


def inter_class_effective_rank(
    features: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
) -> float:
    """erank(1/K sum_k (mean_k - mean)(mean_k - mean)^T), eq. 21: how many directions the class means span, at most K
    - 1.

    Args:
        features: (B, d), taken as they are, not normalised.
        labels: (B,) whole numbers, any values. `mean` is the mean of the class means, so that every class counts the
            same; it is the mean of all rows where the classes are equally large.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(inter_class_effective_rank(z, torch.tensor([0, 1, 2, 3])), 4)
    2.0
    """
    features = _check_features(features, 2)
    index = _class_index(features, labels)
    counts = torch.bincount(index)
    if len(counts) < 2:
        raise ProbeError(
            "all rows are of one class, but the inter-class effective rank compares the means of at least two."
        )
    means = features.new_zeros(len(counts), features.shape[1]).index_add_(0, index, features) / counts.unsqueeze(1)
    return float(effective_rank(_second_moment(means - means.mean(0))))


def class_effective_ranks(
    features: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
) -> dict[str, float]:
    """Intra- and inter-class effective rank, without those that are undefined: no class has two rows, or there is one
    class.

    >>> list(class_effective_ranks(torch.eye(2), torch.tensor([0, 1])))
    ['inter_class_effective_rank']
    """
    counts = torch.bincount(_class_index(features, labels))
    found = {}
    if int(counts.max()) > 1:
        found["intra_class_effective_rank"] = intra_class_effective_rank(features, labels)
    if len(counts) > 1:
        found["inter_class_effective_rank"] = inter_class_effective_rank(features, labels)
    return found


def _check_features(
    features: Tensor,  # (B, d)
    minimum: int,
) -> Tensor:
    """The features without gradients, in at least float32.

    Raises:
        ValueError: another shape or dtype.
        ProbeError: fewer than `minimum` rows.
        NonFiniteRowsError: NaN or infinity.
    """
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(f"features must be (B, d) floating-point rows, not {tuple(features.shape)} {features.dtype}.")
    if len(features) < minimum:
        raise ProbeError(
            f"features has {len(features)} row(s), but a spectrum over samples needs at least {minimum}. Give more "
            "images."
        )
    features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    if not torch.isfinite(features).all():
        raise NonFiniteRowsError(f"features of shape {tuple(features.shape)} hold NaN or infinity.")
    return features


def _class_index(features: Tensor, labels: Tensor) -> Tensor:
    """(B,) the class of each row, 0 to K - 1."""
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels is {tuple(labels.shape)}, but {len(features)} rows need one label each.")
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}, but classes are whole numbers.")
    return labels.to(features.device).unique(return_inverse=True)[1]


def _second_moment(
    z: Tensor,  # (B, d)
) -> Tensor:
    """Z^T Z / B, or Z Z^T / B where that is smaller: the same trace and the same non-zero eigenvalues."""
    with torch.autocast(z.device.type, enabled=False):
        return (z @ z.T if z.shape[0] < z.shape[1] else z.T @ z) / len(z)
