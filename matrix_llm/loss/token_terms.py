"""The token losses as functions of one chunk's statistics: value, and gradient in the logits in one common form.

With q = softmax(z), p = q_y and CE = -log p, the gradient of every loss at one position is

    d value / d z_j = A q_j - B [j = y] + factor * extra_j + (a few columns)

    ce, dft, minus_p, power, threshold, focal, eaft      A = B: a gate of the position times CE's gradient
    z_loss                                               A, B
    label_smoothing                                      A, B, and the same number at every token
    ntl                                                  the number tokens' columns (and A, reweighed)
    gem, emo                                             a (C, V) extra
    kd, soft_ce, asft, soft_mce                          a (C, V) extra: teachers.py

No loss touches the LM head: fused.py turns these terms into gradients, adds MCE's, and goes back through soft-cap and
scale. docs/losses.md says what each loss is for; reference.py computes the same on whole logits, by autograd.

Legend: C positions of one chunk, V vocabulary, D embedding width, K tokens of a few columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrix_llm.loss.products import multiply

EPSILON = 1e-10  # of EMO's ratios, as released


class Chunk(NamedTuple):
    """What a loss may read of one chunk of positions. Statistics are float32, or float64 for float64 hidden states."""

    z: Tensor  # (C, V) logits, after scale and soft-cap
    q: Tensor | None  # (C, V) probabilities; None where the GPU's kernels need none, for losses without an extra
    log_z: Tensor  # (C,) log sum_j exp z_j
    of_label: Tensor  # (C,) z_y
    labels: Tensor  # (C,)
    top: Tensor | None  # (C, k) the largest logits in falling order, for a loss that has `top`
    at: slice  # the positions of this chunk, for what belongs to the whole pass: a teacher's hidden states
    product: Tensor | None = None  # (C, V) of the loss's own product, which it may overwrite: `table.loss_terms`

    @property
    def ce(self) -> Tensor:
        """(C,) cross-entropy in nats."""
        return self.log_z - self.of_label

    @property
    def p(self) -> Tensor:
        """(C,) the label's probability."""
        return (self.of_label - self.log_z).exp()

    def positions(self, block: slice, index: Tensor | None) -> Chunk:
        """Some of the chunk's positions; with `index` (C,), row index_c of `product` is position c's."""
        first = self.at.start
        rows = block if index is None else index[block]
        return Chunk(
            self.z[block],
            None if self.q is None else self.q[block],
            self.log_z[block],
            self.of_label[block],
            self.labels[block],
            None if self.top is None else self.top[block],
            slice(first + block.start, first + block.stop),
            None if self.product is None else self.product[rows],
        )


class LossTerms(NamedTuple):
    """Value and gradient in the logits of one chunk, in the module's common form."""

    value: Tensor  # (C,)
    of_q: Tensor | None  # (C,) A; None: 1
    at_label: Tensor | None  # (C,) B; None: 1
    extra: Tensor | None = None  # (C, V), or (V,) or (C, 1): broadcast; may be overwritten
    factor: Tensor | float = 1.0  # (C, 1) or a number, of `extra`
    columns: tuple[Tensor, Tensor] | None = None  # ids (C, K) and what is added there (C, K)
    objective: Tensor | None = None  # (C,) what is trained where it is not the value; None: the value
    floor: Tensor | None = None  # (C,) the part of the value that no student can lower: the teacher's own entropy
    target: tuple[Tensor, Tensor] | None = None  # of MCE: ids (C, k) and probabilities (C, k); None: the label


@dataclass(frozen=True)
class TokenLoss:
    """One loss with its settings, and what it reads besides logits and labels.

    >>> TokenLoss("ce").needs_extra
    False
    """

    name: str
    """A key of `choice.LOSSES`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Every setting of the loss: `choice.check_settings`."""

    allowed: Tensor | None = None
    """(V,) bool: tokens that a bias of -inf does not remove. None: all."""

    number_ids: Tensor | None = None
    """(K,) tokens that are numbers. ntl only."""

    number_values: Tensor | None = None
    """(K,) their values. ntl only."""

    own_scale: float = 1.0
    """Factor on a term with a mean of its own: trained positions / those that count. ntl counts labels that are
    numbers, threshold positions that it keeps."""

    vectors: Tensor | None = None
    """(V, D) of any norm, in the products' dtype. emo only."""

    inverse_norm: Tensor | None = None
    """(V,) 1 / |vector|, 0 for a zero vector. emo only."""

    teacher: Any = None
    """A `teachers.Teacher`, `teachers.TopTokens` or logits (n, V), of the trained positions. NEEDS_TEACHER only."""

    soft_matrix: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None
    """q (C, V), ids (C, k) and probabilities (C, k) of the target -> value, gradient in the logits. For soft_mce and
    target_tokens."""

    target_entropy: Callable[[Tensor, Tensor], Tensor] | None = None
    """ids (C, k) and probabilities (C, k) of the target -> its matrix entropy. soft_mce only."""

    target_tokens: int = 0
    """The teacher's likeliest tokens that are MCE's target; 0: the label is."""

    @property
    def top(self) -> int:
        """How many of the largest logits the loss reads."""
        return self.settings["k"] if self.name == "eaft" else 0

    @property
    def needs_extra(self) -> bool:
        """Whether the gradient is more than A q - B at the label."""
        return self.name not in GATES


