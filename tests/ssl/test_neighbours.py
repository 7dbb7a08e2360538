"""Nearest neighbours (evaluation/neighbours.py) against the double loop."""

import numpy as np
import pytest
import torch

from matrix_llm.ssl.evaluation.neighbours import knn_accuracy, knn_votes
from tests.support.ssl_features import K, noise


@pytest.mark.parametrize("k", [1, 7, 50])
def test_knn_equals_the_double_loop(k, monkeypatch):
    monkeypatch.setattr(
        "matrix_llm.ssl.evaluation.neighbours.SIMILARITIES", 3 * 50
    )  # three rows at a time: 20 rows leave a rest
    train, test = noise(50), noise(20, seed=1)
    expected = torch.zeros(20, K, dtype=torch.float64)
    for i in range(20):
        cosines = []
        for j in range(50):
            a, b = test.x[i].double(), train.x[j].double()
            cosines.append(float(a @ b / (a.norm() * b.norm())))
        for j in sorted(range(50), key=lambda j: -cosines[j])[:k]:
            expected[i, train.y[j]] += np.exp(cosines[j] / 0.07)
    torch.testing.assert_close(knn_votes(train, test, k=k).double(), expected, rtol=1e-4, atol=1e-6)
    assert knn_accuracy(train, test, k=k) == float((expected.argmax(1) == test.y).double().mean())
