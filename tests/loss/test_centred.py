"""`mce_embeddings: centred`: token vectors are those of the LM head minus their mean, on every way through the loss.

The reference subtracts the mean in plain torch and computes the dense MCE; where autograd runs through it, the mean
takes its share of the gradient.
"""

import doctest

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.loss import linear, vocabulary
from matrix_llm.loss.linear import linear_loss
from matrix_llm.loss.settings import LossSettings
from matrix_llm.loss.vocabulary import mean_vector, subtract_mean, summarise, unit_vectors
from matrix_llm.mce import linear_matrix_cross_entropy, token_mce

F64 = torch.float64


def problem(n=7, v=37, h=11, seed=0, *, common=2.0):
    """Hidden states, a biased LM head whose vectors share `common` times a direction, and labels."""
    g = torch.Generator().manual_seed(seed)
    shared = F.normalize(torch.randn(h, dtype=F64, generator=g), dim=0) * common * h**0.5
    return {
        "hidden": torch.randn(n, h, dtype=F64, generator=g) / h**0.5,
        "weight": torch.randn(v, h, dtype=F64, generator=g) + shared,
        "bias": torch.randn(v, dtype=F64, generator=g),
        "labels": torch.randint(0, v, (n,), generator=g),
    }


def fused(t, *, softcap=None, embedding_grad=False, reduction="sum", **kwargs):
    settings = LossSettings(0.7, embeddings="centred", embedding_grad=embedding_grad, **kwargs)
    embeddings = t["weight"] if embedding_grad else t["weight"].detach()
    return linear_loss(
        t["hidden"], t["weight"], t["labels"], settings,
        embeddings=embeddings, bias=t["bias"], softcap=softcap, reduction=reduction,
    )  # fmt: skip


def eager(t, *, softcap=None, embedding_grad=False, **kwargs):
    """Whole logits, torch's cross-entropy, and `token_mce` of vectors that were centred before."""
    z = t["hidden"] @ t["weight"].T + t["bias"]
    z = softcap * torch.tanh(z / softcap) if softcap else z
    keep = t["labels"] != -100
    e = t["weight"] if embedding_grad else t["weight"].detach()
    mce = token_mce(z[keep], t["labels"][keep], e - e.mean(0), **kwargs)
    return F.cross_entropy(z[keep], t["labels"][keep], reduction="sum") + 0.7 * mce.sum()


def assert_equal_with_gradients(tensors, ours, reference, **tolerance):
    found = []
    for loss_of in (ours, reference):
        t = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in tensors.items()}
        loss = loss_of(t)
        found.append([loss.detach(), *torch.autograd.grad(loss, [t["hidden"], t["weight"], t["bias"]])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def test_doctests():
    assert doctest.testmod(vocabulary).failed == 0


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("kwargs", "embedding_grad"),
    [
        ({"solver": "exact"}, False),
        ({"solver": "exact"}, True),
        ({"steps": 99}, False),
        ({"steps": 99}, True),
        ({"steps": 99, "top_k": 36}, False),  # the tail is one token, in 11 <= 12 directions: exact as well
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_dense_mce_on_centred_vectors(kwargs, embedding_grad, softcap, monkeypatch):
    """Awkward sizes, and every position that has a label."""
    tensors = problem()
    tensors["labels"][[0, 4]] = -100
    monkeypatch.setattr(linear, "positions_per_chunk", lambda *_, **__: 2)  # five trained positions: 2 + 2 + 1
    options = {"softcap": softcap, "embedding_grad": embedding_grad}
    assert_equal_with_gradients(
        tensors, lambda t: fused(t, **options, **kwargs).loss, lambda t: eager(t, **options, solver="exact")
    )


@pytest.mark.parametrize("embedding_grad", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"top_k": 16, "steps": 6},  # without a centred copy: the mean is subtracted where vectors are read
        {"top_k": 16, "steps": 6, "sketch_dim": 14},
        {"sketch_dim": 9},
        {"solver": "taylor", "order": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 7])
def test_every_approximation_is_that_of_vectors_centred_before(n, kwargs, embedding_grad):
    tensors = problem(n=n, v=1300, h=24)
    options = {"embedding_grad": embedding_grad}
    assert_equal_with_gradients(
        tensors, lambda t: fused(t, **options, **kwargs).loss, lambda t: eager(t, **options, **kwargs)
    )


def test_the_default_for_a_large_vocabulary_is_head_and_tail_of_the_centred_vectors():
    tensors = problem(v=1300, h=24)
    assert_equal_with_gradients(tensors, lambda t: fused(t).loss, lambda t: eager(t, top_k=16, steps=6))


def test_the_gradient_passes_through_the_mean():
    """By finite differences of the loss in the LM head's weight, where every logit keeps its value."""
    t = problem(n=3, v=9, h=5)
    logits = t["hidden"] @ t["weight"].T

    def mce(weight):
        return token_mce(logits, t["labels"], unit_vectors(weight, dtype=F64, centred=True), steps=99)

    weight = t["weight"].clone().requires_grad_()
    assert torch.autograd.gradcheck(mce, weight)
    (gradient,) = torch.autograd.grad(mce(weight).sum(), weight)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(5, dtype=F64))  # a common shift changes nothing


@pytest.mark.parametrize("kwargs", [{"steps": 99}, {"top_k": 16}, {"top_k": 16, "sketch_dim": 15}], ids=str)
def test_what_all_vectors_share_does_not_matter(kwargs):
    """The softmax does not see a vector that is added to all of the LM head's, and neither does the centred MCE."""
    t = problem(v=300, h=24, common=0.0)
    t["bias"] = torch.zeros(300, dtype=F64)
    shifted = {**t, "weight": t["weight"] + 5 * torch.linspace(-1, 1, 24, dtype=F64)}
    a, b = fused(t, **kwargs), fused(shifted, **kwargs)
    torch.testing.assert_close(a.cross_entropy, b.cross_entropy)
    torch.testing.assert_close(a.matrix_cross_entropy, b.matrix_cross_entropy)
    plain = [linear_matrix_cross_entropy(x["hidden"], x["weight"], x["labels"], **kwargs) for x in (t, shifted)]
    assert not torch.allclose(plain[0].matrix_cross_entropy, plain[1].matrix_cross_entropy, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kwargs", [{"steps": 6}, {"top_k": 16}], ids=str)
def test_a_vector_equal_to_the_mean_counts_as_zero(dtype, kwargs):
    """Not as the direction of a rounding error."""
    t = {k: x.to(dtype) if x.is_floating_point() else x for k, x in problem(v=300, h=24).items()}
    t["weight"][5] = (t["weight"].double().sum(0) - t["weight"][5]).div(299).to(dtype)  # then it is the mean of all
    t["labels"][0] = 5
    t["hidden"].requires_grad_()
    out = fused(t, **kwargs)
    assert out.matrix_cross_entropy[0] == 0
    assert (out.matrix_cross_entropy[1:] > 0).all()
    assert torch.isfinite(torch.autograd.grad(out.loss, t["hidden"])[0]).all()
    summary = summarise(t["weight"], dtype, centred=True)
    assert summary.inverse_norm.eq(0).nonzero().flatten().tolist() == [5]
    assert unit_vectors(t["weight"], dtype=dtype, centred=True).norm(dim=1).eq(0).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{"steps": 6}, {"top_k": 16}], ids=str)
