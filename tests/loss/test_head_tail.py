"""Head and tail (loss/head_tail.py) against the dense logarithm of the Q that it claims to solve, and of the true Q."""

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.information import matrix_log
from matrix_llm.loss.vocabulary import DIRECTIONS, summarise
from matrix_llm.mce import token_mce
from tests.support.predictions import scale_to_entropy

F64 = torch.float64


def problem(n=5, v=90, d=20, *, scale=2.0, seed=0, zero_vectors=(), spectrum=0.5):
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * torch.arange(1, d + 1, dtype=F64) ** -spectrum
    embeddings[list(zero_vectors)] = 0
    logits = scale * torch.randn(n, v, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    return logits, labels, embeddings


def claimed_q(q, kept, embeddings):
    """The module's Q as a function of the kept tokens' probabilities and of one factor on the tail (given as 1)."""
    e, u = F.normalize(embeddings, dim=-1), summarise(embeddings, F64).directions
    (v, d), p = e.shape, u.shape[1]
    others = 1 - torch.zeros(len(q), v, dtype=F64).scatter(1, kept, 1.0)
    tail = torch.einsum("nv,vi,vj->nij", q * others, e @ u, e @ u)
    mass = (q * others * e.square().sum(-1)).sum(-1)
    left = (mass - tail.diagonal(dim1=1, dim2=2).sum(-1)) / (d - p)
    tail = u @ tail @ u.T + left[:, None, None] * (torch.eye(d, dtype=F64) - u @ u.T)

    def of(q_kept, factor):
        exact = torch.einsum("ns,nsi,nsj->nij", q_kept, e[kept], e[kept])
        return exact + factor[:, None, None] * tail

    return of, mass


def kept_tokens(q, labels, top_k):
    kept = q.topk(top_k).indices
    missing = ~(kept == labels[:, None]).any(-1)
    kept[missing, -1] = labels[missing]
    return kept


@pytest.mark.parametrize("zero_vectors", [(), (0, 5, 9)])
def test_value_and_gradient_are_those_of_the_claimed_matrix(zero_vectors):
    """Autograd through the dense Q's logarithm; the tail's tokens share the derivative in the tail's factor."""
    logits, labels, embeddings = problem(zero_vectors=zero_vectors)
    labels[0], labels[1] = logits[0].argmin(), 7  # the first is unlikely: kept because it is the target
    embeddings[8] = -2 * embeddings[7]  # the same direction: the Gram matrix is singular
    logits[1, 7] = logits[1, 8] = 5.0
    q, top_k = logits.softmax(-1), 9
    kept = kept_tokens(q, labels, top_k)
    q_kept = q.gather(1, kept).requires_grad_()
    factor = torch.ones(len(q), dtype=F64, requires_grad=True)
    of, mass = claimed_q(q, kept, embeddings)
    target = F.normalize(embeddings, dim=-1)[labels]
    expected = -torch.einsum("ni,nij,nj->n", target, matrix_log(of(q_kept, factor)), target)
    d_kept, d_tail = torch.autograd.grad(expected.sum(), [q_kept, factor])
    g = (d_tail / mass)[:, None].expand_as(q).scatter(1, kept, d_kept)
    mean = (q_kept * d_kept).sum(-1, keepdim=True) + d_tail[:, None]

    z = logits.requires_grad_()
    got = token_mce(z, labels, embeddings, steps=99, top_k=top_k)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), z)[0], q * (g - mean), rtol=1e-7, atol=1e-9)


def test_the_claimed_matrix_has_trace_one_and_is_psd():
    logits, labels, embeddings = problem(n=20, scale=3.0)
    q = logits.softmax(-1)
    kept = kept_tokens(q, labels, 9)
    of, _ = claimed_q(q, kept, embeddings)
    big_q = of(q.gather(1, kept), torch.ones(20, dtype=F64))
    torch.testing.assert_close(big_q.diagonal(dim1=1, dim2=2).sum(-1), torch.ones(20, dtype=F64))
    assert torch.linalg.eigvalsh(big_q).min() > -1e-15


@pytest.mark.parametrize("d", [1, 5, DIRECTIONS])
def test_it_is_exact_where_the_directions_span_the_space(d):
    """With D <= p the tail's second moment is exact, however few tokens are kept."""
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
    logits = scale_to_entropy(logits, entropy)
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


def test_more_kept_tokens_come_closer():
    logits, labels, embeddings = problem(n=40, v=300, d=40, scale=1.5)
    exact = token_mce(logits, labels, embeddings, solver="exact")
    errors = [
        (token_mce(logits, labels, embeddings, top_k=s, steps=12) - exact).abs().mean().item() for s in (4, 16, 64, 200)
    ]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.1 * errors[0]
