"""`losses.linear_token_loss`, the fused head, against `losses.token_loss`, the dense reference, in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from matrix_llm.base.errors import RecipeError
from matrix_llm.loss import chunks
from matrix_llm.loss.choice import LOSSES
from matrix_llm.loss.settings import LossSettings
from matrix_llm.losses import Teacher, TopTokens, linear_token_loss, token_loss
from matrix_llm.mce import linear_matrix_cross_entropy, token_mce

NUMBER_IDS, NUMBER_VALUES = torch.tensor([0, 3, 5, 6, 4]), torch.tensor([0.0, 1, 2, 5, 9])
CASES = [
    ("ce", {}),
    ("dft", {}),
    ("minus_p", {}),
    ("power", {"alpha": 2.0}),
    ("power", {"alpha": 0.0}),
    ("power", {"alpha": -0.5}),
    ("threshold", {"at": 0.02}),
    ("threshold", {"at": 0.02, "side": "bottom", "base": "logp"}),
    ("focal", {}),
    ("focal", {"gamma": 0.5}),
    ("eaft", {}),
    ("eaft", {"k": 5, "alpha": 2.0, "scale": 1.0}),
    ("asft", {}),
    ("asft", {"direction": "model_ref", "weight": 0.5}),
    ("label_smoothing", {}),
    ("z_loss", {"weight": 0.01}),
    ("gem", {}),
    ("gem", {"h": "logsigmoid", "beta": 0.5}),
    ("ntl", {}),
    ("ntl", {"kind": "mse"}),
    ("ntl", {"reweigh": True}),
    ("ntl", {"kind": "mse", "reweigh": True}),
    ("ntl", {"squash": 3.0}),
    ("ntl", {"weight": 0.3}),
    ("ntl", {"weight": 0.3, "reweigh": True}),
    ("emo", {}),
    ("emo", {"mode": 2}),
    ("emo", {"clamp": None, "with_target": False}),
    ("kd", {}),
    ("kd", {"beta": 1.0, "temperature": 0.7}),
    ("kd", {"beta": 0.3, "temperature": 2.0}),
    ("kd", {"top_k": 3}),
    ("kd", {"top_k": 3, "renormalise": False, "temperature": 0.7}),
    ("kd", {"top_k": 3, "beta": 0.5}),
    ("soft_ce", {}),
    ("soft_mce", {}),
    ("soft_mce", {"top_k": 3}),
]
IDS = [f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings in CASES]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(7, 3, 1), (33, 8, 6), (257, 16, 13)]  # V, H, N


class Inputs:
    """Hidden states, LM head and teacher, with an ignored label, a confident position and a zero token vector."""

    def __init__(self, vocabulary: int, width: int, positions: int, bias: str | None = None) -> None:
        generator = torch.Generator().manual_seed(vocabulary)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = 0.8 * normal(vocabulary, width)
        self.hidden = normal(positions, width)
        self.labels = torch.randint(vocabulary, (positions,), generator=generator)
        self.weight[2] = 0
        if positions > 5:
            self.labels[1], self.labels[3], self.labels[4] = -100, 2, 5
            self.hidden[0] = 3 * self.weight[self.labels[0]]  # nearly certain
            self.labels[5] = self.labels[2]  # a label twice in a chunk
        self.bias = None if bias is None else 0.3 * normal(vocabulary)
        if bias == "removes tokens":
            assert self.bias is not None
            unused = [token for token in range(vocabulary) if token not in self.labels.tolist()]
            self.bias[unused[::5]] = -torch.inf
        self.teacher = Teacher(normal(positions, 5), normal(vocabulary, 5))
        self.teacher_logits = self.teacher.hidden @ self.teacher.weight.T

    def leaves(self) -> list[Tensor]:
        tensors = (self.hidden, self.weight, self.bias)
        return [each.clone().requires_grad_() for each in tensors if each is not None]

    def needs(self, name: str) -> dict:
        """What the dense reference is given."""
        if name in ("asft", "kd", "soft_ce"):
            return {"teacher_logits": self.teacher_logits}
        if name == "soft_mce":
            return {"teacher_logits": self.teacher_logits, "embeddings": self.weight}
        if name == "ntl":
            return {"number_ids": NUMBER_IDS, "number_values": NUMBER_VALUES}
        return {"embeddings": self.weight} if name == "emo" else {}

    def fused(self, name: str, settings: dict, leaves: list[Tensor], **options):
        numbers = {"number_ids": NUMBER_IDS, "number_values": NUMBER_VALUES} if name == "ntl" else {}
        teacher = self.teacher if name in ("asft", "kd", "soft_ce", "soft_mce") else None
        options = {"teacher": teacher, "matrix": LossSettings(solver="exact")} | options
        hidden, weight, *bias = leaves
        return linear_token_loss(
            hidden, weight, self.labels, name, bias=bias[0] if bias else None, settings=settings | numbers, **options
        )


def dense_logits(leaves: list[Tensor], scale: float, cap: float | None) -> Tensor:
    hidden, weight, *bias = leaves
    z = scale * (hidden @ weight.T + (bias[0] if bias else 0.0))
    return z if cap is None else cap * torch.tanh(z / cap)


def assert_same_gradients(made: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(made, expected, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_value_and_gradients_are_those_of_the_dense_reference(name, settings, shape, monkeypatch):
    """With soft-cap, scale and MCE on top, chunks of 4 positions, and blocks of 3."""
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(chunks, "LEAST_BLOCK", 3)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setattr("matrix_llm.loss.linear.positions_per_chunk", lambda *_, **__: 4)
    inputs = Inputs(*shape, bias="plain")
    made, expected = inputs.leaves(), inputs.leaves()
    out = inputs.fused(name, settings, made, mce_weight=0.7, logit_scale=0.7, softcap=5.0, reduction="sum")
    out.loss.backward()

    z = dense_logits(expected, 0.7, 5.0)
    value = token_loss(z, inputs.labels, name, **inputs.needs(name), **settings)
    counted = inputs.labels != -100
    mce = token_mce(z[counted], inputs.labels[counted], inputs.weight, solver="exact")
    (value.sum() + 0.7 * mce.sum()).backward()

    torch.testing.assert_close(out.value, value.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.loss, value.sum() + 0.7 * mce.sum(), rtol=1e-10, atol=1e-10)
    assert_same_gradients(made, expected)
    ce = token_loss(z, inputs.labels, "ce")
    torch.testing.assert_close(out.cross_entropy, ce.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_tokens_that_a_bias_removes_stay_removed(name, settings, monkeypatch):
    """Without a soft-cap, where the gradient of a wide loss replaces the logits, in blocks of 4 of 6 positions."""
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(chunks, "LEAST_BLOCK", 4)
    inputs = Inputs(33, 8, 6, bias="removes tokens")
    made, expected = inputs.leaves(), inputs.leaves()
    out = inputs.fused(name, settings, made, reduction="sum")
    out.loss.backward()
    z = dense_logits(expected, 1.0, None)
    token_loss(z, inputs.labels, name, **inputs.needs(name), **settings).sum().backward()
    assert_same_gradients(made, expected)
    q = z.detach().softmax(-1)
    entropy = -torch.special.xlogy(q, q).sum(-1).where(inputs.labels != -100, 0.0)
    torch.testing.assert_close(out.entropy, entropy)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_without_mce_only_the_token_loss_is_trained_and_mce_is_measured(name, settings):
    inputs = Inputs(33, 8, 6)
    made, expected = inputs.leaves(), inputs.leaves()
    out = inputs.fused(name, settings, made, reduction="none", matrix=LossSettings(top_k=4))
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)  # a weight of its own for each position
    (out.loss * weights).sum().backward()
    value = token_loss(dense_logits(expected, 1.0, None), inputs.labels, name, **inputs.needs(name), **settings)
    (value * weights).sum().backward()
    if name != "soft_mce":  # whose solver is then approximate
        torch.testing.assert_close(out.loss, value, rtol=1e-10, atol=1e-10)
        assert_same_gradients(made, expected)
    assert (out.matrix_cross_entropy > 0).sum() >= 4


def test_ce_is_linear_matrix_cross_entropy():
    inputs = Inputs(257, 16, 13)
    made, expected = inputs.leaves(), inputs.leaves()
    out = linear_token_loss(*made, inputs.labels, mce_weight=1.0)
    reference = linear_matrix_cross_entropy(*expected, inputs.labels)
    out.loss.backward()
    reference.loss.backward()
    assert torch.equal(out.loss, reference.loss)
    assert torch.equal(made[0].grad, expected[0].grad)
    assert torch.equal(out.value, reference.cross_entropy)


@pytest.mark.parametrize("mce_weight", [0.0, 0.5])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_the_mean_is_over_the_positions_that_the_loss_counts(name, settings, mce_weight):
    """The trained positions; for ntl those whose label is a number, and for threshold those that it keeps."""
    inputs = Inputs(33, 8, 6)
    made, expected = inputs.leaves(), inputs.leaves()
    out = inputs.fused(name, settings, made, mce_weight=mce_weight)
    out.loss.backward()
    z = dense_logits(expected, 1.0, None)
    value = token_loss(z, inputs.labels, name, **inputs.needs(name), **settings)
    counted = inputs.labels != -100
    ce = token_loss(z, inputs.labels, "ce")
    count = counted.sum()
    if name == "ntl":
        numbers = torch.isin(inputs.labels, NUMBER_IDS).sum()
        alone = token_loss(z, inputs.labels, name, **inputs.needs(name), **settings | {"weight": None})
        mean = alone.sum() / numbers
        if "weight" in settings:
            mean = ce.sum() / count + settings["weight"] * mean
    elif name == "threshold":
        p = (-ce).exp()
        kept = counted & ((p <= settings["at"]) if settings.get("side") == "bottom" else (p >= settings["at"]))
        mean = value.sum() / kept.sum()
    else:
        mean = value.sum() / count
    mce = token_mce(z[counted], inputs.labels[counted], inputs.weight, solver="exact")
    (mean + mce_weight * mce.sum() / count).backward()
    torch.testing.assert_close(out.loss, mean + mce_weight * mce.sum() / count, rtol=1e-10, atol=1e-10)
    assert_same_gradients(made, expected)


@pytest.mark.parametrize("name", ["kd", "soft_ce", "soft_mce"])
@pytest.mark.parametrize("form", ["logits", "stored", "tuple"])
def test_a_teacher_may_be_logits_or_its_stored_likeliest_tokens(name, form, monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(chunks, "LEAST_BLOCK", 4)
    inputs = Inputs(33, 8, 6)
    logs = torch.log_softmax(inputs.teacher_logits, -1)
    values, ids = logs.topk(33)
    teacher = {"logits": inputs.teacher_logits, "stored": TopTokens(ids, values), "tuple": (ids, values)}[form]
    made = inputs.leaves()
    out = inputs.fused(name, {}, made, teacher=teacher, reduction="sum")
    expected = token_loss(dense_logits(made, 1.0, None), inputs.labels, name, **inputs.needs(name))
    torch.testing.assert_close(out.value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [tuple, list])
def test_a_plain_tuple_is_a_teacher_with_all_its_parts(form):
    inputs = Inputs(33, 8, 6)
    parts = Teacher(*inputs.teacher[:2], bias=torch.linspace(-1, 1, 33).double(), logit_scale=0.5, softcap=3.0)
    leaves = inputs.leaves()
    values = [inputs.fused("kd", {}, leaves, teacher=each).value for each in (parts, form(parts))]
    assert torch.equal(*values)
    values, ids = torch.log_softmax(inputs.teacher_logits, -1).topk(5)
    stored = [inputs.fused("kd", {}, leaves, teacher=form((each, values))).value for each in (ids, ids.int())]
    assert torch.equal(*stored)


@pytest.mark.parametrize("form", ["hidden states", "logits"])
@pytest.mark.parametrize("name", ["kd", "asft", "soft_ce", "soft_mce"])
def test_mce_may_aim_at_the_teacher_as_well(name, form, monkeypatch):
    """At its 16 likeliest tokens, scaled to sum to 1; in chunks of 4, and with a soft-cap."""
    monkeypatch.setattr("matrix_llm.loss.linear.positions_per_chunk", lambda *_, **__: 4)
    inputs = Inputs(33, 8, 6)
    made, expected = inputs.leaves(), inputs.leaves()
    out = inputs.fused(
        name, {}, made, mce_weight=0.7, softcap=5.0, reduction="sum",
        teacher=inputs.teacher if form == "hidden states" else inputs.teacher_logits,
        matrix=LossSettings(solver="exact", target="teacher", token_loss="kd"),
    )  # fmt: skip
    out.loss.backward()
    z = dense_logits(expected, 1.0, 5.0)
    value = token_loss(z, inputs.labels, name, **inputs.needs(name))
    given = {"teacher_logits": inputs.teacher_logits, "embeddings": inputs.weight}
    mce = token_loss(z, inputs.labels, "soft_mce", **given, top_k=16)
    (value.sum() + 0.7 * mce.sum()).backward()
    torch.testing.assert_close(out.matrix_cross_entropy, mce.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.value, value.detach(), rtol=1e-9, atol=1e-9)
    assert_same_gradients(made, expected)


@pytest.mark.parametrize("name", ["soft_ce", "soft_mce"])
def test_the_floor_is_what_a_student_equal_to_its_teacher_reaches(name):
    inputs = Inputs(33, 8, 6)
    counted = inputs.labels != -100
    z = (inputs.hidden @ inputs.weight.T)[counted]
    out = inputs.fused(name, {}, inputs.leaves(), teacher=Teacher(inputs.hidden, inputs.weight))
    torch.testing.assert_close(out.floor, out.value, rtol=1e-7, atol=1e-7)
    if name == "soft_ce":
        q = z.softmax(-1)
        torch.testing.assert_close(out.floor[counted], torch.special.entr(q).sum(-1), rtol=1e-9, atol=1e-9)
    other = inputs.fused(name, {}, inputs.leaves())
    assert (other.value - other.floor)[counted].min() > 0


def test_mce_towards_a_teacher_needs_one():
    with pytest.raises(RecipeError, match=r"target='teacher'.*kd"):
        linear_token_loss(
            torch.zeros(1, 3), torch.eye(3), torch.tensor([0]), "dft",
            matrix=LossSettings(target="teacher", token_loss="kd"),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_half_precision_is_near_float64(name, settings, dtype):
    inputs = Inputs(257, 16, 13)
    inputs.hidden *= 0.4  # nowhere so certain that 1 - p is rounding
    exact = inputs.leaves()
    made = [each.to(dtype).detach().requires_grad_() for each in exact]
    inputs.teacher = Teacher(*(each.to(dtype) for each in inputs.teacher[:2]))
    out = inputs.fused(name, settings, made, matrix=LossSettings(top_k=256))
    rounded = [each.detach().double().requires_grad_() for each in made]
    inputs.teacher = Teacher(*(each.double() for each in inputs.teacher[:2]))
    reference = inputs.fused(name, settings, rounded, matrix=LossSettings(solver="exact"))
    out.loss.backward()
    reference.loss.backward()
    tolerance = 1e-3 if dtype == torch.float32 else 0.02
    assert out.value.dtype == torch.float32
    assert (out.value.double() - reference.value).abs().max() <= 1e-3 * reference.value.abs().max()
    for a, b in zip(made, rounded, strict=True):
        assert (a.grad.double() - b.grad).norm() <= tolerance * b.grad.norm()


def flops_of(inputs: Inputs, name: str, settings: dict) -> int:
    """Operations of all matrix products of a forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        inputs.fused(name, settings, inputs.leaves(), matrix=LossSettings(top_k=4)).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if case[0] != "soft_mce"], ids=IDS[:-2])
