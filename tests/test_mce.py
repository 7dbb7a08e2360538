"""Token-level matrix cross-entropy against the dense definition, in float64, at awkward sizes."""

import doctest
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from matrix_llm import mce
from matrix_llm.information import matrix_cross_entropy, matrix_log
from matrix_llm.mce import linear_matrix_cross_entropy, token_mce

F64 = torch.float64
EVERYTHING = {"steps": 999, "sketch_dim": None, "top_k": None}  # krylov until the space is exhausted: exact


def problem(n=5, v=37, d=11, *, scale=2.0, seed=0, zero_rows=()):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, v, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    embeddings = torch.randn(v, d, dtype=F64, generator=g)
    embeddings[list(zero_rows)] = 0
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
    torch.testing.assert_close(token_mce(logits, labels, embeddings, solver="exact"), dense_mce(logits, labels, embeddings))


@pytest.mark.parametrize("kwargs", [{"solver": "exact"}, EVERYTHING, {"steps": 999, "top_k": 36}], ids=["exact", "krylov", "top_k"])
def test_gradcheck_in_logits_and_embeddings(kwargs):
    logits, labels, embeddings = problem(n=2, v=7, d=3)
    if "top_k" in kwargs:
        kwargs = {**kwargs, "top_k": 7}
    assert torch.autograd.gradcheck(lambda z, e: token_mce(z, labels, e, **kwargs), (logits.requires_grad_(), embeddings.requires_grad_()))


@pytest.mark.parametrize(("n", "v", "d"), [(1, 37, 11), (5, 37, 11), (3, 5, 11), (4, 64, 1), (2, 1, 4), (7, 130, 16)])
def test_krylov_is_exact_once_the_space_is_exhausted(n, v, d):
    args = problem(n, v, d, seed=v)
    for got, expected in zip(value_and_gradients(*args, **EVERYTHING), value_and_gradients(*args, solver="exact"), strict=True):
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


def test_head_and_tail_converge_to_exact_as_the_head_grows():
    args = problem(n=16, v=300, d=24, seed=4)
    exact = value_and_gradients(*args, solver="exact")
    for i in range(3):
        errors = []
        for top_k in (8, 32, 128, 300):
            got = value_and_gradients(*args, steps=24, top_k=top_k)
            errors.append(((got[i] - exact[i]).norm() / exact[i].norm()).item())
        assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
        assert errors[-1] < 1e-10


@pytest.mark.parametrize("zero_rows", [(), (0, 5, 9)])
def test_head_and_tail_is_exact_for_the_distribution_with_an_even_tail(zero_rows):
    """The dense MCE of a genuine distribution: the head's q as it is, the rest of the mass evenly on the other non-zero rows."""
    logits, labels, embeddings = problem(n=3, v=40, d=9, zero_rows=zero_rows)
    labels[0], labels[1] = logits[0].argmin(), (logits[1].argmax() if not zero_rows else 7)  # the first is forced into the head
    top_k, z = 12, logits.requires_grad_()
    e = F.normalize(embeddings, dim=-1)
    q = z.softmax(-1)
    ids = q.detach().topk(top_k).indices
    missing = ~(ids == labels[:, None]).any(-1)
    assert missing[0]
    ids[missing, -1] = labels[missing]
    head = torch.zeros_like(q).scatter(1, ids, 1.0)
    others = (1 - head) * (embeddings.norm(dim=1) > 0)
    even = q * head + (1 - (q * head).sum(-1, keepdim=True)) * others / others.sum(-1, keepdim=True)
    big_q = torch.einsum("nv,vi,vj->nij", even, e, e)
    expected = -torch.einsum("ni,nij,nj->n", e[labels], matrix_log(big_q), e[labels])
    got = token_mce(z, labels, embeddings, steps=99, top_k=top_k)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    a, b = (torch.autograd.grad(x.sum(), z)[0] for x in (got, expected))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("entropy", [1.7, 3.5])
