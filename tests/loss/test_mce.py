"""Token-level matrix cross-entropy against the dense definition, in float64, at awkward sizes."""

import doctest
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from matrix_llm import mce
from matrix_llm.information import matrix_cross_entropy
from matrix_llm.mce import token_mce
from tests.support.predictions import scale_to_entropy

F64 = torch.float64
EVERYTHING = {"steps": 999, "sketch_dim": None, "top_k": None}  # krylov until the space is exhausted: exact


def problem(n=5, v=37, d=11, *, scale=2.0, seed=0, zero_vectors=()):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, v, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    embeddings = torch.randn(v, d, dtype=F64, generator=g)
    embeddings[list(zero_vectors)] = 0
    return logits, labels, embeddings


def dense_mce(logits, labels, embeddings):
    """The definition, written out without the package: eigendecomposition in float64, one position at a time."""
    e = F.normalize(embeddings.to(F64), dim=-1)
    values = []
    for q, y in zip(torch.softmax(logits.to(F64), -1), labels, strict=True):
        w, u = torch.linalg.eigh(e.T @ torch.diag(q) @ e)
        values.append(-((u.T @ e[y]) ** 2 * w.clamp(min=1e-18).log()).sum())
    return torch.stack(values) if values else logits.new_zeros(0, dtype=F64)


def value_and_gradients(logits, labels, embeddings, **kwargs):
    z, e = logits.clone().requires_grad_(), embeddings.clone().requires_grad_()
    value = token_mce(z, labels, e, **kwargs)
    weights = torch.arange(1, len(labels) + 1, dtype=value.dtype)  # unequal, so that a lost factor shows
    return value.detach(), *torch.autograd.grad((value * weights).sum(), [z, e])


def test_doctests():
    assert doctest.testmod(mce).failed == 0


def test_exact_is_the_definition_of_section_7():
    logits, labels, embeddings = problem()
    e = F.normalize(embeddings, dim=-1)
    q = torch.einsum("nv,vi,vj->nij", logits.softmax(-1), e, e)
    p = torch.einsum("ni,nj->nij", e[labels], e[labels])
    expected = matrix_cross_entropy(p, q) - 1  # tr Q = 1 is dropped (eq. 16)
    torch.testing.assert_close(token_mce(logits, labels, embeddings, solver="exact"), expected)
    torch.testing.assert_close(
        token_mce(logits, labels, embeddings, solver="exact"), dense_mce(logits, labels, embeddings)
    )


@pytest.mark.parametrize(
    "kwargs", [{"solver": "exact"}, EVERYTHING, {"steps": 999, "top_k": 36}], ids=["exact", "krylov", "top_k"]
)
def test_gradcheck_in_logits_and_embeddings(kwargs):
    logits, labels, embeddings = problem(n=2, v=7, d=3)
    if "top_k" in kwargs:
        kwargs = {**kwargs, "top_k": 7}
    assert torch.autograd.gradcheck(
        lambda z, e: token_mce(z, labels, e, **kwargs), (logits.requires_grad_(), embeddings.requires_grad_())
    )


@pytest.mark.parametrize(("n", "v", "d"), [(1, 37, 11), (5, 37, 11), (3, 5, 11), (4, 64, 1), (2, 1, 4), (7, 130, 16)])
def test_krylov_is_exact_once_the_space_is_exhausted(n, v, d):
    args = problem(n, v, d, seed=v)
    for got, expected in zip(
        value_and_gradients(*args, **EVERYTHING), value_and_gradients(*args, solver="exact"), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)


def test_krylov_converges_to_exact_in_value_and_gradients():
    args = problem(n=16, v=300, d=24, seed=3)
    exact = value_and_gradients(*args, solver="exact")
    for i in range(3):
        errors = []
        for steps in (2, 3, 4, 6, 8, 12, 16, 24):
            got = value_and_gradients(*args, solver="krylov", steps=steps)
            errors.append(((got[i] - exact[i]).norm() / exact[i].norm()).item())
        assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
        assert errors[-1] < 1e-10


