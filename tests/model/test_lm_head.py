"""The loss inside the model's forward (model/lm_head.py) against the dense reference, on many architectures."""

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.base.errors import ModelError, RecipeError
from matrix_llm.loss.settings import LossSettings
from matrix_llm.mce import token_mce
from matrix_llm.model.lm_head import add_matrix_head, check_head, head_effective_rank, logit_transform
from tests.support.tiny import ARCHITECTURES, V, tiny_model


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("embedding_grad", [False, True])
def test_loss_and_every_gradient_equal_the_dense_reference(name, embedding_grad):
    """In float64: the model's own logits, torch's cross-entropy and the dense MCE against the fused LM head."""
    model = tiny_model(name).double().eval()
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1] = -100
    mask = torch.ones_like(ids)

    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    keep = labels[:, 1:] != -100
    head = model.get_output_embeddings().weight
    kept, target = logits[keep], labels[:, 1:][keep]
    mce = token_mce(kept, target, head if embedding_grad else head.detach(), solver="exact")
    reference = F.cross_entropy(kept, target, reduction="sum") + 0.5 * mce.sum()
    expected = torch.autograd.grad(reference, list(model.parameters()), allow_unused=True)

    add_matrix_head(model, LossSettings(mce_weight=0.5, steps=99, embedding_grad=embedding_grad))
    out = model(input_ids=ids, attention_mask=mask, labels=labels, matrix_loss=True)
    torch.testing.assert_close(out.loss_sum, reference)
    torch.testing.assert_close(out.matrix_cross_entropy[keep], mce.detach())
    assert (out.cross_entropy[~keep] == 0).all()
    got = torch.autograd.grad(out.loss_sum, list(model.parameters()), allow_unused=True)
    for (parameter, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        assert (a is None) == (b is None), parameter
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "cohere", "phi", "opt"])
@pytest.mark.parametrize("embedding_grad", [False, True])
@pytest.mark.parametrize("size", [V, 1100])
def test_centred_vectors_are_the_heads_minus_their_mean(name, embedding_grad, size):
    """Tied, capped, scaled, biased, narrower than the hidden states; read whole, or by head and tail."""
    model = tiny_model(name, vocab_size=size).double().eval()
    ids = torch.randint(3, size, (2, 9), generator=torch.Generator().manual_seed(1))
    logits, target = model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    head = model.get_output_embeddings().weight
    head = head if embedding_grad else head.detach()
    top_k = 16 if size > 1024 and not embedding_grad else None
    mce = token_mce(logits, target, head - head.mean(0), top_k=top_k)
    expected = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum") + mce.sum(), model.parameters())

    add_matrix_head(model, LossSettings(embeddings="centred", embedding_grad=embedding_grad))
    out = model(input_ids=ids, labels=ids, matrix_loss=True)
    torch.testing.assert_close(out.matrix_cross_entropy.flatten(), mce.detach())
    for a, b in zip(torch.autograd.grad(out.loss_sum, model.parameters()), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_scale_and_cap_are_read_from_the_config():
    assert logit_transform(tiny_model("gemma2").config) == (1.0, 5.0)
    assert logit_transform(tiny_model("cohere").config) == (0.0625, None)
    assert logit_transform(tiny_model("granite").config) == (0.25, None)
    assert logit_transform(tiny_model("llama").config) == (1.0, None)


def test_a_model_that_does_more_to_its_logits_is_refused():
    model = tiny_model("llama")
    modes = [module.training for module in model.modules()]
    check_head(model)
    assert [module.training for module in model.modules()] == modes
    original = model.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = forward
    with pytest.raises(ModelError, match=r"logits.*mce_weight: 0"):
        check_head(model)


def test_forward_without_the_keyword_is_untouched():
    model = tiny_model().eval()
    ids = torch.arange(3, 11).unsqueeze(0)
    before = model(input_ids=ids).logits
    add_matrix_head(model, LossSettings())
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)


def test_effective_rank_of_the_head_lies_between_collapse_and_isotropy():
    model = tiny_model()
    assert 16 < head_effective_rank(model) <= 32
    model.lm_head.weight.data[:] = 1.0
    assert head_effective_rank(model) == pytest.approx(1.0, abs=1e-3)


def test_embeddings_from_the_input_table_or_a_file(tmp_path):
    from safetensors.torch import save_file

    model = tiny_model()
    ids = torch.randint(3, V, (2, 6))
    for source, table in (
        ("input", model.get_input_embeddings().weight),
        (str(tmp_path / "e.safetensors"), torch.randn(V, 7)),
    ):
        if source != "input":
            save_file({"embeddings": table}, source)
        fresh = tiny_model()
        add_matrix_head(fresh, LossSettings(solver="exact", embeddings=source))
        out = fresh(input_ids=ids, labels=ids, matrix_loss=True)
        expected = token_mce(
            fresh(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), table.detach(), solver="exact"
        )
        torch.testing.assert_close(out.matrix_cross_entropy.flatten(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_embedding_files_that_cannot_be_used_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "e.safetensors"
    for tensors, said in [
        ({"e": torch.randn(5, 7)}, rf"mce_embeddings=.*\(5, 7\).*\({V}, D\)"),
        ({"a": torch.randn(V, 7), "b": torch.randn(V, 7)}, r"mce_embeddings=.*\['a', 'b'\].*Save it alone"),
        ({"e": torch.full((V, 7), torch.nan)}, "mce_embeddings=.*NaN.*Save finite"),
    ]:
        save_file(tensors, file)
        with pytest.raises(RecipeError, match=said):
            add_matrix_head(tiny_model(), LossSettings(embeddings=str(file)))
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(RecipeError, match=r"mce_embeddings=.*cannot be read"):
        add_matrix_head(tiny_model(), LossSettings(embeddings=str(file)))


def test_a_model_without_an_lm_head_is_refused_by_name():
    with pytest.raises(ModelError, match=r"LlamaModel has no LM head.*causal"):
        add_matrix_head(tiny_model().model, LossSettings())


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_head_and_tail_under_autocast_is_nearly_that_in_float32(device):
    """A vocabulary above 1,024, so that the summary of it is made where the trainer makes it: inside autocast."""
    model = tiny_model(vocab_size=1100).to(device)
    add_matrix_head(model, LossSettings())
    ids = torch.randint(3, 1100, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)

    def step(autocast):
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = model(input_ids=ids, labels=ids, matrix_loss=True)
        out.loss_sum.backward()
        return out, model.lm_head.weight.grad.clone()

    (full, expected), (half, got) = step(False), step(True)
    torch.testing.assert_close(half.loss_sum, full.loss_sum, rtol=2e-2, atol=0)
    torch.testing.assert_close(half.matrix_cross_entropy, full.matrix_cross_entropy, rtol=0.1, atol=0.1)
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 0.05 * expected.norm()
