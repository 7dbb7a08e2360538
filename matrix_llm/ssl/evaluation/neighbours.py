"""Weighted nearest neighbours: nothing is trained and nothing is tuned.

Legend: N images, F features, K classes, Q rows compared at a time.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.evaluation.features import Features, class_count, correct_at

__all__ = ["knn_accuracy", "knn_votes"]

SIMILARITIES = 2**26  # numbers held at a time: 256 MiB


def knn_votes(train: Features, test: Features, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """(N, K): for each class, the sum of exp(cosine / temperature) over the k training rows of the largest cosine.

    Wu et al. 2018 (arXiv 1805.01978), section 3.4.

    Raises:
        ProbeError: k is not between 1 and the number of training rows, or the temperature is not above 0.
    """
    if not 1 <= k <= len(train.y):
        raise ProbeError(
            f"k={k} neighbours, but there are {len(train.y)} training images. Give a k between 1 and that."
        )
    if not temperature > 0:
        raise ProbeError(f"temperature={temperature}, but cosines are divided by it. Give a positive number.")
    bank = F.normalize(train.x, dim=1)
    votes = train.x.new_zeros(len(test.y), class_count(train, test))
    rows_at_once = max(SIMILARITIES // len(bank), 1)
    for start in range(0, len(test.y), rows_at_once):
        rows = F.normalize(test.x[start : start + rows_at_once], dim=1)
        cosine, nearest = (rows @ bank.T).topk(k, dim=1)  # (Q, k)
        votes[start : start + rows_at_once].scatter_add_(1, train.y[nearest], (cosine / temperature).exp())
    return votes


def knn_accuracy(train: Features, test: Features, *, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 of `knn_votes`.

    >>> import torch
    >>> corners = Features(torch.eye(2), torch.tensor([0, 1]))
    >>> knn_accuracy(corners, corners, k=1)
    1.0
    """
    return correct_at(knn_votes(train, test, k=k, temperature=temperature), test.y) / len(test.y)