def test_head_and_tail_converge_to_exact_as_more_tokens_are_kept():
    args = problem(n=16, v=300, d=24, seed=4)
    exact = value_and_gradients(*args, solver="exact")
    for i in range(3):
        errors = []
        for top_k in (8, 32, 128, 300):
            got = value_and_gradients(*args, steps=24, top_k=top_k)
            errors.append(((got[i] - exact[i]).norm() / exact[i].norm()).item())
        assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
        assert errors[-1] < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-4), (torch.float32, 2e-3)])
def test_more_kept_tokens_than_dimensions_do_not_lose_the_basis_to_rounding(dtype, tolerance):
    """299 of 300 tokens, D = 24: the coefficients of the 24th basis vector would grow by seven orders of magnitude."""
    for seed in (4, 7, 10):
        logits, labels, embeddings = problem(n=16, v=300, d=24, seed=seed)
        exact = value_and_gradients(logits, labels, embeddings, solver="exact")
        got = value_and_gradients(logits.to(dtype), labels, embeddings.to(dtype), steps=24, top_k=299)
        assert all((a - b).norm() < tolerance * b.norm() for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("entropy", [1.7, 3.5])
def test_the_default_holds_one_percent_in_the_value_and_five_in_the_gradient_ten_times_over(entropy):
    """Where CE <= 2, on vectors with a power-law spectrum and labels drawn from the predictions (docs/solvers.md)."""
    g = torch.Generator().manual_seed(0)
    v, d, n = 1000, 64, 200
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * 1 / torch.arange(1, d + 1, dtype=F64)
    hidden = torch.randn(n, d, dtype=F64, generator=g) @ torch.diag(1 / torch.arange(1, d + 1, dtype=F64))
    logits = hidden @ embeddings.T
    logits = scale_to_entropy(logits, entropy)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=g).squeeze(1)
    keep = F.cross_entropy(logits, labels, reduction="none") <= 2
    exact, exact_grad, _ = value_and_gradients(logits[keep], labels[keep], embeddings, solver="exact")
    value, grad, _ = value_and_gradients(logits[keep], labels[keep], embeddings)
    counted = exact > 1e-3
    assert counted.sum() > 50
    assert ((value - exact).abs() / exact)[counted].mean() < 0.001
    assert ((grad - exact_grad).norm(dim=1) / exact_grad.norm(dim=1))[counted].mean() < 0.005


def test_the_target_is_always_kept():
    """An unlikely target outside the top k would otherwise sit in the shared tail and lose its own direction."""
    logits, _, embeddings = problem(n=1, v=50, d=8)
    label = logits.argmin(-1)
    logits[0, label] = -4
    exact = token_mce(logits, label, embeddings, solver="exact")
    assert (token_mce(logits, label, embeddings, top_k=40, steps=8) / exact - 1).abs() < 0.1


def test_a_position_does_not_depend_on_its_neighbours():
    logits, labels, embeddings = problem(n=6, v=300, d=24)
    for kwargs in ({}, {"top_k": 32}, {"sketch_dim": 12}, {"solver": "taylor"}):
        together = token_mce(logits, labels, embeddings, **kwargs)
        alone = torch.cat([token_mce(logits[i : i + 1], labels[i : i + 1], embeddings, **kwargs) for i in range(6)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_taylor_is_the_truncated_series_and_does_not_converge_here():
    logits, labels, embeddings = problem(n=4, v=60, d=16)
    e = F.normalize(embeddings, dim=-1)
    q = torch.einsum("nv,vi,vj->nij", logits.softmax(-1), e, e)
    residual = torch.eye(16, dtype=F64) - q
    series = sum(torch.linalg.matrix_power(residual, m) / m for m in range(1, 5))
    expected = torch.einsum("ni,nij,nj->n", e[labels], series, e[labels])
    torch.testing.assert_close(token_mce(logits, labels, embeddings, solver="taylor", order=4), expected)
    z, ee = logits.requires_grad_(), embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: token_mce(a, labels, b, solver="taylor", order=3), (z, ee))
    exact = dense_mce(logits.detach(), labels, embeddings.detach())
    assert ((expected - exact).abs() / exact).mean() > 0.1


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 4),
    v=st.integers(1, 40),
    d=st.integers(1, 12),
    scale=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    solver=st.sampled_from(["exact", "krylov"]),
)
@settings(max_examples=100, deadline=None)
def test_sandwich_bounds_hold_at_every_position(seed, n, v, d, scale, solver):
    """-log sum_j q_j cos^2 <= MCE <= CE (Jensen on the left, operator monotonicity on the right)."""
    logits, labels, embeddings = problem(n, v, d, scale=scale, seed=seed)
    kwargs = EVERYTHING if solver == "krylov" else {}
    value = token_mce(logits, labels, embeddings, solver=solver, **kwargs)
    e = F.normalize(embeddings, dim=-1)
    lower = -(logits.softmax(-1) * (e[labels] @ e.T) ** 2).sum(-1).log()
    upper = F.cross_entropy(logits, labels, reduction="none")
    assert (value >= lower - 1e-7).all()
    assert (value <= upper + 1e-7).all()


