"""What MCE forgives, token by token."""

from collections import Counter

import pytest
import torch

from matrix_llm.diagnose import forgiven as module
from matrix_llm.diagnose.forgiven import forgiven
from matrix_llm.diagnose.gradients import LMHead, cross_entropy
from matrix_llm.mce import token_mce


@pytest.fixture
def case():
    torch.manual_seed(0)
    weight, hidden, labels = torch.randn(50, 8), 2 * torch.randn(9, 8), torch.arange(9) % 4
    head = LMHead(weight, None)
    z = head.logits(hidden).double()
    nats = cross_entropy(z, labels) - token_mce(z, labels, weight, solver="exact")
    return hidden, labels, head, weight, nats


def slow(hidden, labels, head, vectors, nats):
    """{(target, token): nats} one by one, from the formula."""
    unit, found = torch.nn.functional.normalize(vectors.double(), dim=-1), Counter()
    for h, y, n in zip(hidden.double(), labels.tolist(), nats.tolist(), strict=True):
        q = torch.softmax(h @ head.weight.double().T, dim=-1)
        weights = {j: (q[j] * (unit[j] @ unit[y]) ** 2).item() for j in range(len(q)) if j != y}
        for j, w in weights.items():
            found[y, j] += n * w / sum(weights.values())
    return found


def test_what_is_forgiven_sums_to_ce_minus_mce_and_follows_the_formula(case, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 50)
    found = forgiven(*case, most=10**6)
    assert sum(pair.nats for pair in found.pairs) == pytest.approx(case[-1].sum().item(), rel=1e-5)
    assert found.nats == pytest.approx(case[-1].mean().item())
    wanted = slow(*case)
    assert {(pair.target, pair.token): pair.nats for pair in found.pairs} == pytest.approx(wanted, rel=1e-4)


def test_shares_by_cosine_are_those_of_the_pairs(case, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 50)
    found = forgiven(*case, most=10**6)
    whole = sum(pair.nats for pair in found.pairs)
    low = sum(pair.nats for pair in found.pairs if abs(pair.cosine) < 0.2) / whole
    assert found.by_cosine["below 0.2"] == pytest.approx(low, abs=1e-4)
    assert sum(found.by_cosine.values()) == pytest.approx(1)
    mean = sum(pair.nats * abs(pair.cosine) for pair in found.pairs) / whole
    assert found.mean_cosine == pytest.approx(mean, rel=1e-4)


def test_nothing_is_forgiven_between_orthogonal_vectors(case):
    hidden, labels, _, _, nats = case
    eye = torch.eye(8)
    found = forgiven(hidden, labels, LMHead(eye, None), eye, 0 * nats)
    assert found.pairs == []
    assert found.mean_cosine is None