def test_a_loss_makes_no_product_that_it_does_not_need(name, settings):
    """Those of CE; emo one with the vectors of its labels, each of them once; a teacher that of its LM head."""
    inputs = Inputs(257, 16, 13)
    trained = inputs.labels[inputs.labels != -100]
    extra = 0
    if name == "emo":
        extra = 2 * len(trained.unique()) * 257 * 16
        assert len(trained.unique()) < len(trained)
    elif name in ("asft", "kd", "soft_ce"):
        extra = 2 * len(trained) * 257 * 5
    assert flops_of(inputs, name, settings) == flops_of(inputs, "ce", {}) + extra


@pytest.mark.parametrize("mce_weight", [0.0, 1.0])
@pytest.mark.parametrize("name", list(LOSSES))
def test_without_a_trained_position_the_loss_is_a_connected_zero(name, mce_weight):
    inputs = Inputs(33, 8, 6)
    inputs.labels.fill_(-100)
    made = inputs.leaves()
    required = {"power": {"alpha": 1.0}, "threshold": {"at": 0.1}}
    out = inputs.fused(name, required.get(name, {}), made, mce_weight=mce_weight)
    out.loss.backward()
    assert out.loss == 0
    assert all((each.grad == 0).all() for each in made)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("emo", {"settings": {"clmp": 3}}, "clmp"),
        ("focal", {"settings": {"gamma": -1}}, "gamma"),
        ("nope", {}, "nope"),
        ("kd", {}, "teacher"),
        ("kd", {"teacher": torch.zeros(2, 4)}, "vocabulary of 4"),
        ("kd", {"teacher": torch.zeros(1, 3)}, "2 positions"),
        ("kd", {"teacher": (torch.tensor([[3], [0]]), torch.zeros(2, 1))}, "id 3"),
        ("kd", {"teacher": {"hidden": torch.zeros(2, 3), "weight": torch.eye(3)}}, r"is a dict.*Teacher\(hidden"),
        ("kd", {"teacher": (torch.zeros(2, 3),)}, r"is a tuple.*Teacher\(hidden"),
        ("ntl", {}, "number_ids"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, options, words):
    with pytest.raises(ValueError, match=words) as refused:
        linear_token_loss(torch.zeros(2, 3), torch.eye(3), torch.tensor([0, 1]), name, **options)
    assert "\n" not in str(refused.value)


def test_what_a_loss_does_not_read_may_be_given_as_to_the_dense_reference():
    inputs = Inputs(33, 8, 6)
    numbers = {"number_ids": NUMBER_IDS, "number_values": NUMBER_VALUES}
    given = linear_token_loss(*inputs.leaves(), inputs.labels, "dft", teacher=inputs.teacher, settings=numbers)
    assert torch.equal(given.value, linear_token_loss(*inputs.leaves(), inputs.labels, "dft").value)


def test_emo_takes_vectors_of_another_precision():
    inputs = Inputs(33, 8, 6)
    leaves = [each.float() for each in inputs.leaves()]
    out = [linear_token_loss(*leaves, inputs.labels, "emo", embeddings=leaves[1].to(d)).value for d in DTYPES]
    torch.testing.assert_close(out[0], out[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[0], out[2], rtol=0.02, atol=0.02)


def test_a_soft_target_of_a_whole_large_vocabulary_is_refused():
    with pytest.raises(RecipeError, match="top_k"):
        linear_token_loss(
            torch.zeros(2, 3), torch.ones(2000, 3), torch.tensor([0, 1]), "soft_mce", teacher=torch.zeros(2, 2000)
        )
