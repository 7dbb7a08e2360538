"""Logistic regression on features (evaluation/linear.py)."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.augment import EvalTransform
from matrix_llm.ssl.data import load_images
from matrix_llm.ssl.evaluation.features import Features
from matrix_llm.ssl.evaluation.linear import choose_c, few_label_accuracy, linear_scores
from matrix_llm.ssl.evaluation.passes import extract_features
from tests.support.ssl_features import K, clusters


def test_a_constant_feature_changes_nothing():
    train, test = clusters(60, 0.5), clusters(60, 0.5, seed=1)
    more = [
        Features(torch.cat([part.x, torch.full((60, 1), value)], 1), part.y)
        for part, value in ((train, 3.0), (test, 1e6))
    ]
    torch.testing.assert_close(linear_scores(*more), linear_scores(train, test))


def test_chosen_c_is_smaller_where_the_labels_are_noise():
    train = clusters(240, 0.3)
    flipped = Features(
        train.x,
        torch.where(torch.rand(240, generator=torch.Generator().manual_seed(0)) < 0.6, (train.y + 1) % K, train.y),
    )
    assert choose_c(flipped) < 100
    assert choose_c(train) == choose_c(train)
    with pytest.raises(ProbeError, match="one training image"):
        choose_c(Features(torch.randn(3, 2), torch.tensor([0, 0, 1])))


def test_few_label_accuracy_grows_with_labels_and_reaches_one():
    train, test = clusters(300, 0.35), clusters(300, 0.35, seed=1)
    one, ten = (np.mean(few_label_accuracy(train, test, labels_per_class=n, draws=10)) for n in (1, 10))
    assert one < ten
    assert few_label_accuracy(clusters(60, 0.01), clusters(60, 0.01, seed=1), labels_per_class=1, draws=3) == [1.0] * 3


def test_few_labels_on_digits_are_told_apart():
    parts = []
    for split in ("train", "test"):
        pixels = extract_features(None, load_images("digits", split=split), EvalTransform(8, 1))
        lift = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        parts.append(Features((pixels.x @ lift).relu(), pixels.y))
    assert 0.75 < np.mean(few_label_accuracy(*parts, labels_per_class=5, draws=20)) < 0.9
