"""The solver's error against the reference, and the reference against the dense logarithm."""

import pytest
import torch

from matrix_llm.diagnose.accuracy import count_affordable, mce_loss, measure_solver, spread_by_ce
from matrix_llm.diagnose.gradients import LMHead, cross_entropy, evaluate
from matrix_llm.loss.settings import LossSettings
from matrix_llm.mce import linear_matrix_cross_entropy


def measure(settings, weight=0.5):
    torch.manual_seed(0)
    head = LMHead(torch.randn(200, 40) + 0.3, None)
    hidden, labels = 0.3 * torch.randn(12, 40), torch.arange(12) * 16
    ce = evaluate(cross_entropy, hidden, labels, head)
    solved = evaluate(mce_loss(settings, head.weight), hidden, labels, head)
    return measure_solver(solved, ce, hidden, labels, head, head.weight, weight), (hidden, labels, head)


def test_the_exact_solver_has_no_error_and_the_reference_is_the_dense_logarithm():
    (found, _), _ = measure(LossSettings(solver="exact"))
    assert "dense logarithm" in found.reference_check
    assert max(found.reference_value, found.reference_logits) < 1e-5
    assert max(found.hidden, found.head, abs(found.sum_of_values)) < 1e-4


@pytest.mark.parametrize("settings", [LossSettings(steps=2), LossSettings(solver="taylor"), LossSettings(top_k=4)])
def test_errors_are_those_of_the_products_own_loss(settings):
    (found, _), (hidden, labels, head) = measure(settings)
    grads, sums = [], []
    for options in (
        {"solver": settings.solver, "steps": settings.steps, "top_k": settings.top_k},
        {"solver": "exact"},
    ):
        h, w = hidden.double().requires_grad_(), head.weight.double().requires_grad_()
        out = linear_matrix_cross_entropy(h, w, labels, mce_weight=0.5, reduction="sum", **options)
        grads.append(torch.autograd.grad(out.loss, (h, w)))
        sums.append(out.matrix_cross_entropy.sum().item())
    for mine, place in ((found.hidden, 0), (found.head, 1)):
        wanted = ((grads[0][place] - grads[1][place]).norm() / grads[1][place].norm()).item()
        assert mine == pytest.approx(wanted, rel=1e-3)
    assert found.sum_of_values == pytest.approx(sums[0] / sums[1] - 1, rel=1e-3)
    assert sum(each.positions for each in found.by_ce.values()) == 12


def test_a_wide_vocabulary_is_referenced_on_fewer_positions_that_cover_all_of_ce():
    assert count_affordable(480, 1000, 64) == 480
    assert count_affordable(480, 256000, 4096) == 32
    assert count_affordable(10, 256000, 4096) == 10
    assert spread_by_ce(torch.tensor([5.0, 0.1, 3.0, 1.0, 2.0]), 3).tolist() == [1, 4, 0]