def test_equal_vectors_have_no_mce(dtype, kwargs):
    """All are the mean, so nothing tells two tokens apart."""
    t = problem(v=1300, h=24)
    t = {k: x.to(dtype) if x.is_floating_point() else x for k, x in t.items()}
    t["weight"][:] = t["weight"][0]
    out = fused(t, **kwargs)
    assert (out.matrix_cross_entropy == 0).all()
    assert torch.isfinite(out.loss)


def test_a_zero_vector_is_one_like_any_other():
    """It enters the mean, and lies opposite to it afterwards: its logit is 0, not minus infinity."""
    t = problem(v=40, h=8)
    t["weight"][3] = 0
    e = t["weight"] - t["weight"].mean(0)
    torch.testing.assert_close(unit_vectors(t["weight"], dtype=F64, centred=True), F.normalize(e, dim=-1))
    assert summarise(t["weight"], F64, centred=True).features[3, -1] == 1


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e12])
def test_nothing_cancels_in_float32_where_the_vectors_are_close_to_their_mean(given, norm):
    """Mean cosine 0.99: |e|^2 - 2 e.m + |m|^2 would lose two digits more."""
    weight = (norm * problem(v=6000, h=40, common=10.0)["weight"]).to(given)
    e = F.normalize(weight.double(), dim=-1)
    assert (e @ e.mean(0)).mean() > 0.985
    ours, expected = summarise(weight, torch.float32, centred=True), summarise(weight.double(), F64, centred=True)
    torch.testing.assert_close(ours.centre.double() / norm, expected.centre / norm, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.inverse_norm.double(), expected.inverse_norm, rtol=3e-6, atol=0)
    unit = F.normalize(weight.double() - weight.double().mean(0), dim=-1)
    along = unit @ ours.directions.double()
    torch.testing.assert_close(ours.coordinates.double(), along, rtol=0, atol=3e-6)
    torch.testing.assert_close(
        unit_vectors(weight, dtype=torch.float32, centred=True).double(), unit, rtol=0, atol=3e-6
    )


def test_the_mean_is_summed_in_blocks_and_that_of_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "BLOCK_ELEMENTS", 64)
    weight = problem(v=37)["weight"]
    torch.testing.assert_close(mean_vector(weight, F64), weight.mean(0))
    summary, e = summarise(weight, F64, centred=True), weight - weight.mean(0)
    torch.testing.assert_close(summary.coordinates, F.normalize(e, dim=-1) @ summary.directions)
    assert subtract_mean(weight[:0], weight.mean(0)).shape == (0, 11)


def test_a_summary_of_other_vectors_is_refused():
    t = problem(v=1300, h=24)
    for centred in (True, False):
        settings = LossSettings(embeddings="lm_head" if centred else "centred")
        with pytest.raises(ValueError, match=f"centred={centred}.*centred={not centred}"):
            linear_loss(
                t["hidden"], t["weight"], t["labels"], settings,
                embeddings=t["weight"], summary=summarise(t["weight"], F64, centred=centred),
            )  # fmt: skip


def test_a_vector_of_nan_is_not_hidden():
    """The trainer's guard must see it."""
    t = problem(v=1300, h=24)
    t["weight"][7, 3] = torch.nan
    assert torch.isnan(fused(t, top_k=16).matrix_cross_entropy).all()


def test_without_a_label_the_loss_is_a_zero_with_a_gradient():
    t = problem()
    t["labels"][:] = -100
    t["weight"].requires_grad_()
    (gradient,) = torch.autograd.grad(fused(t, embedding_grad=True).loss, t["weight"])
    assert (gradient == 0).all()
