"""Statistics of the LM head's rows, against all pairs."""

import pytest
import torch

from matrix_llm.base.errors import ModelError
from matrix_llm.diagnose import head
from matrix_llm.diagnose.head import describe_rows, nearest_pairs


@pytest.fixture
def vectors(monkeypatch):
    """37 rows in float32: two copies of row 5, two zero rows."""
    monkeypatch.setattr(head, "BLOCK", 10)
    torch.manual_seed(0)
    rows = torch.randn(37, 6) + 0.5
    rows[[11, 30]] = rows[5].clone()
    rows[[8, 36]] = 0.0
    return rows


def unit_rows(vectors):
    rows = vectors.double()
    return torch.nn.functional.normalize(rows[rows.any(-1)], dim=-1)


def test_the_mean_cosine_is_that_of_all_pairs(vectors):
    cosines = unit_rows(vectors) @ unit_rows(vectors).T
    n = len(cosines)
    assert describe_rows(vectors).mean_cosine == pytest.approx((cosines.sum() - n).item() / (n * (n - 1)))


def test_the_effective_rank_is_the_exponential_of_the_spectrums_entropy(vectors):
    unit = unit_rows(vectors)
    share = torch.linalg.svdvals(unit) ** 2 / len(unit)
    assert describe_rows(vectors).effective_rank == pytest.approx(torch.exp(-(share * share.log()).sum()).item())


def test_zero_and_duplicate_rows_are_counted(vectors):
    found = describe_rows(vectors)
    assert (found.rows, found.zero_rows, found.duplicate_rows) == (37, 2, 2)
    vectors[3] = vectors[5] * 2  # the same direction, but another row
    assert describe_rows(vectors).duplicate_rows == 2


def test_norms_are_those_of_the_rows_that_are_not_zero(vectors):
    norms = vectors.double().norm(dim=-1)
    smallest, *_, largest = describe_rows(vectors).norm_quantiles
    assert smallest == pytest.approx(norms[norms > 0].min().item())
    assert largest == pytest.approx(norms.max().item())


def test_nearest_pairs_are_those_of_all_cosines_each_once(vectors):
    tokens = torch.tensor([0, 5, 8, 11, 20])
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    found = nearest_pairs(vectors, tokens)
    assert {frozenset((p.token, p.nearest)) for p in found} >= {frozenset((5, 11))}
    assert found[0].cosine == pytest.approx(1.0)
    assert len({frozenset((p.token, p.nearest)) for p in found}) == len(found)
    assert 8 not in {p.token for p in found}  # a zero row has no direction
    for pair in found:
        others = unit @ unit[pair.token]
        others[[pair.token, 8, 36]] = -2
        assert pair.cosine == pytest.approx(others.max().item(), abs=1e-6)
    assert [p.cosine for p in found] == sorted((p.cosine for p in found), reverse=True)


def test_a_head_of_zeros_is_refused():
    with pytest.raises(ModelError, match="zero"):
        describe_rows(torch.zeros(4, 3))