def test_the_default_holds_one_percent_in_the_value_and_five_in_the_gradient_ten_times_over(entropy):
    """Where CE <= 2, on vectors with a power-law spectrum and labels drawn from the predictions (table in docs/solvers.md)."""
    g = torch.Generator().manual_seed(0)
    v, d, n = 1000, 64, 200
    embeddings = torch.randn(v, d, dtype=F64, generator=g) * 1 / torch.arange(1, d + 1, dtype=F64)
    hidden = torch.randn(n, d, dtype=F64, generator=g) @ torch.diag(1 / torch.arange(1, d + 1, dtype=F64))
    logits = hidden @ embeddings.T
    low, high = 0.1, 200.0
    for _ in range(40):  # the temperature of this mean entropy
        scale = (low + high) / 2
        found = torch.distributions.Categorical(logits=scale * logits).entropy().mean()
        low, high = (scale, high) if found > entropy else (low, scale)
    logits = scale * logits
    labels = torch.multinomial(logits.softmax(-1), 1, generator=g).squeeze(1)
    keep = F.cross_entropy(logits, labels, reduction="none") <= 2
    exact, exact_grad, _ = value_and_gradients(logits[keep], labels[keep], embeddings, solver="exact")
    value, grad, _ = value_and_gradients(logits[keep], labels[keep], embeddings)
    counted = exact > 1e-3
    assert counted.sum() > 50
    assert ((value - exact).abs() / exact)[counted].mean() < 0.001
    assert ((grad - exact_grad).norm(dim=1) / exact_grad.norm(dim=1))[counted].mean() < 0.005


def test_the_head_always_holds_the_target():
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
def test_orthonormal_rows_give_cross_entropy(kwargs):
    logits, labels, _ = problem(n=6, v=12)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    z = logits.clone().requires_grad_()
    value = token_mce(z, labels, 3.0 * rotation, **kwargs)
    ce = F.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(value, ce)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], torch.autograd.grad(ce.sum(), z)[0])


@pytest.mark.parametrize("kwargs", [{"solver": "exact"}, {}, {"top_k": 4}], ids=["exact", "krylov", "top_k"])
def test_equal_rows_give_zero(kwargs):
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


def test_zero_rows_stay_zero():
    """Padded or resized vocabularies hold rows of zeros: no NaN, no gradient, and MCE 0 where one is the target."""
    logits, labels, embeddings = problem(n=4, v=20, d=6, zero_rows=(3, 7))
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
def test_float32_rows_of_any_norm_neither_vanish_nor_overflow(norm):
    logits, labels, embeddings = (x.float() if x.is_floating_point() else x for x in problem())
    torch.testing.assert_close(token_mce(logits, labels, norm * embeddings), token_mce(logits, labels, embeddings))


def test_a_broken_row_gives_nan_and_not_zero():
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
    monkeypatch.setattr(mce, "_chunk_size", lambda positions, _: 3)  # 7 = 3 + 3 + 1
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


# ---------------------------------------------------------------------------------------------- fused with the LM head


def head(n=7, v=37, h=11, seed=0, d=None):
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(n, h, dtype=F64, generator=g),
        "weight": torch.randn(v, h, dtype=F64, generator=g),
        "bias": torch.randn(v, dtype=F64, generator=g),
        "embeddings": torch.randn(v, d or h + 2, dtype=F64, generator=g),
        "labels": torch.randint(0, v, (n,), generator=g),
    }


