"""`token_loss` against formulas and implementations that are not its own."""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from matrix_llm import losses
from matrix_llm.information import matrix_entropy
from matrix_llm.loss import choice
from matrix_llm.loss.reference import FUNCTIONS
from matrix_llm.losses import token_loss
from matrix_llm.mce import token_mce
from tests.support.token_losses import CASES, F64, MATRIX_CASES, name_of, problem, value_and_gradient

SIZES = [(1, 7, 0), (5, 33, 0), (5, 33, 4), (3, 257, 9)]  # positions, vocabulary, tokens with a logit of -inf


def test_doctests():
    assert doctest.testmod(losses).failed == doctest.testmod(choice).failed == 0


# ------------------------------------------------------------------------------- values and gradients, written out


class Written:
    """Value and gradient of one position by the formulas of docs/losses.md, one number at a time: no autograd, nothing
    of the package."""

    def __init__(self, z, y, others):
        self.z, self.y, self.others = z, int(y), others
        self.q = torch.softmax(z, -1)
        self.onehot = F.one_hot(torch.tensor(self.y), len(z)).to(F64)
        self.p = self.q[self.y].item()
        self.ce = math.log(sum(math.exp(each - z.max()) for each in z.tolist())) + (z.max() - z[self.y]).item()
        self.direction = self.q - self.onehot  # the gradient of CE
        self.possible = z > -torch.inf

    def gate(self, value, weight):
        return value, weight * self.direction

    def of_ce(self):
        return self.gate(self.ce, 1)

    def of_dft(self):
        return self.gate(self.p * self.ce, self.p)

    def of_minus_p(self):
        return self.gate(1 - self.p, self.p)

    def of_power(self, alpha):
        return self.of_ce() if alpha == 0 else self.gate((1 - self.p**alpha) / alpha, self.p**alpha)

    def of_threshold(self, base, side, at):
        kept = self.p >= at if side == "top" else self.p <= at
        return self.gate(kept * (self.ce if base == "logp" else 1 - self.p), kept * (1 if base == "logp" else self.p))

    def of_focal(self, gamma):
        rest = 1 - self.p
        weight = rest**gamma + gamma * self.p * rest ** (gamma - 1) * self.ce
        return self.gate(rest**gamma * self.ce, weight)

    def of_eaft(self, alpha=1.0, k=20, scale=3.0):
        r = torch.softmax(self.z.sort(descending=True).values[:k], -1)
        weight = (-sum(each * math.log(each) for each in r.tolist() if each > 0) / scale) ** alpha
        return self.gate(weight * self.ce, weight)

    def of_label_smoothing(self, epsilon):
        even = self.possible.to(F64) / self.possible.sum()
        mean = (self.z[self.possible] - self.q[self.possible].log()).mean() - self.z[self.possible].mean()  # L - mean z
        return (1 - epsilon) * self.ce + epsilon * mean, self.q - (1 - epsilon) * self.onehot - epsilon * even

    def of_z_loss(self, weight):
        log_sum = torch.logsumexp(self.z, -1)
        return self.ce + weight * log_sum**2, self.direction + 2 * weight * log_sum * self.q

    def of_gem(self, beta=0.7, h="linear"):
        r = torch.softmax(self.z / beta, -1)
        w = torch.sigmoid((self.z - self.z[self.y]) / 100) if h == "logsigmoid" else torch.ones_like(r)
        total = (r * w).sum()
        terms = [r[j] * w[j] * (self.z[j] - self.z[self.y]) for j in range(len(r)) if self.possible[j]]
        return sum(terms), r * w - total * self.onehot

    def of_ntl(self, kind="was", reweigh=False, squash=None, weight=None):
        ids, v = self.others["number_ids"].tolist(), self.others["number_values"].tolist()
        value, gradient = 0.0, torch.zeros_like(self.z)
        if self.y in ids:
            mine, s = v[ids.index(self.y)], torch.softmax(self.z[ids], -1)
            between = [abs(a - b) for a in v for b in v if a != b]
            distance = torch.tensor([abs(each - mine) for each in v], dtype=F64)
            largest = max(between)
            if squash:
                slope = (squash - 1) / (max(between) - min(between))
                distance = torch.where(distance > 0, 1 + (distance - min(between)) * slope, 0.0)
                largest = squash
            if kind == "was":
                value = (s * distance).sum()
                gradient[ids] = s * (distance - value)
            else:
                expected = sum(a * b for a, b in zip(s.tolist(), v, strict=True))
                value, largest = (expected - mine) ** 2, largest**2
                gradient[ids] = 2 * (expected - mine) * s * (torch.tensor(v, dtype=F64) - expected)
            if reweigh:
                mass = self.q[ids].sum()
                inside = torch.zeros_like(self.z)
                inside[ids] = 1
                gradient = mass * gradient + (value - 1.01 * largest) * self.q * (inside - mass)
                value = mass * value + 1.01 * largest * (1 - mass)
        return (value, gradient) if weight is None else (self.ce + weight * value, self.direction + weight * gradient)

    def of_emo(self, mode=1, clamp=3.0, with_target=True):
        e = self.others["embeddings"]
        cosines = torch.stack([F.cosine_similarity(row, e[self.y], dim=0) for row in e])
        mean = (self.q * cosines).sum()
        d = 1 - mean + (0 if with_target else self.p)
        of_d = -self.q * (cosines - mean)
        if mode == 2:
            return 2 * d, d / (self.ce + 1e-10) * self.direction + of_d
        ratio = self.ce / (d + 1e-10) if clamp is None else min(self.ce / (d + 1e-10), clamp)
        return (self.ce + ratio * d) / 2, (self.direction + ratio * of_d) / 2

    def teacher(self, temperature=1.0, top_k=None, renormalise=True):
        t = torch.softmax(self.others["teacher"] / temperature, -1)
        if top_k:
            t = torch.where(t >= t.sort().values[-top_k], t, 0.0)
            t = t / t.sum() if renormalise else t
        return t

    @staticmethod
    def divergence(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True) if x > 0)

    def of_kd(self, beta=0, temperature=1.0, top_k=None, renormalise=True):
        t, s = self.teacher(temperature, top_k, renormalise), torch.softmax(self.z / temperature, -1)
        if beta == 0:
            return self.divergence(t, s), (t.sum() * s - t) / temperature
        m = t if beta == 1 else beta * t + (1 - beta) * s
        gap = torch.where(s > 0, s.log() - m.log(), 0.0)
        gradient = s * (gap - (s * gap).sum()) / temperature
        if beta == 1:
            return self.divergence(s, t), gradient
        return beta * self.divergence(t, m) + (1 - beta) * self.divergence(s, m), (1 - beta) * gradient

    def of_asft(self, weight, direction="ref_model"):
        value, gradient = self.of_dft()
        kl, of_kl = self.of_kd(beta=0 if direction == "ref_model" else 1)
        return value + weight * kl, gradient + weight * of_kl

    def of_soft_ce(self):
        t = self.teacher()
        value = -sum(a * math.log(b) for a, b in zip(t.tolist(), self.q.tolist(), strict=True) if a > 0)
        return value, self.q - t


