"""Head and tail (loss/head_tail.py) against the dense logarithm of the Q that it claims to solve, and of the true Q."""

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.information import matrix_log
from matrix_llm.loss import linear, solvers
from matrix_llm.loss.settings import Solver
from matrix_llm.loss.solvers import prepare_embeddings, solve_chunk
from matrix_llm.loss.vocabulary import DIRECTIONS
from matrix_llm.mce import linear_matrix_cross_entropy, token_mce
from tests.support.head_tail import claimed_q
from tests.support.predictions import scale_to_entropy

F64 = torch.float64


def problem(n=5, v=90, d=20, *, scale=2.0, seed=0, zero_vectors=(), spectrum=0.5):
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * torch.arange(1, d + 1, dtype=F64) ** -spectrum
    embeddings[list(zero_vectors)] = 0
    logits = scale * torch.randn(n, v, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    return logits, labels, embeddings


def kept_tokens(q, labels, top_k):
    kept = q.topk(top_k).indices
    missing = ~(kept == labels[:, None]).any(-1)
    kept[missing, -1] = labels[missing]
    return kept


def claimed_value(z, labels, embeddings, top_k):
    """-e_y^T log(Q) e_y of that Q, by the dense logarithm; autograd gives its derivative in every logit."""
    q = z.softmax(-1)
    target = F.normalize(embeddings, dim=-1)[labels]
    log_q = matrix_log(claimed_q(q, kept_tokens(q, labels, top_k), embeddings))
    return -torch.einsum("ni,nij,nj->n", target, log_q, target)


@pytest.mark.parametrize(
    ("top_k", "v", "d", "zero_vectors"),
    [(9, 90, 20, ()), (9, 90, 20, (0, 5, 9)), (1, 37, 13, ()), (16, 90, 40, (80, 81)), (3, 90, DIRECTIONS, ())],
)
def test_value_and_gradient_are_those_of_the_claimed_matrix(top_k, v, d, zero_vectors):
    """Autograd through the dense Q's logarithm, in every logit: each token of the tail has a derivative of its own."""
    logits, labels, embeddings = problem(v=v, d=d, zero_vectors=zero_vectors)
    labels[0], labels[1] = logits[0].argmin(), 7  # the first is unlikely: kept because it is the target
    embeddings[8] = -2 * embeddings[7]  # the same direction: the Gram matrix is singular
    logits[1, 7] = logits[1, 8] = 5.0
    results = []
    for solve in (claimed_value, lambda z, y, e, k: token_mce(z, y, e, steps=99, top_k=k)):
        z = logits.clone().requires_grad_()
        value = solve(z, labels, embeddings, top_k)
        results.append((value.detach(), torch.autograd.grad((value * torch.arange(1, 6)).sum(), z)[0]))
    (expected, expected_grad), (got, grad) = results
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-9)


def test_gradcheck_holds_once_the_steps_exhaust_the_krylov_space_and_not_before():
    """The gradient is the value's own derivative with enough steps; with few, both are approximations."""
    logits, labels, embeddings = problem(n=3, v=40, d=16, seed=2)

    def of(steps):
        return lambda z: token_mce(z, labels, embeddings, steps=steps, top_k=4)

    z = logits.requires_grad_()
    assert torch.autograd.gradcheck(of(16), (z,), rtol=1e-4, atol=1e-6)
    assert not torch.autograd.gradcheck(of(2), (z,), rtol=1e-4, atol=1e-6, raise_exception=False)


def test_the_gradient_in_the_probabilities_sums_to_minus_one():
    """MCE(t q) = MCE(q) - log t, so sum_j q_j g_j = -1 at every position, of the kept tokens and the tail together."""
    logits, labels, embeddings = problem(n=30, v=200, d=30, scale=3.0)
    solver, q = Solver("krylov", 5, 4, None, 6), logits.softmax(-1)
    terms = solve_chunk(
        solver, q, labels, prepare_embeddings(embeddings, solver, F64),
        want_gradient=True, position_weight=None, grad_vectors=None,
    )  # fmt: skip
    in_tail = (q * (terms.kept.form @ terms.kept.features.T)).sum(-1)  # q is 0 at the kept tokens now
    total = in_tail + (terms.kept.q * terms.kept.at_kept).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, -1.0))
    torch.testing.assert_close(terms.mean[:, 0], total)


def test_the_claimed_matrix_has_trace_one_and_is_psd():
    logits, labels, embeddings = problem(n=20, scale=3.0)
    q = logits.softmax(-1)
    big_q = claimed_q(q, kept_tokens(q, labels, 9), embeddings)
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
    for a, b in zip(torch.autograd.grad(got.sum(), z), torch.autograd.grad(exact.sum(), z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


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


@pytest.mark.parametrize(
    ("v", "d", "top_k", "scale", "cap", "biased", "zero_vectors"),
    [
        (90, 20, 9, 1.0, None, False, ()),
        (101, 17, 3, 0.7, 3.0, True, (0, 50)),
        (33, DIRECTIONS + 1, 32, 1.0, None, True, ()),  # one token is the tail
        (47, 8, 1, 2.0, 5.0, False, (46,)),  # the directions span the space
    ],
)
def test_the_fused_pass_has_the_gradients_of_the_claimed_matrix(
    v, d, top_k, scale, cap, biased, zero_vectors, monkeypatch
):
    """CE + MCE of every position, weighted one by one, in hidden states, head and bias, against whole logits."""
    monkeypatch.setattr(linear, "positions_per_chunk", lambda *_, **__: 3)  # 3 + 3 + 1
    monkeypatch.setattr(solvers, "FORM_ELEMENTS", 60)  # 20 tokens of the tail at a time
    _, labels, embeddings = problem(n=7, v=v, d=d, zero_vectors=zero_vectors)
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*shape, dtype=F64, generator=g) for shape in ((7, 11), (v, 11), (v,)))
    position_weight = torch.linspace(-1, 2, 7, dtype=F64)
    results = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)[: 2 + biased]]
        if fused:
            out = linear_matrix_cross_entropy(
                *leaves[:2], labels, bias=leaves[2] if biased else None, embeddings=embeddings, mce_weight=0.7,
                top_k=top_k, steps=99, logit_scale=scale, softcap=cap, reduction="none",
            )  # fmt: skip
            loss = out.loss
        else:
            z = scale * (leaves[0] @ leaves[1].T + (leaves[2] if biased else 0))
            z = z if cap is None else cap * torch.tanh(z / cap)
            loss = F.cross_entropy(z, labels, reduction="none") + 0.7 * claimed_value(z, labels, embeddings, top_k)
        results.append([loss, *torch.autograd.grad(loss, leaves, position_weight)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
