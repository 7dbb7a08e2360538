"""`Features`, the input of every probe; how scores are counted; and how many directions features use.

None of these numbers means anything alone: compare them with raw pixels and with the same network at random
initialisation.

Legend: N images, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.metrics import batch_effective_rank, class_effective_ranks

__all__ = ["Features", "check_classes", "class_count", "correct_at", "effective_ranks"]


@dataclass(frozen=True)
class Features:
    """The features of one split's images, in their order, without the images that could not be read.

    Raises:
        ProbeError: shapes that do not fit, or NaN or infinity.
    """

    x: Tensor  # (N, F) float32, the features
    y: Tensor  # (N,) int64, the labels, 0 to K - 1
    skipped: tuple[str, ...] = ()  # the reason for each image left out

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != self.x.shape[:1] or not len(self.y):
            raise ProbeError(
                f"features {tuple(self.x.shape)} and labels {tuple(self.y.shape)} do not fit: give (N, F) rows and "
                "(N,) labels."
            )
        if not torch.isfinite(self.x).all():  # every comparison with NaN is false, which would count as some answer
            raise ProbeError(
                f"the features of shape {tuple(self.x.shape)} hold NaN or infinity: the network has diverged."
            )


def check_classes(
    train: Tensor,  # (N,) labels
    test: Tensor,  # (N,)
    names: list[str] | None = None,
) -> int:
    """K, the number of classes, after a check that every class of the test part can be learned.

    Raises:
        ProbeError: a negative label, a single class, or a class of the test part without a training image.
    """
    if min(int(train.min()), int(test.min())) < 0:
        raise ProbeError(
            "some labels are negative, which means that they are unknown. Leave these images out, or take a labelled "
            "split."
        )
    if missing := sorted(set(test.tolist()) - set(train.tolist())):
        shown = ", ".join(names[k] if names else str(k) for k in missing[:5])
        raise ProbeError(
            f"{len(missing)} class(es) of the test images have no training image: {shown}. "
            "Add some, or remove these classes from the test."
        )
    if len(set(train.tolist())) < 2:
        raise ProbeError(
            "all training images are of one class, so any classifier is right. Give images of at least two."
        )
    return int(train.max()) + 1


def class_count(train: Features, test: Features) -> int:
    """K. A class none of whose training images could be read still counts: it gets no score, so its images count as
    wrong.
    """
    return int(max(train.y.max(), test.y.max())) + 1


def correct_at(
    scores: Tensor,  # (N, K)
    y: Tensor,  # (N,)
    k: int = 1,
) -> int:
    """How many rows have their class among the k best scores. A tie counts as wrong: a constant output knows nothing.

    >>> correct_at(torch.tensor([[0.1, 0.9], [0.5, 0.5]]), torch.tensor([1, 0]))
    1
    """
    own = scores.gather(1, y[:, None])
    return int(((~(scores < own)).sum(1) <= k).sum())  # ~(<) instead of >=: a comparison with NaN then counts as a tie


def effective_ranks(
    features: Tensor,  # (N, F)
    labels: Tensor,  # (N,)
) -> dict[str, float | int | None]:
    """Effective rank of all rows, within and between classes (eq. 20, 21), and N: an estimate from few rows is too low.

    None where a rank is undefined: no class has two rows, or there is one class.

    >>> effective_ranks(torch.eye(2), torch.tensor([0, 1]))["intra_class_effective_rank"] is None
    True
    """
    return {
        "effective_rank": batch_effective_rank(features),
        "intra_class_effective_rank": None,
        "inter_class_effective_rank": None,
        **class_effective_ranks(features, labels),
        "effective_rank_batch_size": len(features),
    }
