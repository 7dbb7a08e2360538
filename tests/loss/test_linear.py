"""The loss fused with the LM head (loss/linear.py) against whole logits and the dense definition, in float64."""

import functools

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.loss import chunks, linear
from matrix_llm.loss.vocabulary import summarise
from matrix_llm.mce import TrainedPositions, linear_matrix_cross_entropy, token_mce

F64 = torch.float64
EVERYTHING = {"steps": 999, "sketch_dim": None, "top_k": None}  # krylov until the space is exhausted: exact


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


def fused_and_reference(
    tensors, *, reduction="mean", mce_weight=0.7, logit_scale=1.0, softcap=None, source="embeddings", **kwargs
):
    """Loss and gradients, ours and eager: whole logits, torch's cross-entropy, the dense MCE."""
    results = []
    for fused in (True, False):
        t = {
            k: x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for k, x in tensors.items()
        }
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
        inputs = [
            t[k]
            for k in ("hidden", "weight", "bias", "embeddings")
            if t[k] is not None and (k != "embeddings" or source == k)
        ]
        results.append([loss.detach(), *torch.autograd.grad(weighted, inputs)])
    return results


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("source", ["embeddings", "weight", "detached"])
@pytest.mark.parametrize(
    "kwargs", [{"solver": "exact"}, EVERYTHING, {"steps": 999, "top_k": 37}], ids=["exact", "krylov", "top_k"]
)
def test_fused_head_equals_the_dense_reference(reduction, source, kwargs, monkeypatch):
    tensors = head()
    tensors["labels"][[0, 4]] = -100
    monkeypatch.setattr(linear, "positions_per_chunk", lambda *_, **__: 2)  # five trained positions: 2 + 2 + 1
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
    for a, b in zip(
        torch.autograd.grad(out.loss, [hidden, weight]), torch.autograd.grad(ce, [hidden, weight]), strict=True
    ):
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


def test_logits_are_never_whole(monkeypatch):
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
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * 2**20)
    with Largest() as largest:
        linear_matrix_cross_entropy(hidden, weight, torch.randint(0, v, (n,))).loss.backward()
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
        ({"labels": torch.full((7,), 37)}, "label 37 at position 0.*vocabulary of 37.*ignore_index"),
        ({"labels": torch.full((7,), -1)}, "label -1"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"\(7,\)"),
        ({"weight": torch.zeros(0)}, r"weight \(0,\).*gather"),
        ({"reduction": "average"}, "'mean'"),
        ({"solver": "lanczos"}, "'krylov'"),
        ({"mce_weight": -1.0}, "mce_weight=-1.0"),
        ({"mce_weight": float("nan")}, "mce_weight=nan"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"top_k": "auto"}, "top_k='auto'"),
        ({"solver": "exact", "top_k": 5}, "top_k=5"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"embeddings": torch.zeros(3, 4)}, r"embeddings \(3, 4\).*\(37, D\)"),
    ],
)
def test_bad_input_is_named(change, words):
    tensors = {k: v for k, v in head().items() if k != "embeddings"} | change
    with pytest.raises(ValueError, match=words):
        linear_matrix_cross_entropy(tensors.pop("hidden"), tensors.pop("weight"), tensors.pop("labels"), **tensors)


@pytest.mark.parametrize("kwargs", [{}, {"solver": "exact"}, {"solver": "taylor"}, {"top_k": 8}], ids=str)
def test_nan_hidden_states_give_a_nan_loss_for_the_guard_to_find(kwargs):
    tensors = head()
    tensors["hidden"][3, 0] = torch.nan
    out = linear_matrix_cross_entropy(tensors["hidden"], tensors["weight"], tensors["labels"], **kwargs)
    assert torch.isnan(out.matrix_cross_entropy).nonzero().flatten().tolist() == [3]
    assert torch.isnan(out.loss)


# ------------------------------------------------------------------------------ the default, and its environment


def wide(n=6, v=1500, h=24, dtype=F64):
    """Above 1,024 tokens, where the fused head's own default is head and tail."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(v, h, dtype=F64, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    hidden = 0.35 * weight[labels] + 0.3 * torch.randn(n, h, dtype=F64, generator=g)
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels]


def gradients(loss, inputs, **kwargs):
    return torch.autograd.grad(loss, inputs, **kwargs)


def test_the_default_above_a_thousand_tokens_is_head_and_tail_and_the_whole_vocabulary_below():
    hidden, weight, labels = wide()
    default = linear_matrix_cross_entropy(hidden, weight, labels).matrix_cross_entropy
    assert torch.equal(default, linear_matrix_cross_entropy(hidden, weight, labels, top_k=16).matrix_cross_entropy)
    whole = linear_matrix_cross_entropy(hidden, weight, labels, top_k=1500).matrix_cross_entropy
    assert not torch.allclose(default, whole, rtol=1e-6)
    assert (default / whole - 1).abs().mean() < 0.02
    small = [hidden, weight[:1024].detach(), labels % 1024]
    assert torch.equal(
        linear_matrix_cross_entropy(*small).matrix_cross_entropy,
        linear_matrix_cross_entropy(*small, top_k=1024).matrix_cross_entropy,
    )


def test_trained_embeddings_default_to_the_whole_vocabulary():
    """Head and tail treats the tail's vectors as constants, so it is not the default if their gradient is wanted."""
    hidden, weight, labels = wide()
    a = linear_matrix_cross_entropy(hidden, weight, labels, embeddings=weight)
    b = linear_matrix_cross_entropy(hidden, weight, labels, embeddings=weight, top_k=1500)
    assert torch.equal(a.matrix_cross_entropy, b.matrix_cross_entropy)
    for x, y in zip(gradients(a.loss, [hidden, weight]), gradients(b.loss, [hidden, weight]), strict=True):
        torch.testing.assert_close(x, y)


