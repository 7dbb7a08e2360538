"""Which training images' labels a probe can use, drawn from a seed and independent of any model.

Legend: N images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from matrix_llm.base.errors import ProbeError

__all__ = ["class_balanced_split", "few_label_draws"]


def few_label_draws(
    y: Tensor,  # (N,)
    *,
    labels_per_class: int,
    draws: int,
    seed: int = 0,
) -> list[np.ndarray]:
    """For each draw, the indices of `labels_per_class` rows of each class. More draws do not change the first ones.

    Raises:
        ProbeError: a class with fewer rows, or a count below 1.

    >>> few_label_draws(torch.tensor([0, 1, 0, 1]), labels_per_class=2, draws=1)[0].tolist()
    [0, 1, 2, 3]
    """
    if labels_per_class < 1 or draws < 1:
        raise ProbeError(f"labels_per_class={labels_per_class} and draws={draws} must be at least 1.")
    _, places = _places_of_classes(y)
    if (fewest := min(map(len, places))) < labels_per_class:
        raise ProbeError(
            f"labels_per_class={labels_per_class}, but the smallest class has {fewest} training image(s). "
            "Ask for at most that many."
        )
    found = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, labels_per_class, draw])
        found.append(np.sort(np.concatenate([rng.choice(rows, labels_per_class, replace=False) for rows in places])))
    return found


def class_balanced_split(
    y: Tensor,  # (N,)
    percent: float,
    seed: int,
    *,
    equal: bool = True,
) -> Tensor:
    """Sorted indices of about `percent` % of the rows, at least one of each class.

    With the same seed, a smaller percentage is a subset of a larger one.

    Args:
        percent: above 0 and at most 100.
        equal: the same number from each class, as in the ImageNet splits of SimCLR; otherwise `percent` % of each
            class.

    Raises:
        ProbeError: percent is out of range, or a class has too few rows.

    >>> class_balanced_split(torch.tensor([0, 0, 1, 1]), 50, seed=0).shape
    torch.Size([2])
    """
    if not 0 < percent <= 100:
        raise ProbeError(f"percent={percent} must be a share of the training images, above 0 and at most 100.")
    rng, chosen = np.random.default_rng(seed), []
    classes, places = _places_of_classes(y)
    for k, rows in zip(classes, places, strict=True):
        count = max(round((len(y) / len(places) if equal else len(rows)) * percent / 100), 1)
        if count > len(rows):
            raise ProbeError(
                f"percent={percent} takes {count} image(s) of each class, but class {k} has {len(rows)}. "
                "Give a smaller percent, or a list of files with --split."
            )
        chosen.append(rng.permutation(rows)[:count])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _places_of_classes(y: Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    """The classes in order, and the indices of each one's rows."""
    labels = y.cpu().numpy()
    classes = np.unique(labels)
    return classes, [np.flatnonzero(labels == k) for k in classes]
