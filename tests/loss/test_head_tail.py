"""Head and tail (head_tail.py) against the dense logarithm of the Q that it claims to solve, and against the true one."""

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.information import matrix_log
from matrix_llm.loss.head_tail import DIRECTIONS, inverse_norms, likeliest, summarise
from matrix_llm.mce import token_mce

F64 = torch.float64


def problem(n=5, v=90, d=20, *, scale=2.0, seed=0, zero_rows=(), spectrum=0.5):
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * torch.arange(1, d + 1, dtype=F64) ** -spectrum
    embeddings[list(zero_rows)] = 0
    logits = scale * torch.randn(n, v, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    return logits, labels, embeddings


def claimed_q(q, ids, embeddings):
    """The module's Q of each position as a function of the head's probabilities and of one factor on the tail (given as 1)."""
    e, u = F.normalize(embeddings, dim=-1), summarise(embeddings, F64).directions
    (v, d), p = e.shape, u.shape[1]
    others = 1 - torch.zeros(len(q), v, dtype=F64).scatter(1, ids, 1.0)
    tail = torch.einsum("nv,vi,vj->nij", q * others, e @ u, e @ u)
    mass = (q * others * e.square().sum(-1)).sum(-1)
    left = (mass - tail.diagonal(dim1=1, dim2=2).sum(-1)) / (d - p)
    tail = u @ tail @ u.T + left[:, None, None] * (torch.eye(d, dtype=F64) - u @ u.T)

    def of(q_head, factor):
        head = torch.einsum("ns,nsi,nsj->nij", q_head, e[ids], e[ids])
        return head + factor[:, None, None] * tail

    return of, mass


def head_of(q, labels, top_k):
    ids = q.topk(top_k).indices
    missing = ~(ids == labels[:, None]).any(-1)
    ids[missing, -1] = labels[missing]
    return ids


@pytest.mark.parametrize("zero_rows", [(), (0, 5, 9)])
def test_value_and_gradient_are_those_of_the_claimed_matrix(zero_rows):
    """Eigendecomposition and autograd through the dense Q; the tail's tokens share the derivative in the tail's factor."""
    logits, labels, embeddings = problem(zero_rows=zero_rows)
    labels[0], labels[1] = logits[0].argmin(), 7  # the first is no likely token: forced into the head
    embeddings[8] = -2 * embeddings[7]  # the same direction: the Gram matrix is singular
    logits[1, 7] = logits[1, 8] = 5.0
    q, top_k = logits.softmax(-1), 9
    ids = head_of(q, labels, top_k)
    q_head = q.gather(1, ids).requires_grad_()
    factor = torch.ones(len(q), dtype=F64, requires_grad=True)
    of, mass = claimed_q(q, ids, embeddings)
    target = F.normalize(embeddings, dim=-1)[labels]
    expected = -torch.einsum("ni,nij,nj->n", target, matrix_log(of(q_head, factor)), target)
    d_head, d_tail = torch.autograd.grad(expected.sum(), [q_head, factor])
    g = (d_tail / mass)[:, None].expand_as(q).scatter(1, ids, d_head)
    mean = (q_head * d_head).sum(-1, keepdim=True) + d_tail[:, None]

    z = logits.requires_grad_()
    got = token_mce(z, labels, embeddings, steps=99, top_k=top_k)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), z)[0], q * (g - mean), rtol=1e-7, atol=1e-9)


def test_the_claimed_matrix_has_trace_one_and_is_psd():
    logits, labels, embeddings = problem(n=20, scale=3.0)
    q = logits.softmax(-1)
    ids = head_of(q, labels, 9)
    of, _ = claimed_q(q, ids, embeddings)
    big_q = of(q.gather(1, ids), torch.ones(20, dtype=F64))
    torch.testing.assert_close(big_q.diagonal(dim1=1, dim2=2).sum(-1), torch.ones(20, dtype=F64))
    assert torch.linalg.eigvalsh(big_q).min() > -1e-15


@pytest.mark.parametrize("d", [1, 5, DIRECTIONS])
def test_it_is_exact_where_the_directions_span_the_space(d):
    """With D <= p the tail's second moment is whole, however few tokens the head has."""
    logits, labels, embeddings = problem(d=d)
    z = logits.requires_grad_()
    exact = token_mce(z, labels, embeddings, solver="exact")
    got = token_mce(z, labels, embeddings, top_k=2, steps=99)
    torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("scale", "seed"), [(0.1, 0), (1.0, 1), (3.0, 2), (8.0, 3), (30.0, 4)])
def test_it_never_exceeds_cross_entropy(scale, seed):
    """Q dominates q_y e_y e_y^T, and the logarithm is operator monotone."""
    logits, labels, embeddings = problem(n=64, v=400, d=40, scale=scale, seed=seed)
    ce = F.cross_entropy(logits, labels, reduction="none")
    for dtype, slack in ((F64, 1e-9), (torch.float32, 1e-5)):
        value = token_mce(logits.to(dtype), labels, embeddings.to(dtype), top_k=8)
        assert (value <= ce * (1 + slack) + slack).all()
        assert (value >= -slack).all()


