"""Every token loss against CE: the dense float64 gradients, and the loss that training computes."""

import math

import pytest
import torch

from matrix_llm.config import MatrixConfig
from matrix_llm.diagnose.accuracy import mce_loss
from matrix_llm.diagnose.gradients import LMHead, cross_entropy, evaluate, overlap
from matrix_llm.diagnose.token_losses import SHOWN, Candidate, Choice, Measured, choose_losses, compare_losses
from matrix_llm.loss.choice import LOSSES, NEEDS_TEACHER
from matrix_llm.loss.settings import LossSettings
from matrix_llm.losses import linear_token_loss, token_loss
from tests.support.dense_gradients import case, slow_reference

EXACT = LossSettings(solver="exact")
NUMBERS = torch.arange(5, 75, 10), torch.tensor([0.0, 1, 2, 3, 5, 8, 9])  # 5, 15, 25, 35 and 45 are among the labels
MORE = [
    Candidate("threshold", {"at": 0.01}),
    Candidate("threshold", {"at": 0.01, "side": "bottom", "base": "logp"}),
    Candidate("ntl", {"kind": "mse", "reweigh": True}),
    Candidate("emo", {"clamp": None, "with_target": False}),
    Candidate("power", {"alpha": -0.5}),
]
GROUPS = {
    "all": {"all": torch.arange(11)},
    "by_kind": {
        "a": torch.tensor([0, 3, 4, 9]),
        "b": torch.tensor([1, 2, 5, 6, 7, 8, 10]),
        "c": torch.tensor([]).long(),
    },
    "by_ce": {"x": torch.tensor([2, 6, 10])},
}


def compare(name, own=None, candidates=(*SHOWN, *MORE), scale=1):
    """(model, ids, hidden, labels, what is found); `scale` on the hidden states."""
    model, ids, hidden, labels = case(name)
    hidden = hidden * scale
    head = LMHead.of(model)
    labels[::2] = head.logits(hidden).argmax(-1)[::2]  # random labels alone have p so small that p^8 is 0
    vectors = head.weight.clone()
    ce = evaluate(cross_entropy, hidden, labels, head)
    mce = evaluate(mce_loss(EXACT, vectors), hidden, labels, head)
    products = overlap(ce, ce, hidden), overlap(ce, mce, hidden), overlap(mce, mce, hidden)
    measured = Measured(hidden, labels, head, vectors, ce, mce, products)
    choice = Choice(list(candidates), own or Candidate("ce"), {}, NUMBERS)
    return model, ids, hidden, labels, compare_losses(choice, measured, 0.7, GROUPS)


def by_name(found):
    return {each["name"]: each for each in found["losses"]}


def agrees(found, ours, ces):
    """Cosine and norm of two gradients; neither is zero."""
    product = (ours * ces).sum() / ours.norm() / ces.norm()
    assert found["cosine"] == pytest.approx(product.item(), abs=1e-4)
    assert found["norm_ratio"] == pytest.approx((ours.norm() / ces.norm()).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "phi"])
def test_cosines_and_norms_of_every_loss_are_those_of_dense_float64_autograd_for_any_group(name):
    model, ids, _, labels, found = compare(name)
    vectors = LMHead.of(model).weight.double()
    losses = by_name(found)
    assert len(losses) == 3 + len(SHOWN) + len(MORE)
    for candidate in [*SHOWN, *MORE]:
        reads = {"embeddings": vectors} if candidate.loss == "emo" else {}
        reads |= dict(zip(("number_ids", "number_values"), NUMBERS, strict=True)) if candidate.loss == "ntl" else {}
        reads |= candidate.given
        share = len(labels) / sum(int(label) in NUMBERS[0] for label in labels)
        if "weight" in candidate.given:
            reads["weight"] *= share
        for group, at in GROUPS["by_kind"].items():
            if not len(at):
                assert group not in losses[candidate.name]["gradients"]["by_kind"]
                continue
            _, ces, ces_head = slow_reference(model, ids, labels, cross_entropy, at)
            _, ours, ours_head = slow_reference(
                model, ids, labels, lambda z, y, c=candidate, r=reads: token_loss(z, y, c.loss, **r), at
            )
            scale = share if candidate.given.get("kind") == "mse" else 1.0
            figures = losses[candidate.name]["gradients"]["by_kind"][group]
            agrees(figures["hidden"], scale * ours[at], ces[at])
            agrees(figures["head"], scale * ours_head, ces_head)
            norms = ours.norm(dim=-1)
            assert figures["share_of_gradient"] == pytest.approx((norms[at].sum() / norms.sum()).item(), rel=1e-3)


