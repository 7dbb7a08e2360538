"""`token_loss` where it must not break: ignored positions, extreme probabilities, dtypes, and what it refuses."""

import math

import pytest
import torch
from torch.nn import functional as F

from matrix_llm.base.errors import DataError, ModelError, RecipeError
from matrix_llm.losses import linear_token_loss, number_tokens, token_loss
from tests.support.token_losses import CASES, F64, MATRIX_CASES, name_of, problem, value_and_gradient

EVERY_CASE = pytest.mark.parametrize("case", CASES + MATRIX_CASES, ids=name_of)


@EVERY_CASE
def test_an_ignored_position_is_not_read_and_has_no_gradient(case):
    loss, settings = case
    logits, labels, others = problem(5, 33)
    expected = value_and_gradient(logits, labels, loss, **others, **settings)
    logits[1], others["teacher_logits"][1] = torch.nan, torch.nan
    value, gradient = value_and_gradient(logits, labels, loss, **others, **settings)
    torch.testing.assert_close((value, gradient), expected)
    assert value[1] == 0
    assert (gradient[1] == 0).all()


@EVERY_CASE
def test_a_position_does_not_depend_on_its_neighbours(case):
    loss, settings = case
    logits, labels, others = problem(5, 33)
    together = token_loss(logits, labels, loss, **others, **settings)
    teacher = others.pop("teacher_logits")
    for i in range(5):
        one = slice(i, i + 1)
        alone = token_loss(logits[one], labels[one], loss, **others, teacher_logits=teacher[one], **settings)
        torch.testing.assert_close(alone, together[one])


@EVERY_CASE
def test_without_counted_positions_the_zero_is_connected_to_the_graph(case):
    loss, settings = case
    logits, labels, others = problem(5, 33)
    value, gradient = value_and_gradient(logits, torch.full_like(labels, -100), loss, **others, **settings)
    assert (value == 0).all()
    assert (gradient == 0).all()
    others["teacher_logits"] = others["teacher_logits"][:0]
    assert token_loss(logits[:0].requires_grad_(), labels[:0], loss, **others, **settings).requires_grad


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@EVERY_CASE
def test_values_and_gradients_are_finite_where_a_probability_is_0_or_1(case, dtype):
    loss, settings = case
    logits, labels, others = problem(6, 33, removed=3)
    logits[0], logits[2] = -100.0, 100.0  # the label's probability: 1, then all are alike, then 0, then 0.99...
    logits[0, labels[0]], logits[3, labels[3]] = 100.0, -80.0
    logits[4, labels[4]] = 15.0
    logits[:, -3:] = -torch.inf
    others["teacher_logits"][5] = logits[5]  # the model is its teacher
    z = logits.to(dtype).requires_grad_()
    value = token_loss(z, labels, loss, **others, **settings)
    value.sum().backward()
    assert value.dtype == (F64 if dtype == F64 else torch.float32)
    assert value.isfinite().all()
    assert z.grad.isfinite().all()
    assert z.grad.dtype == dtype
    assert (z.grad[:, -3:] == 0).all()  # a removed token cannot be moved


@EVERY_CASE
def test_autocast_changes_nothing(case):
    loss, settings = case
    logits, labels, others = problem(5, 33)
    expected = value_and_gradient(logits.float(), labels, loss, **others, **settings)
    z = logits.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = token_loss(z, labels, loss, **others, **settings)
    got = value.detach(), torch.autograd.grad(value.sum(), z)[0]
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_the_distance_of_emo_keeps_its_digits_as_the_label_becomes_certain():
    """In float32, 1 - sum q cos has none left where d is 3e-8, nor has sum q (1 - cos) where the label's own cosine is
    not exactly 1. CE, which is 0 there, adds nothing to mode 2."""
    embeddings, labels = torch.randn(33, 8, generator=torch.Generator().manual_seed(0)), torch.arange(33)
    logits = 20.0 * torch.eye(33)
    value = token_loss(logits, labels, "emo", embeddings=embeddings, mode=2)
    e = F.normalize(embeddings.double(), dim=-1)
    d = (logits.double().softmax(-1) * (1 - e @ e.T)).sum(-1)
    assert (d < 1e-6).all()
    torch.testing.assert_close(value.double(), d, rtol=1e-5, atol=0)


