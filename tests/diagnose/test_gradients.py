"""Losses compared by their gradients: against dense float64 autograd, for every kind of LM head."""

import pytest
import torch

from matrix_llm.diagnose import gradients
from matrix_llm.diagnose.accuracy import mce_loss
from matrix_llm.diagnose.gradients import LMHead, agreement, cross_entropy, evaluate, overlap, sum_agreement
from matrix_llm.loss.settings import LossSettings
from matrix_llm.mce import token_mce
from tests.support.dense_gradients import case, slow_reference
from tests.support.tiny import V

GROUP = torch.tensor([0, 3, 4, 9])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "cohere", "granite", "phi"])
def test_values_and_gradients_are_those_of_dense_float64_autograd(name, monkeypatch):
    monkeypatch.setattr(gradients, "COLUMNS", 40)  # V = 96 is no multiple
    monkeypatch.setattr(gradients, "CHUNK_BYTES", 8 * V * 4)  # 4 positions: 11 is no multiple
    model, ids, hidden, labels = case(name)
    head = LMHead.of(model)
    vectors = head.weight.clone()
    ours = [
        evaluate(cross_entropy, hidden, labels, head),
        evaluate(mce_loss(LossSettings(solver="exact"), vectors), hidden, labels, head),
    ]
    losses = [cross_entropy, lambda z, y: token_mce(z, y, vectors.double(), solver="exact")]
    slow = [slow_reference(model, ids, labels, loss, GROUP) for loss in losses]
    for mine, (values, in_hidden, _) in zip(ours, slow, strict=True):
        torch.testing.assert_close(mine.value, values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.hidden, in_hidden, rtol=2e-3, atol=2e-4)
    for a in (0, 1):
        for b in (0, 1):
            in_hidden, in_head = overlap(ours[a], ours[b], hidden).of(GROUP)
            wanted_hidden = (slow[a][1][GROUP] * slow[b][1][GROUP]).sum().item()
            assert in_hidden == pytest.approx(wanted_hidden, rel=2e-3)
            assert in_head == pytest.approx((slow[a][2] * slow[b][2]).sum().item(), rel=2e-3)


def test_cosine_and_norm_of_a_loss_and_of_the_sum_are_those_of_the_vectors():
    torch.manual_seed(0)
    a, b = torch.randn(2, 50, dtype=torch.float64)
    products = (a @ a).item(), (a @ b).item(), (b @ b).item()
    for found, other in ((agreement(*products), b), (sum_agreement(*products, 0.7), a + 0.7 * b)):
        assert found.cosine == pytest.approx(torch.cosine_similarity(a, other, dim=0).item())
        assert found.norm_ratio == pytest.approx((other.norm() / a.norm()).item())


def test_a_zero_gradient_has_no_cosine():
    assert agreement(0.0, 0.0, 1.0).norm_ratio is None
    assert agreement(1.0, 0.0, 0.0) == gradients.Agreement(None, 0.0)
