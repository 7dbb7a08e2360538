"""Passes over images (evaluation/passes.py): features of a frozen network, and augmented batches."""

import pytest
import torch

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.evaluation.passes import AugmentedBatches, extract_features
from tests.support.ssl_features import TRANSFORM, striped, tiny_backbone


def test_unreadable_images_are_left_out_and_named():
    images = striped(20, broken=(3, 9))
    features = extract_features(None, images, TRANSFORM, batch_size=6)
    assert len(features.y) == 18
    assert torch.equal(features.y, images.labels[[i for i in range(20) if i not in (3, 9)]])
    assert [text.split(" ")[0] for text in features.skipped] == ["class3/3.png", "class1/9.png"]
    batches = AugmentedBatches(images, TRANSFORM, batch_size=10, seed=0, flip_prob=0.0)
    assert sum(len(y) for epoch in (0, 1) for _, y in batches(epoch)) == 36
    assert len(batches.skipped) == 2
    with pytest.raises(ProbeError, match="none of the 4 images"):
        extract_features(None, striped(4, broken=range(4)), TRANSFORM)


def test_features_do_not_depend_on_batch_size_or_mode_and_leave_the_mode():
    backbone = tiny_backbone().train()
    a, b = (extract_features(backbone, striped(11), TRANSFORM, batch_size=size).x for size in (4, 11))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert backbone.training


def test_augmented_batches_repeat_for_a_seed_and_change_with_the_epoch():
    def crops(seed, epoch, flip_prob=0.0):
        return next(AugmentedBatches(striped(12), TRANSFORM, batch_size=12, seed=seed, flip_prob=flip_prob)(epoch))

    assert torch.equal(crops(0, 1)[0], crops(0, 1)[0])
    assert not torch.equal(crops(0, 1)[0], crops(0, 2)[0])
    assert not torch.equal(crops(0, 1)[0], crops(1, 1)[0])
    assert torch.equal(crops(0, 1, 1.0)[0], crops(0, 1)[0].flip(-1))
    assert crops(0, 1)[0].shape == (12, 1, 8, 8)