def plain_logits(t, logit_scale=1.0, softcap=None):
    z = t["hidden"] @ t["weight"].T
    if t["bias"] is not None:
        z = z + t["bias"]
    z = z * logit_scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def fused_and_reference(tensors, *, reduction="mean", mce_weight=0.7, logit_scale=1.0, softcap=None, source="embeddings", **kwargs):
    """Loss and gradients, ours and eager: whole logits, torch's cross-entropy, the dense MCE."""
    results = []
    for fused in (True, False):
        t = {k: x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for k, x in tensors.items()}
        e = {"embeddings": t["embeddings"], "weight": t["weight"], "detached": None}[source]
        if fused:
            out = linear_matrix_cross_entropy(
                t["hidden"], t["weight"], t["labels"], bias=t["bias"], embeddings=e, mce_weight=mce_weight,
                logit_scale=logit_scale, softcap=softcap, reduction=reduction, **kwargs,
            )  # fmt: skip
            loss = out.loss
        else:
            z = plain_logits(t, logit_scale, softcap)
            keep = t["labels"] != -100
            e = t["weight"].detach() if e is None else e
            loss = torch.zeros(len(z), dtype=F64)
            each = F.cross_entropy(z[keep], t["labels"][keep], reduction="none")
            each = each + mce_weight * token_mce(z[keep], t["labels"][keep], e, solver="exact")
            loss = loss.masked_scatter(keep, each)
            loss = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / keep.sum()}[reduction]
        weighted = (loss * torch.linspace(1, 2, len(loss), dtype=F64)).sum() if reduction == "none" else 3 * loss
        inputs = [t[k] for k in ("hidden", "weight", "bias", "embeddings") if t[k] is not None and (k != "embeddings" or source == k)]
        results.append([loss.detach(), *torch.autograd.grad(weighted, inputs)])
    return results


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("source", ["embeddings", "weight", "detached"])
@pytest.mark.parametrize("kwargs", [{"solver": "exact"}, EVERYTHING, {"steps": 999, "top_k": 37}], ids=["exact", "krylov", "head"])
def test_fused_head_equals_the_dense_reference(reduction, source, kwargs, monkeypatch):
    tensors = head()
    tensors["labels"][[0, 4]] = -100
    monkeypatch.setattr(mce, "_chunk_size", lambda positions, _: 2)  # five kept positions: 2 + 2 + 1
    ours, reference = fused_and_reference(tensors, reduction=reduction, source=source, **kwargs)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("logit_scale", "softcap", "bias"), [(0.3, None, True), (1.0, 2.0, False), (0.7, 3.0, True)])
def test_scale_cap_and_bias_act_before_the_softmax(logit_scale, softcap, bias):
    tensors = head()
    if not bias:
        tensors["bias"] = None
    ours, reference = fused_and_reference(tensors, logit_scale=logit_scale, softcap=softcap, **EVERYTHING)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [1, 7])
def test_head_and_tail_gradient_is_consistent_with_token_mce(n):
    """The same approximation through both entrances: value and gradients agree to rounding."""
    tensors = head(n=n, v=300, h=24)
    kwargs = {"solver": "krylov", "steps": 6, "top_k": 20, "sketch_dim": 12}
    t = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in tensors.items()}
    out = linear_matrix_cross_entropy(
        t["hidden"], t["weight"], t["labels"], bias=t["bias"], embeddings=t["embeddings"], reduction="sum", **kwargs
    )
    ours = torch.autograd.grad(out.loss, [t[k] for k in ("hidden", "weight", "bias", "embeddings")])
    z = plain_logits(t)
    loss = F.cross_entropy(z, t["labels"], reduction="sum") + token_mce(z, t["labels"], t["embeddings"], **kwargs).sum()
    eager = torch.autograd.grad(loss, [t[k] for k in ("hidden", "weight", "bias", "embeddings")])
    torch.testing.assert_close(out.loss, loss)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_statistics_are_torchs():
    tensors = head(n=40)
    tensors["labels"][5] = -100
    out = linear_matrix_cross_entropy(tensors["hidden"], tensors["weight"], tensors["labels"], bias=tensors["bias"])
    z, keep = plain_logits(tensors), tensors["labels"] != -100
    torch.testing.assert_close(out.cross_entropy, F.cross_entropy(z, tensors["labels"], reduction="none"))
    entropy = torch.distributions.Categorical(logits=z).entropy() * keep
    torch.testing.assert_close(out.entropy, entropy)
    assert torch.equal(out.is_top1, (z.argmax(-1) == tensors["labels"]) & keep)
    assert out.matrix_cross_entropy[5] == 0
    assert not any(x.requires_grad for x in out)
    expected = (out.cross_entropy + out.matrix_cross_entropy).sum() / 39
    torch.testing.assert_close(out.loss, expected)