@pytest.mark.parametrize("spectrum", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("entropy", [1.0, 2.5])
def test_sixteen_tokens_hold_half_a_percent_in_the_value_and_two_in_the_gradient(spectrum, entropy):
    """Where CE <= 2, against the dense logarithm, labels drawn from the predictions: twice better than is asked for."""
    g = torch.Generator().manual_seed(0)
    v, d, n = 2000, 64, 100
    scales = torch.arange(1, d + 1, dtype=F64) ** -spectrum
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * scales
    embeddings = embeddings / embeddings.norm(dim=1).mean() + 0.3 * F.normalize(
        torch.randn(d, dtype=F64, generator=g), dim=0
    )
    logits = (torch.randn(n, d, dtype=F64, generator=g) * scales) @ embeddings.T
    low, high = 0.0, 1000.0
    for _ in range(40):  # the temperature of this mean entropy
        scale = (low + high) / 2
        found = torch.distributions.Categorical(logits=scale * logits).entropy().mean()
        low, high = (scale, high) if found > entropy else (low, scale)
    logits = scale * logits
    labels = torch.multinomial(logits.softmax(-1), 1, generator=g).squeeze(1)
    keep = F.cross_entropy(logits, labels, reduction="none") <= 2
    results = []
    for kwargs in ({"solver": "exact"}, {"top_k": 16}):
        z = logits[keep].requires_grad_()
        value = token_mce(z, labels[keep], embeddings, **kwargs)
        results.append((value.detach(), torch.autograd.grad(value.sum(), z)[0]))
    (exact, exact_grad), (value, grad) = results
    counted = exact > 1e-3
    assert counted.sum() > 40
    assert ((value - exact).abs() / exact)[counted].mean() < 0.005
    assert ((grad - exact_grad).norm(dim=1) / exact_grad.norm(dim=1))[counted].mean() < 0.02


def test_a_larger_head_is_closer():
    logits, labels, embeddings = problem(n=40, v=300, d=40, scale=1.5)
    exact = token_mce(logits, labels, embeddings, solver="exact")
    errors = [
        (token_mce(logits, labels, embeddings, top_k=s, steps=12) - exact).abs().mean().item() for s in (4, 16, 64, 200)
    ]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize(
    ("v", "count"), [(37, 5), (512, 16), (1023, 16), (1025, 16), (5003, 16), (5003, 64), (5003, 200)]
)
def test_likeliest_is_topk(v, count):
    z = torch.randn(7, v, dtype=F64, generator=torch.Generator().manual_seed(v))
    z[0, -3:] = 9  # in the columns that fill no group
    z[1, : 2 * count : 2] = torch.arange(count, dtype=F64) + 5  # neighbours
    values, ids = likeliest(z, count)
    expected = z.topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(z.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())


def test_likeliest_of_many_in_one_group():
    """Tokens of one residue modulo the number of groups share a group; all of them are found."""
    z = torch.zeros(1, 5120)
    z[0, 3::512] = torch.arange(10.0) + 1
    assert likeliest(z, 8)[0].tolist() == [[10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]]


@pytest.mark.parametrize("norm", [1e-30, 1.0, 1e25])
def test_norms_of_any_size_neither_vanish_nor_overflow_in_float32(norm):
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    rows[2] = 0
    expected = inverse_norms(rows.double(), F64)
    torch.testing.assert_close(inverse_norms(rows * norm, torch.float32).double() * norm, expected, rtol=1e-5, atol=0)
    assert inverse_norms(rows, torch.float32)[2] == 0
    rows[1, 3] = torch.nan
    assert torch.isnan(inverse_norms(rows, torch.float32)).nonzero().flatten().tolist() == [1]


def test_summary_spans_the_leading_directions_and_counts_no_zero_row():
    """Against the dense eigendecomposition of the vocabulary's second moment."""
    _, _, embeddings = problem(v=2000, d=64, spectrum=1.0, zero_rows=range(5))
    summary = summarise(embeddings, F64)
    e = F.normalize(embeddings, dim=-1)
    energy = torch.linalg.eigvalsh(e.T @ e)
    captured = (summary.coordinates**2).sum()
    assert captured > 0.99 * energy[-DIRECTIONS:].sum()
    torch.testing.assert_close(summary.directions.T @ summary.directions, torch.eye(DIRECTIONS, dtype=F64))
    torch.testing.assert_close(summary.coordinates, e @ summary.directions)
    assert summary.features[:, -1].sum() == 1995
    again = summarise(embeddings, F64)
    assert all(torch.equal(a, b) for a, b in zip(summary, again, strict=True))


def test_summary_does_not_depend_on_the_norms_of_the_rows():
    _, _, embeddings = problem(v=300, d=30)
    scaled = embeddings * torch.logspace(-3, 3, 300, dtype=F64)[:, None]
    a, b = summarise(embeddings, F64), summarise(scaled, F64)
    torch.testing.assert_close(a.features, b.features, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summary_of_half_precision_rows_is_that_of_the_same_rows_widened(dtype):
    _, _, embeddings = problem(v=300, d=30)
    a, b = summarise(embeddings.to(dtype), torch.float32), summarise(embeddings.to(dtype).float(), torch.float32)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_autocast_rounds_no_product_of_the_summary():
    """The trainer makes it inside autocast; CUDA has no QR of half precision and would refuse it."""
    source = torch.randn(1500, 64, generator=torch.Generator().manual_seed(0))
    outside = summarise(source, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = summarise(source, torch.float32)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