def test_the_distance_of_emo_is_not_negative_where_another_vector_is_the_labels():
    """A cosine of 1 + 1e-7 would make d negative and the ratio CE / d a huge negative number, below any clamp."""
    embeddings = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    embeddings[1::2] *= torch.linspace(0.5, 2, 64)[:, None]
    labels = torch.arange(0, 128, 2)
    logits = 25 * F.one_hot(labels + 1, 128).float()  # certain of the label's twin
    value, gradient = value_and_gradient(logits, labels, "emo", embeddings=embeddings)
    ce, ce_gradient = value_and_gradient(logits, labels, "ce")
    torch.testing.assert_close(value, ce / 2, rtol=1e-4, atol=0)  # d = 0
    torch.testing.assert_close(gradient, ce_gradient / 2, rtol=0, atol=1e-4)

    hidden = logits.clone().requires_grad_()
    fused = linear_token_loss(hidden, torch.eye(128), labels, "emo", embeddings=embeddings, reduction="sum")
    torch.testing.assert_close(fused.value.detach(), ce / 2, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.autograd.grad(fused.loss, hidden)[0], ce_gradient / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("loss", "settings"), [("minus_p", {}), ("power", {"alpha": 0.01})])
def test_one_minus_p_keeps_its_digits(loss, settings):
    """In float32, 1 - p by subtraction is 0.1 % off where CE is 1e-4."""
    logits, labels = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0])
    ce = token_loss(logits, labels, "ce").double()
    alpha = settings.get("alpha", 1.0)
    torch.testing.assert_close(
        token_loss(logits, labels, loss, **settings).double(), -torch.expm1(-alpha * ce) / alpha, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("loss", "alpha"), [("minus_p", 1), ("power", 8), ("power", 0.5), ("threshold", 1)])
def test_the_gradient_keeps_its_digits_where_the_label_is_unlikely(loss, alpha, dtype):
    """p^alpha (q - onehot(y)): 1e-9 of it would be rounded to the last digit of 1."""
    logits, labels = torch.tensor([[-20.0 / alpha, 0.0, 0.0]], dtype=dtype), torch.tensor([0])
    settings = {"power": {"alpha": alpha}, "threshold": {"at": 0}}.get(loss, {})
    gradient = value_and_gradient(logits, labels, loss, **settings)[1]
    q = logits.double().softmax(-1)
    expected = q[0, 0] ** alpha * (q - F.one_hot(labels, 3))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=0)


def test_a_label_with_a_zero_vector_has_no_cosine_to_any_token():
    logits, labels, others = problem(1, 7)
    labels[0] = 6
    ce = token_loss(logits, labels, "ce")
    value, gradient = value_and_gradient(logits, labels, "emo", **others, clamp=0.5)
    torch.testing.assert_close(value, (ce + 0.5) / 2)  # d = 1 whatever q is
    torch.testing.assert_close(gradient, value_and_gradient(logits, labels, "ce")[1] / 2)
    assert token_loss(logits, labels, "mce", **others) == 0


def test_what_is_not_the_models_is_a_constant():
    logits, labels, others = problem(5, 33)
    for loss in ("emo", "kd", "soft_mce", "asft"):
        given_ = {**others, "embeddings": others["embeddings"].clone().requires_grad_()}
        given_["teacher_logits"] = others["teacher_logits"].clone().requires_grad_()
        token_loss(logits.clone().requires_grad_(), labels, loss, **given_).sum().backward()
        assert given_["embeddings"].grad is None
        assert given_["teacher_logits"].grad is None


