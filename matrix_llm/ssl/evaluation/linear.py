"""Logistic regression on standardised features, solved to the optimum: the quick linear probe.

Legend: N images, F features, K classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.evaluation.features import Features, class_count, correct_at
from matrix_llm.ssl.evaluation.label_draws import class_balanced_split, few_label_draws

__all__ = ["choose_c", "few_label_accuracy", "linear_accuracy", "linear_scores"]

CS = tuple(10.0**power for power in range(-4, 3))  # values that choose_c tries


def linear_accuracy(train: Features, test: Features, *, C: float = 1.0) -> float:
    """Top-1 of `linear_scores`.

    >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    >>> line = Features(x, torch.tensor([0, 0, 1, 1]))
    >>> linear_accuracy(line, line)
    1.0
    """
    return correct_at(linear_scores(train, test, C=C), test.y.cpu()) / len(test.y)


def linear_scores(train: Features, test: Features, *, C: float = 1.0) -> Tensor:
    """(N, K) scores of min_W 1/C · |W|²/2 + sum_i cross-entropy_i, on features standardised by the training rows; on
    the CPU.

    Raises:
        ProbeError: C is not positive, or scikit-learn is not installed.
    """
    if not C > 0:
        raise ProbeError(f"C={C}, but the penalty is divided by it. Give a positive number.")
    x, z = _standardise(train.x, test.x)
    return _logistic_scores(x, train.y.cpu().numpy(), z, C=C, classes=class_count(train, test))


def choose_c(train: Features, *, seed: int = 0) -> float:
    """The C of 1e-4, ..., 100 that is best on a fifth of the training rows; of equals, the smallest.

    Raises:
        ProbeError: a class of one row.
    """
    # 1. A fifth of each class is held out.
    held_out = class_balanced_split(train.y, 20, seed, equal=False)
    is_held = torch.zeros(len(train.y), dtype=torch.bool)
    is_held[held_out] = True
    rest, held = (
        Features(train.x[mask.to(train.x.device)], train.y[mask.to(train.y.device)]) for mask in (~is_held, is_held)
    )
    if set(held.y.tolist()) - set(rest.y.tolist()):
        raise ProbeError(
            "a class has one training image, which cannot be both trained on and held out. Give C a number."
        )
    # 2. The best C on it
    return max(CS, key=lambda C: (linear_accuracy(rest, held, C=C), -C))


def few_label_accuracy(
    train: Features, test: Features, *, labels_per_class: int = 5, draws: int = 20, seed: int = 0, C: float = 1.0
) -> list[float]:
    """Top-1 for each draw of a few labels per class: it separates good features where the other probes saturate.

    Features are standardised by all training rows: that needs no label, and five rows would give a poor estimate.

    Raises:
        ProbeError: see `few_label_draws`.
    """
    x, z = _standardise(train.x, test.x)
    y, classes = train.y.cpu().numpy(), class_count(train, test)
    chosen = few_label_draws(train.y, labels_per_class=labels_per_class, draws=draws, seed=seed)
    scores = (_logistic_scores(x[rows], y[rows], z, C=C, classes=classes) for rows in chosen)
    return [correct_at(s, test.y.cpu()) / len(test.y) for s in scores]


def _standardise(train: Tensor, *others: Tensor) -> list[np.ndarray]:
    """Subtract the mean of `train` and divide by its deviation. A feature that never varies there becomes 0."""
    rows = train.cpu().double()
    mean, std = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0.0)  # instead of a division by almost nothing
    return [((x.cpu().double() - mean) * scale).numpy() for x in (train, *others)]


def _logistic_scores(x: np.ndarray, y: np.ndarray, test: np.ndarray, *, C: float, classes: int) -> Tensor:
    """(N, K) of a multinomial logistic regression on rows x; -inf for a class that is not in y."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ProbeError(
            "this probe needs scikit-learn, which is not installed: pip install 'matrix-llm[ssl]'."
        ) from None
    found = LogisticRegression(C=C, max_iter=2000).fit(x, y)
    scores = found.decision_function(test)
    if scores.ndim == 1:  # two classes: one score, for the second
        scores = np.stack([-scores, scores], axis=1)
    out = torch.full((len(test), classes), -math.inf, dtype=torch.float64)
    out[:, torch.from_numpy(found.classes_)] = torch.from_numpy(scores)
    return out
