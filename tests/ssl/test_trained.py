"""Probes and fine-tuning by gradient steps (evaluation/trained.py)."""

import torch

from matrix_llm.ssl.evaluation.features import correct_at
from matrix_llm.ssl.evaluation.neighbours import knn_accuracy
from matrix_llm.ssl.evaluation.passes import AugmentedBatches, extract_features
from matrix_llm.ssl.evaluation.trained import fine_tune, lars_reach
from tests.support.ssl_features import TRANSFORM, clusters, striped, tiny_backbone, trained_accuracy


def test_a_lars_probe_with_too_few_steps_stays_at_its_start_and_its_reach_says_so():
    train, test = clusters(300, 0.1), clusters(120, 0.1, seed=1)
    assert lars_reach(0.01, 0.9, 210) < 0.1
    assert trained_accuracy(train, test, "lars", 0.01) < 0.9
    assert lars_reach(8.0, 0.9, 210) > 3


def test_trained_probe_is_the_same_for_the_same_seed():
    assert trained_accuracy(clusters(90, 0.5), clusters(90, 0.5, seed=1), "sgd", 0.1) == trained_accuracy(
        clusters(90, 0.5), clusters(90, 0.5, seed=1), "sgd", 0.1
    )


def test_fine_tuning_changes_the_backbone_and_beats_the_frozen_start():
    train, test = striped(48), striped(80, seed=1)
    backbone = tiny_backbone()
    frozen = [extract_features(backbone, part, TRANSFORM) for part in (train, test)]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    batches = AugmentedBatches(train, TRANSFORM, batch_size=16, seed=0, flip_prob=0.0, crop_scale_min=0.8)
    head = fine_tune(
        backbone, batches, classes=4, epochs=25, steps=3, backbone_learning_rate=0.05, head_learning_rate=0.5,
    )  # fmt: skip
    features = extract_features(backbone, test, TRANSFORM)
    with torch.no_grad():
        tuned = correct_at(head(features.x), features.y) / len(features.y)
    moved = [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]
    assert any("convolution" in name for name in moved)
    assert tuned > knn_accuracy(*frozen, k=5)
    assert tuned > 0.9


def test_a_backbone_learning_rate_of_zero_leaves_the_weights():
    backbone = tiny_backbone()
    before = [p.clone() for p in backbone.parameters()]
    batches = AugmentedBatches(striped(16), TRANSFORM, batch_size=8, seed=0, flip_prob=0.0)
    fine_tune(backbone, batches, classes=4, epochs=1, steps=2, backbone_learning_rate=0.0, head_learning_rate=0.5)
    assert all(torch.equal(p, old) for p, old in zip(backbone.parameters(), before, strict=True))
