"""Which labels a probe may see (evaluation/label_draws.py): balanced, nested, the same for every model."""

import numpy as np
import torch

from matrix_llm.ssl.evaluation.label_draws import class_balanced_split, few_label_draws
from tests.support.ssl_features import K, clusters, noise


def test_splits_are_class_balanced_disjoint_from_the_rest_and_nested():
    y = torch.cat([torch.zeros(50), torch.ones(70), torch.full((80,), 2.0)]).long()[torch.randperm(200)]
    ten, thirty = class_balanced_split(y, 10, 0), class_balanced_split(y, 30, 0)
    assert torch.bincount(y[ten]).tolist() == [7, 7, 7]
    assert torch.bincount(y[thirty]).tolist() == [20, 20, 20]
    assert torch.equal(ten, class_balanced_split(y, 10, 0))
    assert not torch.equal(ten, class_balanced_split(y, 10, 1))
    assert set(ten.tolist()) < set(thirty.tolist())
    assert len(set(thirty.tolist())) == len(thirty)
    assert torch.bincount(y[class_balanced_split(y, 0.01, 0)]).tolist() == [1, 1, 1]
    assert torch.bincount(y[class_balanced_split(y, 20, 0, equal=False)]).tolist() == [10, 14, 16]


def test_few_label_draws_are_the_same_for_two_models_and_differ_between_draws_and_seeds():
    train = clusters(120, 0.1)
    a = few_label_draws(train.y, labels_per_class=3, draws=4, seed=0)
    b = few_label_draws(noise(120).y * 0 + train.y, labels_per_class=3, draws=4, seed=0)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(np.bincount(train.y[rows]).tolist() == [3] * K for rows in a)
    assert len({tuple(rows) for rows in [*a, *few_label_draws(train.y, labels_per_class=3, draws=4, seed=1)]}) == 8
    assert np.array_equal(
        a[1], few_label_draws(train.y, labels_per_class=3, draws=2, seed=0)[1]
    )  # more draws leave the first as they are
