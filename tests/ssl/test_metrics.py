"""Effective ranks of batches: against eigenvalues computed in NumPy, and the facts they must satisfy."""

import math

import numpy as np
import pytest
import torch

from matrix_llm.information import effective_rank, matrix_kl
from matrix_llm.ssl.metrics import (
    batch_effective_rank,
    inter_class_effective_rank,
    intra_class_effective_rank,
)

F64 = torch.float64
SIZES = [(9, 4), (4, 9), (5, 5), (6, 1)]


def rows(count, width, seed=0):
    return torch.randn(count, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spectrum(matrix):
    w = np.clip(np.linalg.eigvalsh(matrix), 0, None)
    return w[w > 1e-14]


def erank(matrix):
    """exp of the entropy of the normalised eigenvalues; 0 for a zero matrix."""
    w = spectrum(matrix)
    p = w / w.sum() if len(w) else w
    return math.exp(-(p * np.log(p)).sum()) if len(w) else 0.0


def by_class(features, labels):
    return [features[labels == k].numpy() for k in sorted(set(labels.tolist()))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("center", [True, False])
def test_batch_metrics_equal_the_eigenvalues_of_the_d_by_d_moment(size, center):
    z = rows(*size)
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    unit = unit - unit.mean(0) if center else unit
    moment = unit.T @ unit / len(unit)
    assert batch_effective_rank(z, center=center) == pytest.approx(erank(moment), rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_uncentred_effective_rank_is_proposition_5_1(size):
    """erank = d / exp(MKL(Z^T Z / B || I / d)) at trace 1."""
    z, width = rows(*size), size[1]
    unit = z / z.norm(dim=1, keepdim=True)
    kl = matrix_kl(unit.T @ unit / len(z), torch.eye(width, dtype=F64) / width)
    found = batch_effective_rank(z, center=False)
    assert found == pytest.approx(width / kl.exp().item(), rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_centred_effective_rank_is_proposition_5_1_at_any_trace(size):
    """erank = d T exp(-1 + (1 - MKL) / T), T the trace."""
    z, width = rows(*size), size[1]
    unit = z / z.norm(dim=1, keepdim=True)
    centred = unit - unit.mean(0)
    moment = centred.T @ centred / len(z)
    trace = moment.trace().item()
    kl = matrix_kl(moment, torch.eye(width, dtype=F64) / width).item()
    assert batch_effective_rank(z) == pytest.approx(width * trace * math.exp(-1 + (1 - kl) / trace), rel=1e-9)


@pytest.mark.parametrize("counts", [(7, 7, 7), (2, 9, 3), (4, 1, 6)])
@pytest.mark.parametrize("width", [2, 12])
def test_class_ranks_equal_equations_20_and_21(counts, width):
    labels = torch.cat([torch.full((n,), 10 * k - 5) for k, n in enumerate(counts)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    features, labels = 3 * rows(len(labels), width)[order] + labels[order].unsqueeze(1), labels[order]
    groups = by_class(features, labels)
    within = [erank(np.cov(g.T, bias=True)) for g in groups if len(g) > 1]
    assert intra_class_effective_rank(features, labels) == pytest.approx(np.mean(within), rel=1e-9)
    between = erank(np.cov(np.stack([g.mean(0) for g in groups]).T, bias=True))
    assert inter_class_effective_rank(features, labels) == pytest.approx(between, rel=1e-9)


def test_neural_collapse_has_intra_rank_0_and_inter_rank_k_minus_1():
    """Rows equal to their class mean, and the means the corners of a simplex."""
    labels = torch.arange(5).repeat(3)
    features = torch.eye(5, dtype=F64)[labels]
    assert intra_class_effective_rank(features, labels) == 0
    assert inter_class_effective_rank(features, labels) == pytest.approx(4)


def test_ranks_see_neither_scale_nor_rotation_nor_offset():
    features, labels = rows(12, 4), torch.arange(3).repeat(4)
    moved = 7 * features @ torch.linalg.qr(rows(4, 4, 5)).Q + 3
    for metric in (intra_class_effective_rank, inter_class_effective_rank):
        assert metric(moved, labels) == pytest.approx(metric(features, labels), rel=1e-9)


def test_collapse_reads_one_uncentred_zero_centred_and_uniformity_reads_d():
    same = torch.ones(6, 4, dtype=F64)
    assert batch_effective_rank(same, center=False) == pytest.approx(1)
    assert batch_effective_rank(same) == 0
    axes = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)])
    assert batch_effective_rank(axes) == pytest.approx(4)


def test_a_small_batch_reads_too_low():
    """Isotropic features of 128 dimensions: about 50, 78, 113, 124 at these sizes. Report B with the estimate."""
    found = [batch_effective_rank(rows(count, 128, seed=4)) for count in (64, 128, 512, 2048)]
    assert found == pytest.approx([50, 78, 113, 124], abs=1.5)


def test_half_precision_and_autocast_are_measured_in_float32():
    z = rows(8, 5).float()
    expected = batch_effective_rank(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert batch_effective_rank(z) == expected
    assert batch_effective_rank(z.bfloat16()) == pytest.approx(expected, rel=0.02)
    assert effective_rank(z).dtype == torch.float32


LABELS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: batch_effective_rank(torch.ones(1, 3)), r"1 row\(s\).*at least 2"),
        (lambda: batch_effective_rank(torch.ones(3)), r"\(3,\)"),
        (lambda: batch_effective_rank(torch.full((2, 2), math.nan)), "NaN"),
        (lambda: intra_class_effective_rank(torch.ones(4, 2), LABELS[:3]), "one label each"),
        (lambda: intra_class_effective_rank(torch.ones(4, 2), torch.arange(4)), "single row"),
        (lambda: inter_class_effective_rank(torch.ones(4, 2), torch.zeros(4).long()), "one class"),
        (lambda: inter_class_effective_rank(torch.ones(4, 2), LABELS.float()), "whole numbers"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