# ------------------------------------------------------------------------------------------ A q - B at the label alone


def _ce(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    return LossTerms(chunk.ce, None, None)


def _dft(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    p = chunk.p
    return LossTerms(p * chunk.ce, p, p)


def _minus_p(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    p = chunk.p
    return LossTerms(-torch.expm1(-chunk.ce), p, p)  # 1 - p, without cancellation


def _power(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    alpha, ce = loss.settings["alpha"], chunk.ce
    if alpha == 0:
        return LossTerms(ce, None, None)
    gate = (-alpha * ce).exp()  # p^alpha
    return LossTerms(-torch.expm1(-alpha * ce) / alpha, gate, gate)


def keeps(ce: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Whether the thresholded loss keeps each position: p on the chosen side of `at`, or equal to it. bool."""
    p = (-ce).exp()
    return p >= settings["at"] if settings["side"] == "top" else p <= settings["at"]


def _threshold(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    ce, p = chunk.ce, chunk.p
    kept = keeps(ce, loss.settings)
    value, gate = (ce, torch.ones_like(p)) if loss.settings["base"] == "logp" else (-torch.expm1(-ce), p)
    gate = torch.where(kept, gate, 0.0) * loss.own_scale
    value = torch.where(kept, value, 0.0)
    return LossTerms(value, gate, gate, objective=value * loss.own_scale)


def _focal(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    gamma, ce = loss.settings["gamma"], chunk.ce
    rest = -torch.expm1(-ce)  # 1 - p
    ratio = torch.where(rest > 0, ce / torch.where(rest > 0, rest, 1.0), 1.0)  # -log p / (1 - p), 1 at p = 1
    modulation = rest**gamma
    gate = modulation * (1 + gamma * chunk.p * ratio)
    return LossTerms(modulation * ce, gate, gate)


def _eaft(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    assert chunk.top is not None
    log_r = torch.log_softmax(chunk.top, -1)
    entropy = -torch.special.xlogy(log_r.exp(), log_r.exp()).sum(-1)  # 0 log 0 = 0: a removed token
    gate = (entropy.clamp(min=0) / loss.settings["scale"]) ** loss.settings["alpha"]
    return LossTerms(gate * chunk.ce, gate, gate)


def _z_loss(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    weight, log_z = loss.settings["weight"], chunk.log_z
    return LossTerms(chunk.ce + weight * log_z**2, 1 + 2 * weight * log_z, None)


GATES: dict[str, Callable[[Chunk, TokenLoss], LossTerms]] = {
    "ce": _ce,
    "dft": _dft,
    "minus_p": _minus_p,
    "power": _power,
    "threshold": _threshold,
    "focal": _focal,
    "eaft": _eaft,
    "z_loss": _z_loss,
}

# ------------------------------------------------------------------------------------------------- more than that


def _label_smoothing(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """(1 - epsilon) CE + epsilon (log sum exp z - mean z); tokens removed by a bias of -inf are no part of the mean."""
    epsilon, allowed, z = loss.settings["epsilon"], loss.allowed, chunk.z
    if allowed is None:
        mean, extra = z.mean(-1), z.new_full((1, 1), 1 / z.shape[1])
    else:
        extra = allowed.to(z.dtype) / allowed.sum()  # (V,)
        mean = torch.where(allowed, z, 0.0) @ extra
    value = (1 - epsilon) * chunk.ce + epsilon * (chunk.log_z - mean)
    return LossTerms(value, None, torch.full_like(value, 1 - epsilon), extra, -epsilon)


def _gem(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """sum_j r_j w_j (z_j - z_y): constants r = softmax(z / beta), and w = 1 or sigmoid((z_j - z_y) / 100)."""
    r = torch.softmax(chunk.z / loss.settings["beta"], dim=-1)
    difference = chunk.z - chunk.of_label[:, None]
    if loss.settings["h"] == "logsigmoid":
        r *= torch.sigmoid(0.01 * difference)
        total = r.sum(-1)
    else:
        total = torch.ones_like(chunk.of_label)
    # Sum r (z - z_y), not sum r z - z_y: the two would cancel where the label is likely. r is 0 where z is -inf.
    value = torch.where(r > 0, difference, 0.0).mul_(r).sum(-1)
    return LossTerms(value, torch.zeros_like(value), total, r)


def _distances(loss: TokenLoss, values: Tensor, of_label: Tensor) -> Tensor:
    """(C, K) |v_j - v_y|, or with `squash` = f those distances mapped to [1, f], and 0 for the label itself."""
    distance = (values - of_label[:, None]).abs()
    squash = loss.settings["squash"]
    if squash is None:
        return distance
    between = (values[:, None] - values).abs()
    others = between[between > 0]
    least, most = others.min(), others.max()
    mapped = 1 + (distance - least) * (squash - 1) / (most - least)
    return torch.where(distance > 0, mapped, 0.0)


def _ntl(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """The number token loss, 0 where the label is no number; with `weight` it is added to CE."""
    ids, values, settings = loss.number_ids, loss.number_values, loss.settings
    assert ids is not None
    assert values is not None

    # 1. the distribution over the number tokens alone
    at = (chunk.labels[:, None] == ids).to(chunk.z.dtype)  # (C, K)
    is_number = at.sum(-1)  # 1 or 0
    values = values.to(chunk.z.dtype)
    z = chunk.z[:, ids]
    s = torch.softmax(z, -1)
    of_label = (at * values).sum(-1)

    # 2. value and gradient in its logits
    if settings["kind"] == "was":
        distance = _distances(loss, values, of_label)
        most = _distances(loss, values, values).max()
        value = (s * distance).sum(-1)
        gradient = s * (distance - value[:, None])
    else:
        expected = (s * values).sum(-1)
        error = expected - of_label
        most = (values.max() - values.min()) ** 2
        value = error**2
        gradient = 2 * error[:, None] * s * (values - expected[:, None])

    # 3. reweighed: probability outside the numbers is charged 1.01 times the largest distance
    of_q = torch.zeros_like(value)
    if settings["reweigh"]:
        mass = (z - chunk.log_z[:, None]).exp().sum(-1)
        excess = value - 1.01 * most
        gradient = mass[:, None] * gradient + (excess * mass)[:, None] * s
        of_q = -excess * mass * is_number
        value = 1.01 * most + mass * excess
    value, gradient = value * is_number, gradient * is_number[:, None]

    # 4. alone, or on top of CE
    scale, weight = loss.own_scale, settings.get("weight")
    columns = ids.expand(len(value), -1)
    if weight is None:
        return LossTerms(value, of_q * scale, of_q * 0, None, 1.0, (columns, gradient * scale), value * scale)
    scaled = weight * scale
    ce = chunk.ce
    return LossTerms(
        ce + weight * value, 1 + scaled * of_q, None, None, 1.0, (columns, scaled * gradient), ce + scaled * value
    )


def similarities(
    labels: Tensor,  # (C,)
    loss: TokenLoss,
    out: Tensor,  # (C, V)
) -> tuple[Tensor, Tensor | None]:
    """e_y . e_j of the labels' vectors as they are given, and the row of each position; None: its own.

    Labels repeat, so each is multiplied once; not on a GPU, where `unique` would make the host wait.
    """
    assert loss.vectors is not None
    index = None
    if not labels.is_cuda:
        labels, index = labels.unique(return_inverse=True)
    out = out[: len(labels)]
    multiply(loss.vectors[labels], loss.vectors.T, out=out)
    return out, index


def _emo(chunk: Chunk, loss: TokenLoss) -> LossTerms:
    """CE and d = sum_j q_j (1 - cos(e_j, e_y)), each weighted by a constant ratio of the two."""
    inverse_norm, q, labels, settings = loss.inverse_norm, chunk.q, chunk.labels, loss.settings
    assert chunk.product is not None
    assert inverse_norm is not None
    assert q is not None

    # 1. s_j = 1 - cos(e_j, e_y), exactly 0 at the label: 1 - sum q cos would lose all digits where the label is likely
    of_label = inverse_norm[labels, None]
    s = chunk.product.mul_(inverse_norm).mul_(-of_label).add_(1)
    s.clamp_(min=0)  # a cosine of 1 + 1e-7 would make d negative, and the ratio below it a huge negative number
    s.scatter_(1, labels[:, None], torch.where(of_label != 0, 0.0, 1.0).to(s.dtype))

    # 2. d, and the two weights
    d = (q * s).sum(-1)
    counted = d if settings["with_target"] else d + chunk.p
    ce = chunk.ce
    if settings["mode"] == 1:
        ratio = ce / (counted + EPSILON)
        if settings["clamp"] is not None:
            ratio = ratio.clamp(max=settings["clamp"])
        of_ce, of_d = torch.full_like(ce, 0.5), 0.5 * ratio
    else:
        of_ce, of_d = counted / (ce + EPSILON), torch.ones_like(ce)

    # 3. d d / d z_j = q_j (s_j - d)
    return LossTerms(of_ce * ce + of_d * counted, of_ce, of_ce, s.sub_(d[:, None]).mul_(q), of_d[:, None])


WIDE: dict[str, Callable[[Chunk, TokenLoss], LossTerms]] = {
    "label_smoothing": _label_smoothing,
    "gem": _gem,
    "ntl": _ntl,
    "emo": _emo,
}


def number_share(labels: Tensor, number_ids: Tensor) -> float:
    """Trained positions / those whose label is a number: `TokenLoss.own_scale` for a mean over both. 0 without any."""
    numbers = int(torch.isin(labels, number_ids).sum())
    return len(labels) / numbers if numbers else 0.0


def is_finite_everywhere(bias: Tensor) -> bool:
    """Whether the bias removes no token."""
    return not math.isinf(float(bias.detach().min()))