def test_a_token_that_the_model_cannot_have_is_none_for_the_teacher():
    logits, labels, others = problem(5, 33, removed=3)
    others["teacher_logits"] = problem(5, 33)[2]["teacher_logits"]
    for loss, settings in [("kd", {}), ("kd", {"beta": 1}), ("kd", {"top_k": 5}), ("soft_ce", {}), ("asft", {})]:
        value = token_loss(logits, labels, loss, **others, **settings)
        kept = {**others, "teacher_logits": others["teacher_logits"][:, :30]}
        torch.testing.assert_close(value, token_loss(logits[:, :30], labels, loss, **kept, **settings))


# ------------------------------------------------------------------------------------------ what it is not given


@pytest.mark.parametrize(
    ("loss", "change", "said"),
    [
        ("cross_entropy", {}, ["cross_entropy", "ce"]),
        ("mce", {"top_k": 3}, ["mce", "top_k"]),
        ("emo", {"embeddings": None}, ["emo", "embeddings"]),
        ("emo", {"embeddings": torch.zeros(7, 5)}, ["embeddings", "(7, 5)", "33"]),
        ("kd", {"teacher_logits": None}, ["kd", "teacher_logits"]),
        ("kd", {"teacher_logits": torch.zeros(5, 40)}, ["40", "33", "vocabulary", "-inf"]),
        ("kd", {"teacher_logits": torch.zeros(4, 33)}, ["(4, 33)", "(5, 33)"]),
        ("kd", {"teacher_logits": torch.full((5, 33), torch.nan)}, ["teacher_logits[0, 0]", "nan"]),
        ("kd", {"teacher_logits": torch.full((5, 33), -torch.inf)}, ["teacher_logits[0]", "-inf everywhere"]),
        ("ntl", {"number_ids": None}, ["ntl", "number_ids", "number_tokens"]),
        ("ntl", {"number_values": None}, ["ntl", "number_values", "number_tokens"]),
        ("ntl", {"number_values": torch.arange(3.0)}, ["(4,)", "(3,)"]),
        ("ntl", {"number_ids": torch.tensor([1, 1, 2, 3])}, ["number_ids=[1, 1, 2, 3]", "different"]),
        ("ntl", {"number_ids": torch.tensor([1, 2, 3, 33])}, ["number_ids=[1, 2, 3, 33]", "33"]),
        ("ntl", {"number_ids": torch.arange(4.0)}, ["number_ids", "integers"]),
        ("ntl", {"number_values": torch.tensor([0.0, 1, 2, math.inf])}, ["number_values", "finite"]),
        ("ntl", {"number_values": torch.tensor([0.0, 1, 0, 1]), "squash": 2}, ["squash=2", "Remove"]),
        ("ce", {"logits": torch.zeros(5)}, ["logits", "(5,)", "(N, V)"]),
        ("ce", {"logits": torch.zeros(5, 33, dtype=torch.long)}, ["int64", "float"]),
        ("ce", {"logits": torch.full((5, 33), torch.nan)}, ["logits[0, 0]", "nan"]),
        ("ce", {"labels": torch.zeros(4, dtype=torch.long)}, ["labels", "(4,)", "(5,)"]),
        ("ce", {"labels": torch.tensor([0, 1, 33, 2, 3])}, ["label 33", "position 2"]),
        ("ce", {"labels": torch.tensor([0, -1, 3, 2, 3])}, ["label -1", "position 1"]),
    ],
)
def test_what_a_loss_cannot_be_computed_from_is_refused(loss, change, said):
    logits, labels, others = problem(5, 33)
    given_ = {"logits": logits, "labels": labels, **others, **change}
    with pytest.raises((DataError, RecipeError)) as error:
        token_loss(given_.pop("logits"), given_.pop("labels"), loss, **given_)
    message = str(error.value)
    assert "\n" not in message
    assert all(each in message for each in said)