@pytest.mark.parametrize("kwargs", [{"solver": "exact"}, {}, {"top_k": 4}], ids=["exact", "krylov", "top_k"])
def test_orthonormal_vectors_give_cross_entropy(kwargs):
    logits, labels, _ = problem(n=6, v=12)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    z = logits.clone().requires_grad_()
    value = token_mce(z, labels, 3.0 * rotation, **kwargs)
    ce = F.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(value, ce)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], torch.autograd.grad(ce.sum(), z)[0])


@pytest.mark.parametrize("kwargs", [{"solver": "exact"}, {}, {"top_k": 4}], ids=["exact", "krylov", "top_k"])
def test_equal_vectors_give_zero(kwargs):
    logits, labels, _ = problem(n=3, v=12)
    z = logits.requires_grad_()
    value = token_mce(z, labels, torch.ones(12, 5, dtype=F64), **kwargs)
    torch.testing.assert_close(value, torch.zeros(3, dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], torch.zeros_like(z), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kwargs", [{"solver": "exact"}, {}, {"top_k": 8}], ids=["exact", "krylov", "top_k"])
def test_a_certain_position_has_no_loss_and_a_finite_gradient(kwargs, dtype):
    """q_y = 1 to machine precision: the residual after step 1 vanishes and must end the recurrence, not divide it."""
    logits, labels, embeddings = problem(n=4, v=30, d=9)
    logits = F.one_hot(labels, 30).to(dtype) * 200
    z, e = logits.requires_grad_(), embeddings.to(dtype).requires_grad_()
    value = token_mce(z, labels, e, **kwargs)
    torch.testing.assert_close(value, torch.zeros(4, dtype=dtype), atol=1e-5, rtol=0)
    for grad in torch.autograd.grad(value.sum(), [z, e]):
        assert torch.isfinite(grad).all()
        assert grad.abs().max() < 1e-4


def test_float32_follows_float64_over_the_range_of_confidence():
    for scale in (0.0, 0.5, 3.0, 10.0, 30.0):
        logits, labels, embeddings = problem(n=32, v=400, d=32, scale=scale, seed=1)
        # targets from the model's own distribution, as in training
        labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
        for kwargs in ({"steps": 8}, {"steps": 8, "top_k": 64}):
            wide = value_and_gradients(logits, labels, embeddings, **kwargs)
            narrow = value_and_gradients(logits.float(), labels, embeddings.float(), **kwargs)
            for a, b in zip(narrow, wide, strict=True):
                assert (a.double() - b).norm() <= 2e-4 * b.norm() + 1e-5


def test_zero_vectors_stay_zero():
    """Padded or resized vocabularies hold vectors of zeros: no NaN, no gradient, and MCE 0 where one is the target."""
    logits, labels, embeddings = problem(n=4, v=20, d=6, zero_vectors=(3, 7))
    labels[1] = 3
    for kwargs in ({"solver": "exact"}, {}, {"top_k": 5}, {"sketch_dim": 4}):
        value, grad_z, grad_e = value_and_gradients(logits, labels, embeddings, **kwargs)
        assert value[1] == 0
        assert torch.isfinite(grad_z).all()
        assert torch.isfinite(grad_e).all()
        assert (grad_e[[3, 7]] == 0).all()


def test_embedding_norms_do_not_matter():
    logits, labels, embeddings = problem()
    scaled = embeddings * torch.logspace(-6, 6, 37, dtype=F64).unsqueeze(1)
    torch.testing.assert_close(token_mce(logits, labels, scaled), token_mce(logits, labels, embeddings))


@pytest.mark.parametrize("norm", [1e-30, 1e25])
def test_float32_vectors_of_any_norm_neither_vanish_nor_overflow(norm):
    logits, labels, embeddings = (x.float() if x.is_floating_point() else x for x in problem())
    torch.testing.assert_close(token_mce(logits, labels, norm * embeddings), token_mce(logits, labels, embeddings))


def test_a_broken_vector_gives_nan_and_not_zero():
    logits, labels, embeddings = problem()
    embeddings[labels[2]] = torch.nan
    assert torch.isnan(token_mce(logits, labels, embeddings)[2])


def test_sketch_is_deterministic_and_keeps_the_value_roughly():
    logits, _, embeddings = problem(n=32, v=500, d=256, scale=3.0)
    labels = logits.argmax(-1)
    exact = token_mce(logits, labels, embeddings, solver="exact")
    first = token_mce(logits, labels, embeddings, solver="exact", sketch_dim=128)
    assert torch.equal(first, token_mce(logits, labels, embeddings, solver="exact", sketch_dim=128))
    assert ((first - exact).abs() / exact).mean() < 0.05


def test_chunks_do_not_change_the_result(monkeypatch):
    logits, labels, embeddings = problem(n=7, v=40, d=5)
    whole = value_and_gradients(logits, labels, embeddings)
    monkeypatch.setattr(mce, "positions_per_chunk", lambda *_: 3)  # 7 = 3 + 3 + 1
    for a, b in zip(value_and_gradients(logits, labels, embeddings), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_positions_give_an_empty_result_connected_to_the_graph():
    logits = torch.zeros(0, 9, requires_grad=True)
    value = token_mce(logits, torch.zeros(0, dtype=torch.long), torch.randn(9, 4))
    assert value.shape == (0,)
    value.sum().backward()
    assert logits.grad.shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_statistics(dtype):
    logits, labels, embeddings = problem(scale=1.0)
    z = logits.to(dtype).requires_grad_()
    value = token_mce(z, labels, embeddings.to(dtype))
    assert value.dtype == torch.float32
    exact = dense_mce(z.detach(), labels, embeddings.to(dtype))
    torch.testing.assert_close(value.double(), exact, rtol=0.02, atol=0.02)
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert grad.dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_are_named(bad):
    logits, labels, embeddings = problem()
    logits[2, 3] = bad
    with pytest.raises(ValueError, match=r"logits\[2, 3\]"):
        token_mce(logits, labels, embeddings)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type(dtype):
    logits, labels, embeddings = problem()
    assert torch.equal(token_mce(logits, labels.to(dtype), embeddings), token_mce(logits, labels, embeddings))


def test_minus_infinity_removes_a_token():
    logits, labels, embeddings = problem()
    labels[:] = 0
    logits[:, 5:] = -torch.inf
    torch.testing.assert_close(token_mce(logits, labels, embeddings), token_mce(logits[:, :5], labels, embeddings[:5]))


@pytest.mark.parametrize(("label", "said"), [(-1, "label -1 at position 2"), (37, "label 37 at position 2")])
def test_a_label_outside_the_vocabulary_is_named(label, said):
    """There is no ignore_index here: -100 from a collator must not be taken for a token counted from the end."""
    logits, labels, embeddings = problem()
    labels[2] = label
    with pytest.raises(ValueError, match=f"{said}.*vocabulary of 37"):
        token_mce(logits, labels, embeddings)