def test_weight_zero_is_plain_cross_entropy_and_still_measures_mce():
    tensors = head()
    hidden, weight = (tensors[k].clone().requires_grad_() for k in ("hidden", "weight"))
    out = linear_matrix_cross_entropy(hidden, weight, tensors["labels"], mce_weight=0.0)
    ce = F.cross_entropy(hidden @ weight.T, tensors["labels"])
    torch.testing.assert_close(out.loss, ce)
    for a, b in zip(torch.autograd.grad(out.loss, [hidden, weight]), torch.autograd.grad(ce, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b)
    assert (out.matrix_cross_entropy > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_labels_ignored_give_a_zero_connected_to_the_graph(reduction):
    tensors = head()
    hidden, weight = (tensors[k].clone().requires_grad_() for k in ("hidden", "weight"))
    out = linear_matrix_cross_entropy(hidden, weight, torch.full((7,), -100), reduction=reduction)
    assert (out.loss == 0).all()
    out.loss.sum().backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_logits_and_krylov_rows_are_never_whole():
    """Peak memory of one call stays far below the (N, V) logits: measured by watching every allocation's size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    n, v, h = 4096, 4000, 16
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    original, mce.CHUNK_BYTES = mce.CHUNK_BYTES, 8 * 2**20
    try:
        with Largest() as largest:
            linear_matrix_cross_entropy(hidden, weight, torch.randint(0, v, (n,))).loss.backward()
    finally:
        mce.CHUNK_BYTES = original
    assert largest.numel < n * v / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_head_accumulates_in_float32(dtype):
    tensors = head(n=64, v=200, h=32)
    hidden = (0.3 * tensors["hidden"]).to(dtype).requires_grad_()
    weight = (0.3 * tensors["weight"]).to(dtype).requires_grad_()
    out = linear_matrix_cross_entropy(hidden, weight, tensors["labels"])
    assert out.loss.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = linear_matrix_cross_entropy(*wide, tensors["labels"], solver="exact")
    torch.testing.assert_close(out.cross_entropy.double(), expected.cross_entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-2, atol=1e-3)
    ours, exact = torch.autograd.grad(out.loss, [hidden, weight]), torch.autograd.grad(expected.loss, wide)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 0.05 * b.norm()


def test_master_weights_stay_float32_under_half_precision_hidden_states():
    tensors = head(n=9)
    hidden = tensors["hidden"].bfloat16().requires_grad_()
    weight = tensors["weight"].float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_matrix_cross_entropy(hidden, weight, tensors["labels"])
    out.loss.backward()
    assert weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16


def test_no_grad_makes_no_gradient_buffers():
    tensors = head()
    weight = tensors["weight"].clone().requires_grad_()
    with torch.no_grad():
        out = linear_matrix_cross_entropy(tensors["hidden"], weight, tensors["labels"])
    assert not out.loss.requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.full((7,), 37)}, "label 37 at position 0.*vocabulary of 37"),
        ({"labels": torch.full((7,), -1)}, "label -1"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"\(7,\)"),
        ({"weight": torch.zeros(0)}, "gathered"),
        ({"reduction": "average"}, "'mean'"),
        ({"solver": "lanczos"}, "'krylov'"),
        ({"mce_weight": -1.0}, "mce_weight=-1.0"),
        ({"mce_weight": float("nan")}, "mce_weight=nan"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"top_k": "auto"}, "top_k='auto'"),
        ({"solver": "exact", "top_k": 5}, "top_k=5"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"embeddings": torch.zeros(3, 4)}, "37 rows"),
    ],
)
def test_bad_input_is_named(change, words):
    tensors = {k: v for k, v in head().items() if k != "embeddings"} | change
    with pytest.raises(ValueError, match=words):
        linear_matrix_cross_entropy(tensors.pop("hidden"), tensors.pop("weight"), tensors.pop("labels"), **tensors)


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


@pytest.mark.parametrize("kwargs", [{}, {"solver": "exact"}, {"solver": "taylor"}, {"top_k": 8}], ids=str)
def test_nan_hidden_states_give_a_nan_loss_for_the_guard_to_find(kwargs):
    tensors = head()
    tensors["hidden"][3, 0] = torch.nan
    out = linear_matrix_cross_entropy(tensors["hidden"], tensors["weight"], tensors["labels"], **kwargs)
    assert torch.isnan(out.matrix_cross_entropy).nonzero().flatten().tolist() == [3]
    assert torch.isnan(out.loss)
