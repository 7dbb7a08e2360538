"""Every fact of the paper's section 2 (with its errata mended) that an implementation must satisfy, in float64."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_llm import information
from matrix_llm.information import (
    effective_rank,
    log_divided_differences,
    matrix_cross_entropy,
    matrix_entropy,
    matrix_kl,
    matrix_log,
    outside_autocast,
    total_coding_rate,
)

F64 = torch.float64
sizes = st.integers(1, 7)
seeds = st.integers(0, 2**31)


def psd(n, *, rank=None, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, n if rank is None else rank, dtype=F64, generator=generator)
    return x @ x.mT / n


def symmetric(a):
    return (a + a.mT) / 2


def unit_rows(samples, width, seed=0):
    z = torch.randn(samples, width, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return z / z.norm(dim=1, keepdim=True)


def test_doctests():
    assert doctest.testmod(information).failed == 0


def test_log_inverts_the_matrix_exponential():
    a = symmetric(torch.randn(3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(matrix_log(torch.linalg.matrix_exp(a)), a, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients_of_everything_pass_gradcheck(n):
    p, q = psd(n, batch=(2,), seed=2), psd(n, batch=(2,), seed=3)
    p, q = (a + 0.1 * torch.eye(n, dtype=F64) for a in (p, q))
    p.requires_grad_()
    q.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda a: matrix_log(symmetric(a)), (q,))
    assert check(lambda a: matrix_log(a, method="taylor", order=5), (q,))
    assert check(lambda a: matrix_entropy(symmetric(a)), (q,))
    assert check(lambda a, b: matrix_cross_entropy(symmetric(a), symmetric(b)), (p, q))
    assert check(lambda a, b: matrix_cross_entropy(symmetric(a), symmetric(b), method="taylor"), (p, q))
    assert check(lambda a, b: matrix_kl(symmetric(a), symmetric(b)), (p, q))
    assert check(effective_rank, (q,))
    z = unit_rows(3, n + 1, seed=4).requires_grad_()
    assert check(lambda a: total_coding_rate(a, eps_squared=0.3), (z,))


def test_gradient_is_right_where_eigenvalues_repeat():
    """At Q = c I, log is differentiable with D log[P] = P / c; autograd through eigh gives NaN here."""
    q = (0.5 * torch.eye(4, dtype=F64)).requires_grad_()
    p = psd(4)
    (grad,) = torch.autograd.grad(matrix_cross_entropy(p, q), q)
    torch.testing.assert_close(grad, torch.eye(4, dtype=F64) - p / 0.5)


def test_gradient_where_two_of_three_eigenvalues_repeat_passes_gradcheck():
    u = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    q = (u @ torch.diag(torch.tensor([2.0, 2.0, 0.5], dtype=F64)) @ u.T).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: matrix_log(symmetric(a)), (q,))


def test_gradient_at_zero_eigenvalues_is_finite_and_lives_on_the_range():
    """P inside the range of a rank-2 Q: the gradient is I - Dlog_Q[P] on the range, I elsewhere."""
    q = psd(5, rank=2, seed=5).requires_grad_()
    value = matrix_cross_entropy(q.detach().clone(), q)
    (grad,) = torch.autograd.grad(value, q)
    w, u = torch.linalg.eigh(q.detach())
    null = u[:, :3]
    assert (w[:3].abs() < 1e-12).all()
    torch.testing.assert_close(grad, null @ null.T, atol=1e-8, rtol=0)  # at P = Q, I - projector on the range
    (grad,) = torch.autograd.grad(matrix_entropy(q), q)
    assert torch.isfinite(grad).all()


def test_gradient_in_q_is_a_finite_difference_not_the_papers_inverse():
    """Proof of prop. 2.6 writes -P Q^-1 + I, true only where P and Q commute."""
    p, q = psd(3, seed=6), (psd(3, seed=7) + 0.2 * torch.eye(3, dtype=F64)).requires_grad_()
    (grad,) = torch.autograd.grad(matrix_cross_entropy(p, q), q)
    papers = torch.eye(3, dtype=F64) - symmetric(p @ torch.linalg.inv(q.detach()))
    assert (grad - papers).abs().max() > 0.05
    commuting = q.detach() @ q.detach()
    (grad,) = torch.autograd.grad(matrix_cross_entropy(commuting, q), q)
    torch.testing.assert_close(grad, torch.eye(3, dtype=F64) - q.detach())


@given(n=sizes, seed=seeds)
@settings(max_examples=50, deadline=None)
def test_kl_is_never_negative_and_zero_at_equality(n, seed):
    p, q = psd(n, seed=seed), psd(n, seed=seed + 1)
    assert matrix_kl(p, q) >= -1e-9
    assert abs(matrix_kl(p, p.clone()).item()) < 1e-9


@given(n=sizes, seed=seeds, t=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_kl_is_jointly_convex(n, seed, t):
    p0, q0, p1, q1 = (psd(n, seed=seed + i) for i in range(4))
    mixed = matrix_kl(t * p0 + (1 - t) * p1, t * q0 + (1 - t) * q1)
    assert mixed <= t * matrix_kl(p0, q0) + (1 - t) * matrix_kl(p1, q1) + 1e-8


@given(n=sizes, seed=seeds, t=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_cross_entropy_is_convex_in_q_and_smallest_at_p(n, seed, t):
    p, q0, q1 = (psd(n, seed=seed + i) for i in range(3))
    mixed = matrix_cross_entropy(p, t * q0 + (1 - t) * q1)
    assert mixed <= t * matrix_cross_entropy(p, q0) + (1 - t) * matrix_cross_entropy(p, q1) + 1e-8
    assert matrix_cross_entropy(p, p.clone()) <= mixed + 1e-8
    torch.testing.assert_close(matrix_cross_entropy(p, p.clone()), matrix_entropy(p), atol=1e-9, rtol=1e-9)


def test_cross_entropy_is_kl_plus_entropy():
    p, q = psd(4, seed=8), psd(4, seed=9)
    torch.testing.assert_close(matrix_cross_entropy(p, q), matrix_kl(p, q) + matrix_entropy(p))


def test_cross_entropy_is_infinite_outside_the_range_and_finite_inside():
    q = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    inside, outside = torch.diag(torch.tensor([0.5, 0.0], dtype=F64)), torch.diag(torch.tensor([0.5, 0.5], dtype=F64))
    assert matrix_cross_entropy(inside, q).item() == pytest.approx(1.0)
    assert matrix_cross_entropy(outside, q).item() == math.inf
    assert matrix_entropy(q).item() == pytest.approx(1.0)  # 0 log 0 = 0


@pytest.mark.parametrize(("samples", "width"), [(9, 4), (4, 9), (1, 3), (5, 1)])
def test_effective_rank_equals_proposition_5_1(samples, width):
    z = unit_rows(samples, width, seed=samples)
    c = z.T @ z / samples
    eye = torch.eye(width, dtype=F64) / width
    torch.testing.assert_close(effective_rank(c), width / matrix_kl(c, eye).exp())
    assert 1 - 1e-9 <= effective_rank(c) <= min(samples, width) + 1e-9


def test_effective_rank_takes_singular_values_of_rectangles_and_zero():
    z = torch.diag(torch.tensor([3.0, 3.0, 3.0], dtype=F64))[:, :2]
    assert effective_rank(z).item() == pytest.approx(2)
    assert effective_rank(torch.zeros(3, 3, dtype=F64)).item() == 0
    low = psd(6, rank=2).requires_grad_()
    (grad,) = torch.autograd.grad(effective_rank(low), low)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("samples", "width"), [(9, 4), (4, 9), (1, 3)])
def test_theorem_3_1_with_its_factor_and_sign_restored(samples, width):
    z, eps_squared = unit_rows(samples, width, seed=samples), 0.37
    lam = eps_squared / width
    eye = torch.eye(width, dtype=F64)
    tcr = total_coding_rate(z, eps_squared=eps_squared)
    p, q = (1 / width + lam) * eye, z.T @ z / samples + lam * eye
    expected = (1 + width * lam) * (-math.log(lam) + 1 - 2 / width * tcr)
    torch.testing.assert_close(matrix_cross_entropy(p, q), expected)
    expected = (1 + width * lam) * (math.log((1 + width * lam) / (lam * width)) - 2 / width * tcr)
    torch.testing.assert_close(matrix_kl(p, q), expected)


def test_taylor_converges_near_the_identity_and_not_near_zero():
    near = torch.eye(4, dtype=F64) + 0.2 * symmetric(
        torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    )
    exact = matrix_log(near)
    errors = [(matrix_log(near, method="taylor", order=k) - exact).norm().item() for k in (1, 2, 4, 8, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10
    tiny = torch.eye(4, dtype=F64) / 2048
    # The trap of eq. 12 taken literally: order 4 gives -2.08 where log(1/2048) = -7.62.
    assert matrix_log(tiny, method="taylor", order=4)[0, 0].item() == pytest.approx(-2.08, abs=0.01)
    assert matrix_log(tiny)[0, 0].item() == pytest.approx(-7.62, abs=0.01)


@given(a=st.floats(1e-12, 1e3), ratio=st.floats(1 - 1e-6, 1e9))
@settings(max_examples=200, deadline=None)
def test_divided_differences_lose_no_digits(a, ratio):
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    b = a * ratio
    got = log_divided_differences(torch.tensor([a, b], dtype=F64))[0, 1].item()
    x, y = Decimal(a), Decimal(b)
    expected = 1 / x if x == y else (x.ln() - y.ln()) / (x - y)
    assert got == pytest.approx(float(expected), rel=1e-13)


def test_functions_take_batches_and_keep_dtype():
    p, q = psd(3, batch=(2, 1)).float(), psd(3, batch=(4,), seed=1).float()
    value = matrix_cross_entropy(p, q)
    assert value.shape == (2, 4)
    assert value.dtype == torch.float32
    for i in range(2):
        for j in range(4):
            torch.testing.assert_close(value[i, j], matrix_cross_entropy(p[i, 0], q[j]))
    assert total_coding_rate(torch.randn(2, 5, 3), eps_squared=1.0).shape == (2,)


def test_autocast_does_not_round_the_products():
    p, q = psd(8, seed=1).float(), psd(8, seed=2).float()
    expected = matrix_cross_entropy(p, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matrix_cross_entropy(p, q), expected)
    with pytest.raises(RuntimeError, match="unsupported"):  # by autocast: the device is that of a tensor given by name
        outside_autocast(lambda a: a)(a=torch.empty(1, device="meta"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: matrix_log(torch.diag(torch.tensor([1.0, -0.5]))), "not positive semi-definite.*-0.5"),
        (lambda: matrix_log(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (lambda: matrix_log(torch.full((2, 2), torch.nan)), "NaN"),
        (lambda: matrix_log(torch.ones(2, 3)), r"\(2, 3\)"),
        (lambda: matrix_log(torch.eye(2), method="pade"), "'eigh'"),
        (lambda: matrix_log(torch.eye(2), method="taylor", order=0), "order=0"),
        (lambda: matrix_cross_entropy(torch.eye(2), torch.eye(3)), "one n"),
        (lambda: total_coding_rate(torch.ones(2, 3), eps_squared=0.0), "eps_squared=0.0"),
        (lambda: effective_rank(torch.ones(3)), r"\(3,\)"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_each_matrix_of_a_batch_is_checked_by_itself():
    batch = torch.stack([torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1e9 * torch.eye(2)])
    with pytest.raises(ValueError, match="not symmetric"):
        matrix_log(batch)
    assert matrix_entropy(torch.zeros(0, 3, 3)).shape == (0,)


def test_a_second_derivative_is_refused_rather_than_wrong():
    a = psd(3).requires_grad_()
    (grad,) = torch.autograd.grad(matrix_entropy(a), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_half_precision_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"\.float\(\)"):
        matrix_log(torch.eye(2, dtype=torch.bfloat16))
