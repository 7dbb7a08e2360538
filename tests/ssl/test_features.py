"""Features and their labels (evaluation/features.py): what counts as right, and what is refused."""

import pytest
import torch

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.evaluation.features import Features, check_classes, correct_at, effective_ranks
from matrix_llm.ssl.metrics import batch_effective_rank, inter_class_effective_rank, intra_class_effective_rank
from tests.support.ssl_features import noise


def test_ties_and_nan_count_as_wrong():
    y = torch.tensor([0, 2])
    assert correct_at(torch.ones(2, 3), y) == 0
    assert correct_at(torch.full((2, 3), float("nan")), y, 2) == 0
    assert correct_at(torch.tensor([[3.0, 2, 1], [3, 2, 1]]), y, 1) == 1
    assert correct_at(torch.tensor([[3.0, 2, 1], [3, 2, 1]]), y, 3) == 2
    with pytest.raises(ProbeError, match="diverged"):
        Features(torch.tensor([[float("inf")]]), torch.tensor([0]))


def test_effective_ranks_are_those_of_metrics_with_the_batch_size():
    part = noise(60)
    assert effective_ranks(part.x, part.y) == {
        "effective_rank": batch_effective_rank(part.x),
        "intra_class_effective_rank": intra_class_effective_rank(part.x, part.y),
        "inter_class_effective_rank": inter_class_effective_rank(part.x, part.y),
        "effective_rank_batch_size": 60,
    }
    assert effective_ranks(part.x, torch.zeros(60, dtype=torch.long))["inter_class_effective_rank"] is None


def test_a_class_missing_in_training_is_named():
    with pytest.raises(ProbeError, match="no training image: owl"):
        check_classes(torch.tensor([0, 1]), torch.tensor([0, 2]), ["cat", "dog", "owl"])
    with pytest.raises(ProbeError, match="negative"):
        check_classes(torch.tensor([0, 1]), torch.tensor([0, -1]))
    with pytest.raises(ProbeError, match="one class"):
        check_classes(torch.tensor([1, 1]), torch.tensor([1]))