def written_out(logits, labels, loss, others, settings):
    values, gradients = torch.zeros(len(labels), dtype=F64), torch.zeros_like(logits)
    for i, (z, y) in enumerate(zip(logits, labels, strict=True)):
        if y != -100:
            position = Written(z, y, {**others, "teacher": others["teacher_logits"][i]})
            values[i], gradients[i] = getattr(position, f"of_{loss}")(**settings)
    return values, gradients


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_value_and_gradient_are_the_formulas_written_out(case, size):
    loss, settings = case
    n, v, removed = size
    for scale in (1.0, 4.0):
        logits, labels, others = problem(n, v, removed=removed, scale=scale, seed=n + v)
        value, gradient = value_and_gradient(logits, labels, loss, **others, **settings)
        expected, expected_gradient = written_out(logits, labels, loss, others, settings)
        torch.testing.assert_close(value, expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=1e-10)


def test_every_loss_is_in_the_cases():
    assert {loss for loss, _ in CASES + MATRIX_CASES} == set(FUNCTIONS)


@pytest.mark.parametrize("case", MATRIX_CASES, ids=name_of)
def test_matrix_losses_are_the_mean_of_mce_under_the_target(case):
    loss, settings = case
    logits, labels, others = problem(4, 13, removed=2, d=4)
    labels[-1] = 6
    target = F.one_hot(labels.clamp(min=0), 13).to(F64)
    if loss == "soft_mce":
        kept = others["teacher_logits"].topk(settings.get("top_k", 13)).indices
        target = torch.zeros_like(target).scatter(1, kept, others["teacher_logits"].gather(1, kept).exp())
        target = target / target.sum(-1, keepdim=True)
    z = logits.clone().requires_grad_()
    of_token = [token_mce(z, torch.full_like(labels, j), others["embeddings"], solver="exact") for j in range(13)]
    expected = (target * torch.stack(of_token, 1)).sum(-1) * (labels != -100)
    expected_gradient = torch.autograd.grad(expected.sum(), z)[0]
    value, gradient = value_and_gradient(logits, labels, loss, **others, **settings)
    torch.testing.assert_close(value, expected.detach(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=1e-10)


# -------------------------------------------------------------------------------------- implementations of others


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torchs(epsilon):
    logits, labels, _ = problem(5, 33)
    z = logits.clone().requires_grad_()
    expected = F.cross_entropy(z, labels, label_smoothing=epsilon, reduction="none")
    value, gradient = value_and_gradient(logits, labels, "label_smoothing", epsilon=epsilon)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])


