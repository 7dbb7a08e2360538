"""The vocabulary's norms, its summary and its likeliest tokens (loss/vocabulary.py)."""

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.loss.vocabulary import DIRECTIONS, find_likeliest, inverse_norms, summarise

F64 = torch.float64


def token_vectors(v=90, d=20, *, seed=0, spectrum=0.5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(v, d, dtype=F64, generator=g) * torch.arange(1, d + 1, dtype=F64) ** -spectrum


@pytest.mark.parametrize(
    ("v", "count"), [(37, 5), (512, 16), (1023, 16), (1025, 16), (5003, 16), (5003, 64), (5003, 200)]
)
def test_find_likeliest_is_topk(v, count):
    z = torch.randn(7, v, dtype=F64, generator=torch.Generator().manual_seed(v))
    z[0, -3:] = 9  # in the columns that fill no group
    z[1, : 2 * count : 2] = torch.arange(count, dtype=F64) + 5  # neighbours
    values, ids = find_likeliest(z, count)
    expected = z.topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(z.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())


def test_find_likeliest_finds_many_in_one_group():
    """Tokens of one residue modulo the number of groups share a group; all of them are found."""
    z = torch.zeros(1, 5120)
    z[0, 3::512] = torch.arange(10.0) + 1
    assert find_likeliest(z, 8)[0].tolist() == [[10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]]


@pytest.mark.parametrize("norm", [1e-30, 1.0, 1e25])
def test_norms_of_any_size_neither_vanish_nor_overflow_in_float32(norm):
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    rows[2] = 0
    expected = inverse_norms(rows.double(), F64)
    torch.testing.assert_close(inverse_norms(rows * norm, torch.float32).double() * norm, expected, rtol=1e-5, atol=0)
    assert inverse_norms(rows, torch.float32)[2] == 0
    rows[1, 3] = torch.nan
    assert torch.isnan(inverse_norms(rows, torch.float32)).nonzero().flatten().tolist() == [1]


def test_summary_spans_the_leading_directions_and_counts_no_zero_vector():
    """Against the dense eigendecomposition of the vocabulary's second moment."""
    embeddings = token_vectors(v=2000, d=64, spectrum=1.0)
    embeddings[:5] = 0
    summary = summarise(embeddings, F64)
    e = F.normalize(embeddings, dim=-1)
    energy = torch.linalg.eigvalsh(e.T @ e)
    captured = (summary.coordinates**2).sum()
    assert captured > 0.99 * energy[-DIRECTIONS:].sum()
    torch.testing.assert_close(summary.directions.T @ summary.directions, torch.eye(DIRECTIONS, dtype=F64))
    torch.testing.assert_close(summary.coordinates, e @ summary.directions)
    assert summary.features[:, -1].sum() == 1995
    again = summarise(embeddings, F64)
    assert summary.centre is None
    assert all(torch.equal(a, b) for a, b in zip(summary[:4], again[:4], strict=True))


def test_summary_does_not_depend_on_the_norms_of_the_vectors():
    embeddings = token_vectors(v=300, d=30)
    scaled = embeddings * torch.logspace(-3, 3, 300, dtype=F64)[:, None]
    a, b = summarise(embeddings, F64), summarise(scaled, F64)
    torch.testing.assert_close(a.features, b.features, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summary_of_half_precision_vectors_is_that_of_the_same_vectors_widened(dtype):
    embeddings = token_vectors(v=300, d=30)
    a, b = summarise(embeddings.to(dtype), torch.float32), summarise(embeddings.to(dtype).float(), torch.float32)
    for x, y in zip(a[:4], b[:4], strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_autocast_rounds_no_product_of_the_summary():
    """The trainer makes it inside autocast; CUDA has no QR of half precision and would refuse it."""
    source = torch.randn(1500, 64, generator=torch.Generator().manual_seed(0))
    outside = summarise(source, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = summarise(source, torch.float32)
    for a, b in zip(inside[:4], outside[:4], strict=True):
        assert torch.equal(a, b)


def test_directions_are_those_of_the_whole_vocabulary_and_not_of_its_first_tokens():
    """Ids are sorted by frequency: here the first 4,096 tokens vary in other directions than the 12,288 after them."""
    frequent, rare = torch.zeros(16384, 40, dtype=F64).split([4096, 12288])
    g = torch.Generator().manual_seed(0)
    frequent[:, :12] = torch.randn(4096, 12, dtype=F64, generator=g)
    rare[:, 20:32] = torch.randn(12288, 12, dtype=F64, generator=g)
    embeddings = torch.cat([frequent, rare])
    e = F.normalize(embeddings, dim=-1)
    energy = torch.linalg.eigvalsh(e.T @ e)
    captured = summarise(embeddings, F64).coordinates.square().sum()
    assert captured > 0.9 * energy[-DIRECTIONS:].sum()
