"""benchmarks/solver_accuracy.py: errors over all positions, against autograd through the exact solver."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.solver_accuracy import FUSED, Predictions, measure_head, token_vectors
from matrix_llm.diagnose.gradients import LMHead
from matrix_llm.mce import linear_matrix_cross_entropy

F64 = torch.float64
SETTINGS = {
    "exact": {"solver": "exact"},
    "whole vocabulary, 2 steps": {"steps": 2},
    "whole vocabulary, 6 steps": {"steps": 6},
    "top 16 and tail, 6 steps": {"top_k": 16, "steps": 6},
}


def predictions(v=1200, h=20, n=24):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(v, h, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    hidden = 0.3 * weight[labels] + 0.3 * torch.randn(n, h, dtype=F64, generator=g)
    bias = torch.randn(v, dtype=F64, generator=g)
    return Predictions(hidden, LMHead(weight, bias, 0.9, 9.0), labels, [str(i) for i in labels.tolist()])


def test_errors_are_over_all_positions_and_through_scale_cap_and_bias():
    given = predictions()
    result = measure_head("own", given, SETTINGS, exact_positions=3)
    rows = {row["solver"]: row for row in result["table"]}
    assert sum(result["positions by CE"].values()) == result["positions"] == 24
    assert max(result["reference against exact, value and gradient"]) < 1e-6
    for column in ("mean |error|", "hidden", "head", "MCE alone", "worst"):
        assert rows["exact"][column] < 1e-6
        assert rows["whole vocabulary, 6 steps"][column] < 0.3 * rows["whole vocabulary, 2 steps"][column]
    for column in ("sum of values", "mean |error|", "hidden", "head", "worst"):
        assert rows[FUSED][column] == pytest.approx(rows["top 16 and tail, 6 steps"][column], rel=0.01)

    # the sums, straight from the fused pass in float64
    found = []
    for settings in ({"solver": "exact"}, {"top_k": 16, "steps": 6}):
        hidden = given.hidden.clone().requires_grad_()
        out = linear_matrix_cross_entropy(
            hidden, given.head.weight, given.labels, bias=given.head.bias, logit_scale=0.9, softcap=9.0,
            reduction="sum", **settings,
        )  # fmt: skip
        found.append((out.matrix_cross_entropy, torch.autograd.grad(out.loss, hidden)[0]))
    (exact, exact_grad), (value, grad) = found
    row = rows["top 16 and tail, 6 steps"]
    assert row["sum of values"] == pytest.approx((value.sum() / exact.sum() - 1).item(), rel=1e-4)
    assert row["hidden"] == pytest.approx(((grad - exact_grad).norm() / exact_grad.norm()).item(), rel=1e-4)
    assert len(row["worst positions"]) == 5
    assert 0 < sum(w["share"] for w in row["worst positions"]) < 1


def test_clusters_are_near_duplicates():
    vectors = token_vectors("clusters", predictions().head.weight)
    cosine = vectors @ vectors.T
    alike = (cosine > 0.996).sum(1)  # two vectors within 0.999 of one centre are within about 0.998 of each other
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-12
    assert alike.double().mean() > 4


def test_centred_vectors_are_those_of_the_head_minus_their_mean():
    weight = predictions().head.weight
    torch.testing.assert_close(token_vectors("centred", weight), F.normalize(weight - weight.mean(0), dim=-1))