@pytest.mark.slow  # importing TRL's trainers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("beta", "temperature"), [(0, 1.0), (1, 0.9), (0.5, 0.9), (1e-3, 2.0)])
def test_distillation_is_trls(beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    logits, labels, others = problem(5, 33)
    z = logits.clone().requires_grad_()
    expected = GKDTrainer.generalized_jsd_loss(
        z[None], others["teacher_logits"][None], labels[None], beta=beta, temperature=temperature, reduction="sum"
    )
    value, gradient = value_and_gradient(logits, labels, "kd", **others, beta=beta, temperature=temperature)
    torch.testing.assert_close(value.sum(), expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


@pytest.mark.slow  # importing transformers' Trainer
def test_label_smoothing_is_transformers():
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels, _ = problem(5, 33)
    expected = LabelSmoother(0.1)({"logits": logits[None]}, labels[None])
    value = token_loss(logits, labels, "label_smoothing", epsilon=0.1).sum() / (labels != -100).sum()
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6, check_dtype=False)  # it sums in float32


# ------------------------------------------------------------------------------------------------- equivalences


def test_minus_p_has_the_gradient_of_dft():
    logits, labels, _ = problem(5, 33)
    dft, minus_p = (value_and_gradient(logits, labels, loss) for loss in ("dft", "minus_p"))
    torch.testing.assert_close(dft[1], minus_p[1], atol=1e-15, rtol=1e-14)
    assert not torch.allclose(dft[0], minus_p[0])


@pytest.mark.parametrize("beta", [0.3, 0.7, 2.0])
def test_linear_gem_has_the_gradient_of_ce_at_a_temperature(beta):
    logits, labels, _ = problem(5, 33)
    z = logits.clone().requires_grad_()
    expected = torch.autograd.grad((beta * token_loss(z / beta, labels, "ce")).sum(), z)[0]
    torch.testing.assert_close(value_and_gradient(logits, labels, "gem", beta=beta)[1], expected)


@pytest.mark.parametrize("side", ["top", "bottom"])
def test_a_threshold_keeps_what_is_equal_to_it_and_nothing_beyond(side):
    logits, labels = torch.tensor([[0.0, 0.0], [0.2, 0.0], [-0.2, 0.0]], dtype=F64), torch.tensor([0, 0, 0])
    kept = token_loss(logits, labels, "threshold", at=0.5, side=side, base="logp") != 0
    assert kept.tolist() == [True, side == "top", side == "bottom"]


def test_gem_is_negative_where_the_label_is_likely():
    logits, labels = torch.tensor([[2.0, 0.0, 0.0]], dtype=F64), torch.tensor([0])
    assert token_loss(logits, labels, "gem") < 0


def test_unclamped_emo_has_the_value_of_ce_and_mode_2_that_of_twice_the_distance():
    logits, labels, others = problem(5, 33)
    ce = token_loss(logits, labels, "ce")
    torch.testing.assert_close(token_loss(logits, labels, "emo", **others, clamp=None), ce)
    e = F.normalize(others["embeddings"], dim=-1)
    d = (1 - (e[labels.clamp(min=0)] * (logits.softmax(-1) @ e)).sum(-1)) * (labels != -100)
    torch.testing.assert_close(token_loss(logits, labels, "emo", **others, mode=2), 2 * d)
    clamped = token_loss(logits, labels, "emo", **others, clamp=0.5)
    torch.testing.assert_close(clamped, (ce + 0.5 * d) / 2)


@pytest.mark.parametrize(
    ("loss", "settings"), [("eaft", {"alpha": 0}), ("focal", {"gamma": 0}), ("power", {"alpha": 0})]
)
def test_an_exponent_of_zero_is_ce(loss, settings):
    logits, labels, _ = problem(5, 33)
    for got, expected in zip(
        value_and_gradient(logits, labels, loss, **settings), value_and_gradient(logits, labels, "ce"), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_a_teacher_that_is_certain_is_a_label():
    logits, labels, others = problem(5, 33)
    certain = torch.full_like(logits, -torch.inf).scatter(1, labels.clamp(min=0)[:, None], 0.0)
    others["teacher_logits"] = certain
    for soft, hard in [("soft_ce", "ce"), ("kd", "ce"), ("soft_mce", "mce")]:
        for got, expected in zip(
            value_and_gradient(logits, labels, soft, **others),
            value_and_gradient(logits, labels, hard, **others),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("loss", ["kd", "soft_mce"])
def test_more_top_k_than_tokens_are_all_tokens(loss):
    logits, labels, others = problem(5, 33)
    torch.testing.assert_close(
        token_loss(logits, labels, loss, **others, top_k=50), token_loss(logits, labels, loss, **others)
    )


def test_a_small_beta_is_no_forward_divergence():
    logits, labels, others = problem(5, 33)
    forward, nearly = (token_loss(logits, labels, "kd", **others, beta=beta).sum() for beta in (0, 1e-3))
    assert nearly < 0.01 * forward


def test_the_raw_probabilities_of_a_few_tokens_can_be_negative():
    """The student has as much as the teacher on the token kept: sum of t log(t / q) over it alone is below 0."""
    logits, teacher = torch.tensor([[2.0, 0.0, 0.0]], dtype=F64), torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
    raw, scaled = (
        token_loss(logits, torch.tensor([0]), "kd", teacher_logits=teacher, top_k=1, renormalise=renormalise)
        for renormalise in (False, True)
    )
    assert raw < 0 < scaled


# ---------------------------------------------------------------------------------------- MCE with a soft target


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 8), st.floats(0.1, 6.0))
def test_soft_mce_lies_between_its_bounds(seed, v, d, scale):
    """-log tr(P Q) <= MCE <= soft CE, and 0 <= MKL = MCE - ME(P) <= KL(t || q)."""
    g = torch.Generator().manual_seed(seed)
    logits, teacher = (scale * torch.randn(3, v, dtype=F64, generator=g) for _ in range(2))
    embeddings, labels = torch.randn(v, d, dtype=F64, generator=g), torch.zeros(3, dtype=torch.long)
    e, t, q = F.normalize(embeddings, dim=-1), teacher.softmax(-1), logits.softmax(-1)
    p_matrix, q_matrix = (e.T @ (each.unsqueeze(-1) * e) for each in (t, q))

    given_ = {"embeddings": embeddings, "teacher_logits": teacher}
    mce, soft_ce, kl = (token_loss(logits, labels, loss, **given_) for loss in ("soft_mce", "soft_ce", "kd"))
    lower = -(p_matrix * q_matrix).sum((-2, -1)).log()
    mkl = mce - (matrix_entropy(p_matrix) - 1)  # tr P = 1
    assert (lower <= mce + 1e-8).all()
    assert (mce <= soft_ce + 1e-8).all()
    assert (mkl >= -1e-8).all()
    assert (mkl <= kl + 1e-8).all()
