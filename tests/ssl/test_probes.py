"""What every probe must do on features made for it."""

import pytest

pytest.importorskip("sklearn")

from matrix_llm.base.statistics import wilson_interval
from matrix_llm.ssl.evaluation.features import Features
from matrix_llm.ssl.evaluation.linear import few_label_accuracy, linear_accuracy
from matrix_llm.ssl.evaluation.neighbours import knn_accuracy
from tests.support.ssl_features import K, clusters, noise, trained_accuracy

PROBES = {
    "lars": lambda a, b: trained_accuracy(a, b, "lars", 8.0),
    "sgd": lambda a, b: trained_accuracy(a, b, "sgd", 0.3),
    "lbfgs": linear_accuracy,
    "knn": lambda a, b: knn_accuracy(a, b, k=20),
}


@pytest.mark.parametrize("probe", PROBES)
def test_separable_features_are_all_right_and_random_labels_are_at_chance(probe):
    assert PROBES[probe](clusters(300, 0.1), clusters(120, 0.1, seed=1)) == 1.0
    found = PROBES[probe](noise(300), noise(600, seed=1))
    low, high = wilson_interval(round(found * 600), 600)
    assert low - 0.02 < 1 / K < high + 0.02


def test_a_class_whose_training_rows_are_gone_is_wrong_and_no_crash():
    train, test = clusters(60, 0.1), clusters(60, 0.1, seed=1)
    without = Features(train.x[train.y < K - 1], train.y[train.y < K - 1])
    for found in (
        linear_accuracy(without, test),
        knn_accuracy(without, test, k=5),
        *few_label_accuracy(without, test, draws=2),
    ):
        assert found == pytest.approx((K - 1) / K)