def test_a_summary_made_before_changes_nothing():
    hidden, weight, labels = wide()
    made = summarise(weight.detach(), F64)
    fresh, reused = (linear_matrix_cross_entropy(hidden, weight, labels, summary=s) for s in (None, made))
    assert torch.equal(fresh.loss, reused.loss)
    for x, y in zip(gradients(fresh.loss, [hidden, weight]), gradients(reused.loss, [hidden, weight]), strict=True):
        assert torch.equal(x, y)


def test_backward_runs_again_when_the_graph_is_kept_and_says_so_when_not():
    inputs = wide()
    loss = linear_matrix_cross_entropy(*inputs).loss
    first = [g.clone() for g in gradients(loss, inputs[:2], retain_graph=True)]
    second = gradients(3 * loss, inputs[:2], retain_graph=True)
    third = gradients(loss, inputs[:2])  # scales in place and hands over
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(3 * a, b)
        torch.testing.assert_close(a, c)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        gradients(loss, inputs[:2])


def test_gradients_made_in_the_forward_pass_are_not_offloaded_by_saved_tensor_hooks():
    inputs = wide()
    expected = gradients(linear_matrix_cross_entropy(*inputs).loss, inputs[:2])
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.numel()) or x.clone(), lambda x: x):
        loss = linear_matrix_cross_entropy(*inputs).loss
    assert max(packed, default=0) < inputs[1].numel()
    for a, b in zip(gradients(loss, inputs[:2]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_the_head_exists_once():
    """One (V, H) buffer through forward and backward: the gradient is handed to `weight.grad`, not copied."""
    from torch.utils._python_dispatch import TorchDispatchMode

    hidden, weight, labels = wide()
    summary = summarise(weight.detach(), F64)  # made here: it takes (V, H) buffers of its own
    buffers = set()

    class Buffers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == weight.shape:
                buffers.add(out.data_ptr())
            return out

    with Buffers():
        linear_matrix_cross_entropy(hidden, weight, labels, summary=summary).loss.backward()
    assert buffers - {weight.data_ptr()} == {weight.grad.data_ptr()}


def test_checkpointing_gives_the_same_gradients():
    inputs = wide()
    expected = gradients(linear_matrix_cross_entropy(*inputs).loss, inputs[:2])

    def loss(hidden, weight):
        return linear_matrix_cross_entropy(hidden, weight, inputs[2]).loss

    again = torch.utils.checkpoint.checkpoint(loss, *inputs[:2], use_reentrant=False)
    for a, b in zip(gradients(again, inputs[:2]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_caller_gets_the_same_loss():
    inputs = wide()

    def loss(hidden, weight, labels):
        return linear_matrix_cross_entropy(hidden * 1.5, weight, labels).loss + 1

    compiled = torch.compile(loss, backend="aot_eager")
    a, b = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(a, b)
    for x, y in zip(gradients(a, inputs[:2]), gradients(b, inputs[:2]), strict=True):
        torch.testing.assert_close(x, y)


def test_masked_positions_are_dropped_before_the_first_product():
    """Their hidden states may even be NaN."""
    hidden, weight, labels = wide()
    labels[1::2] = -100
    with torch.no_grad():
        hidden[1::2] = torch.nan
    out = linear_matrix_cross_entropy(hidden, weight, labels)
    grad_hidden, grad_weight = gradients(out.loss, [hidden, weight])
    assert torch.isfinite(out.loss)
    assert torch.isfinite(grad_weight).all()
    assert (grad_hidden[1::2] == 0).all()
    early = TrainedPositions(labels, 1500)
    assert early.index().tolist() == [0, 2, 4]
    assert torch.equal(linear_matrix_cross_entropy(hidden, weight, labels, trained=early).loss, out.loss)


def test_float32_follows_float64_through_head_and_tail():
    """From hopeless to certain positions: the small problem is float64, and the tail never a difference of sums."""
    for factor in (0.1, 1.0, 3.0, 10.0):
        exact = wide(n=32)
        rough = wide(n=32, dtype=torch.float32)
        run = functools.partial(linear_matrix_cross_entropy, reduction="sum")
        a, b = run(exact[0] * factor, exact[1], exact[2]), run(rough[0] * factor, rough[1], rough[2])
        torch.testing.assert_close(b.matrix_cross_entropy.double(), a.matrix_cross_entropy, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(b.entropy.double(), a.entropy, rtol=1e-4, atol=2e-5)
        for x, y in zip(gradients(b.loss, rough[:2]), gradients(a.loss, exact[:2]), strict=True):
            assert (x - y).norm() < 1e-4 * y.norm() + 1e-6


def test_a_second_derivative_is_refused():
    inputs = wide()
    (grad,) = torch.autograd.grad(linear_matrix_cross_entropy(*inputs).loss, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("kwargs", [{}, {"sketch_dim": 8}], ids=["default", "sketch"])
def test_scoring_under_inference_mode_first_leaves_training_as_it_is(kwargs):
    """The random start and the sketch are kept between calls; made under inference_mode, autograd would refuse them."""
    hidden, weight, labels = wide(h=23)  # a width of its own, so that nothing is kept yet
    with torch.inference_mode():
        linear_matrix_cross_entropy(hidden, weight, labels, **kwargs)
    loss = linear_matrix_cross_entropy(hidden, weight, labels, embeddings=weight, top_k=None, **kwargs).loss
    assert all(torch.isfinite(g).all() for g in gradients(loss, [hidden, weight]))


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 1500}], ids=["head and tail", "whole"])
def test_backward_under_autocast_is_that_outside(kwargs):
    """ "none" makes its gradients in the backward pass, which somebody may call inside the autocast region."""
    found = []
    for inside in (False, True):
        hidden, weight, labels = wide(dtype=torch.float32)
        half = hidden.detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_matrix_cross_entropy(half, weight, labels, reduction="none", **kwargs).loss.sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append((half.grad, weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "label"), [(torch.uint8, 156), (torch.uint8, 200), (torch.int8, 100), (torch.int16, 1400)]
)
def test_labels_of_narrow_types_are_the_numbers_they_are(dtype, label):
    """-100 is 156 among uint8, and the vocabulary's size may not fit the type at all."""
    hidden, weight, labels = wide()
    labels[:] = label
    a, b = (linear_matrix_cross_entropy(hidden, weight, y).loss for y in (labels, labels.to(dtype)))
    assert torch.equal(a, b)
    logits = (hidden @ weight.T).detach()
    assert torch.equal(
        token_mce(logits, labels, weight.detach(), top_k=8),
        token_mce(logits, labels.to(dtype), weight.detach(), top_k=8),
    )


@pytest.mark.parametrize("size", [1e-40, 0.0])
def test_a_denormal_vector_counts_as_zero_and_spoils_no_other(size):
    hidden, weight, labels = wide(dtype=torch.float32)
    labels[labels == 7] = 8
    rows = weight.detach().clone()
    rows[7] = size
    value = linear_matrix_cross_entropy(hidden, weight, labels, embeddings=rows).matrix_cross_entropy
    assert torch.isfinite(value).all()


def test_a_summary_or_positions_of_something_else_are_named():
    hidden, weight, labels = wide()
    fixed = weight.detach()
    summary = summarise(fixed, F64)
    for kwargs, words in [
        ({"embeddings": weight, "top_k": 16, "summary": summary}, "summary.*require grad"),
        ({"sketch_dim": 8, "top_k": 16, "summary": summary}, "summary.*sketch_dim"),
        ({"summary": summarise(fixed[:1400], F64)}, "summary.*1400 vectors.*summarise"),
        ({"summary": summarise(fixed[:, :9], F64)}, "summary.*width 9"),
        ({"summary": summarise(fixed.float(), torch.float32)}, "summary.*float32.*summarise"),
        ({"trained": TrainedPositions(labels[:3], 1500)}, r"trained.*\(3,\) labels"),
        ({"trained": TrainedPositions(labels, 9999)}, "trained.*9999"),
    ]:
        with pytest.raises(ValueError, match=words):
            linear_matrix_cross_entropy(hidden, weight, labels, **kwargs)


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 1500}, {"solver": "exact"}], ids=["head and tail", "krylov", "exact"])
def test_a_bias_of_minus_infinity_removes_a_token(kwargs, softcap):
    """Its probability is 0, and 0 * -inf would make the entropy NaN. With a soft-cap it is only an unlikely token."""
    hidden, weight, labels = wide()
    bias = torch.zeros(1500, dtype=F64)
    bias[~torch.isin(torch.arange(1500), labels)] = torch.linspace(-1, 1, 1500 - len(labels.unique()), dtype=F64)
    bias[gone := 7 if 7 not in labels else 8] = -torch.inf
    out = linear_matrix_cross_entropy(hidden, weight, labels, bias=bias, softcap=softcap, **kwargs)
    z = hidden @ weight.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    torch.testing.assert_close(
        out.entropy, torch.distributions.Categorical(logits=z.clamp(min=-1e300)).entropy().detach()
    )
    torch.testing.assert_close(out.cross_entropy, F.cross_entropy(z, labels, reduction="none").detach())
    grad_hidden, grad_weight = gradients(out.loss, [hidden, weight])
    assert torch.isfinite(grad_hidden).all()
    assert (grad_weight[gone] == 0).all()