@pytest.mark.parametrize("candidate", [*SHOWN, *MORE, Candidate("ce")], ids=lambda each: each.name)
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_value_and_gradients_are_those_of_the_loss_that_a_run_computes(candidate, weight):
    own = Candidate(candidate.loss, candidate.given, weight)
    candidates = [candidate] if candidate.loss != "ce" else []
    model, _, hidden, labels, found = compare("phi", own=own, candidates=candidates)
    head = LMHead.of(model)
    numbers = dict(zip(("number_ids", "number_values"), NUMBERS, strict=True)) if candidate.loss == "ntl" else {}

    def gradients(loss, weight, settings):
        h, w = (each.double().requires_grad_(True) for each in (hidden, head.weight))
        given = {"mce_weight": weight, "bias": head.bias.double(), "settings": settings, "matrix": EXACT}
        if loss == "threshold":  # a run divides it by all positions
            total = linear_token_loss(h, w, labels, loss, reduction="sum", **given).loss / len(labels)
        else:
            total = linear_token_loss(h, w, labels, loss, **given).loss
        return total.item(), *torch.autograd.grad(total, (h, w))

    value, in_hidden, in_head = gradients(candidate.loss, weight, {**candidate.given, **numbers})
    _, ces_hidden, ces_head = gradients("ce", 0.0, {})
    trained = by_name(found)[found["own"]]
    assert trained["value"] == pytest.approx(value, rel=1e-5)
    agrees(trained["gradients"]["all"]["all"]["hidden"], in_hidden, ces_hidden)
    agrees(trained["gradients"]["all"]["all"]["head"], in_head, ces_head)


def test_every_loss_is_shown_or_left_out_with_the_reason(tiny_tokenizer, tmp_path):
    labels = torch.tensor(tiny_tokenizer.encode("1 + 1 = 2", add_special_tokens=False))
    chosen = choose_losses(MatrixConfig(output_dir=str(tmp_path), use_cpu=True), labels, tiny_tokenizer)
    shown = {each.loss for each in chosen.candidates} | {"ce"}
    assert shown | set(chosen.left_out) == set(LOSSES)
    assert not shown & set(chosen.left_out)
    assert set(chosen.left_out) == {*NEEDS_TEACHER, "threshold"}
    assert all("teacher" in chosen.left_out[name] for name in NEEDS_TEACHER)
    assert chosen.own.name == "CE+MCE"


class NoSeven:
    """A tokenizer without a token for 7."""

    def __init__(self, tokenizer):
        self.vocabulary = {token: place for token, place in tokenizer.get_vocab().items() if token != "7"}

    def get_vocab(self):
        return self.vocabulary


@pytest.mark.parametrize(("text", "wrapped", "said"), [
    (" apples and", False, "none of the labels"), ("1 + 1", True, "ten digits"),
])  # fmt: skip
def test_without_numbers_ntl_is_left_out(text, wrapped, said, tiny_tokenizer, tmp_path):
    labels = torch.tensor(tiny_tokenizer.encode(text, add_special_tokens=False))
    tokenizer = NoSeven(tiny_tokenizer) if wrapped else tiny_tokenizer
    chosen = choose_losses(MatrixConfig(output_dir=str(tmp_path), use_cpu=True), labels, tokenizer)
    assert said in chosen.left_out["ntl"]
    assert "ntl" not in {each.loss for each in chosen.candidates}


@pytest.mark.parametrize(("loss", "settings", "weight", "name", "more"), [
    ("ce", None, 0.0, "ce", 0),
    ("dft", None, 0.0, "dft", 0),
    ("focal", {"gamma": 2}, 0.5, "focal+0.5MCE", 0),  # the default: shown anyway
    ("focal", {"gamma": 3}, 1.0, "focal(gamma=3)+MCE", 1),
    ("threshold", {"at": 0.1, "side": "bottom"}, 0.0, "threshold(at=0.1, side=bottom)", 1),
    ("ntl", None, 0.0, "ntl(weight=0.3)", 0),  # a recipe's ntl is CE + 0.3 NTL
    ("ntl", {"weight": None}, 0.0, "ntl", 1),
    ("emo", {"mode": 2}, 0.0, "emo(mode=2)", 0),
    ("kd", {"beta": 1}, 0.0, "kd(beta=1)", 0),
])  # fmt: skip
def test_the_recipes_own_loss_is_shown_with_its_settings(loss, settings, weight, name, more, tiny_tokenizer, tmp_path):
    training = MatrixConfig(output_dir=str(tmp_path), use_cpu=True, mce_weight=weight)
    training.token_loss, training.token_loss_settings = loss, settings
    labels = torch.tensor(tiny_tokenizer.encode("1 + 1", add_special_tokens=False))
    chosen = choose_losses(training, labels, tiny_tokenizer)
    assert chosen.own.name == name
    assert len(chosen.candidates) == len(SHOWN) + more
    assert ("threshold" in chosen.left_out) == (loss != "threshold")


def test_a_loss_whose_gradient_overflows_is_left_out_with_the_reason():
    found = compare("llama", candidates=[Candidate("power", {"alpha": -1.0}), Candidate("dft")], scale=60)[-1]
    assert "overflows" in found["left_out"]["power(alpha=-1)"]  # the gradient is CE's / p, and CE is above 88
    assert [each["name"] for each in found["losses"]] == ["ce", "dft", "mce", "CE+0.7MCE"]


def test_equal_losses_are_found_equal():
    losses = by_name(compare("llama")[-1])
    alike = losses["dft"]["gradients"]["all"]["all"], losses["minus_p"]["gradients"]["all"]["all"]
    assert alike[0]["hidden"] == pytest.approx(alike[1]["hidden"], rel=1e-6)
    assert losses["ce"]["gradients"]["all"]["all"]["hidden"] == {"cosine": pytest.approx(1), "norm_ratio": 1.0}
    assert not math.isclose(losses["dft"]["value"], losses["minus_p"]["value"])