def test_a_refusal_counts_the_ignored_positions():
    logits, labels, others = problem(5, 33)
    logits[3, 7] = others["teacher_logits"][4, 9] = torch.nan
    with pytest.raises(DataError, match=r"^logits\[3, 7\]"):
        token_loss(logits, labels, "ce")
    logits[3, 7] = 0
    with pytest.raises(DataError, match=r"^teacher_logits\[4, 9\]"):
        token_loss(logits, labels, "kd", **others)


def test_numbers_that_the_model_cannot_have_matter_only_where_the_label_is_one():
    logits, labels, others = problem(5, 33)
    logits[:, others["number_ids"]] = -torch.inf
    labels[:] = torch.tensor([5, -100, 7, 8, 9])
    value, gradient = value_and_gradient(logits, labels, "ntl", **others, reweigh=True)
    assert (value == 0).all()
    assert (gradient == 0).all()


def test_labels_that_are_no_integers_are_a_type_error():
    with pytest.raises(TypeError, match="float32"):
        token_loss(torch.zeros(2, 3), torch.zeros(2), "ce")


def test_a_label_that_the_model_cannot_have_is_refused_where_the_loss_reads_it():
    logits, labels, others = problem(5, 33)
    logits[3, labels[3]] = -torch.inf
    with pytest.raises(DataError, match=rf"logits\[3, {labels[3]}\] is -inf"):
        token_loss(logits, labels, "dft")
    assert token_loss(logits, labels, "kd", **others).isfinite().all()


@pytest.mark.parametrize(("loss", "settings"), [("kd", {"beta": 1}), ("asft", {"direction": "model_ref"})])
def test_a_divergence_that_is_infinite_is_refused(loss, settings):
    logits, labels, others = problem(5, 33)
    others["teacher_logits"][2, 8] = -torch.inf
    with pytest.raises(DataError, match=r"infinite.*position 1.*token 8"):  # the second that counts
        token_loss(logits, labels, loss, **others, **settings)
    assert token_loss(logits, labels, "kd", **others, beta=0.9).isfinite().all()


# --------------------------------------------------------------------------------------------------------- numbers


class Tokenizer:
    def __init__(self, *tokens):
        self.vocabulary = {token: i for i, token in enumerate(tokens)}

    def encode(self, text, add_special_tokens):
        """The longest token at each place; unknown characters are left out."""
        found, longest = [], sorted(self.vocabulary, key=len, reverse=True)
        while text:
            token = next((each for each in longest if text.startswith(each)), None)
            text = text[len(token or text[0]) :]
            found += [] if token is None else [self.vocabulary[token]]
        return found

    def get_vocab(self):
        return dict(self.vocabulary)


def test_number_tokens_are_the_single_ascii_digits():
    tokens = ["a", "12", " 7", "\u0663", "\u00b2", *"9876543210", "-1", "1.5"]
    tokenizer = Tokenizer(*tokens)
    ids, values = number_tokens(tokenizer)
    assert [tokens[i] for i in ids] == [str(int(value)) for value in values] == list("0123456789")
    assert list(tokenizer.vocabulary) == tokens


def test_a_tokenizer_that_never_uses_its_digits_is_refused():
    longer = [f"{space}{number}" for space in ("", " ") for number in (7, 48, 55, 12, 36, 1250, 250)]
    attached = [f"{mark}{digit}" for mark in "*=/ " for digit in "0123456789"]
    number_tokens(Tokenizer(*"0123456789", *longer))  # after "*", the 3 is alone
    with pytest.raises(ModelError, match=r"ntl.*one digit.*longer tokens"):
        number_tokens(Tokenizer(*"0123456789", *longer, *attached, "=36", "/5", "*3", "=250"))


def test_a_tokenizer_without_a_digit_is_refused():
    with pytest.raises(ModelError, match=r"ntl.*3, 7"):
        number_tokens(Tokenizer(*"01245689", "37"))
