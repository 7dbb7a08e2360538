"""Token losses compared by their gradients: in the hidden states, and in the LM head's weight.

A token loss is any function (logits (C, V), labels (C,)) -> (C,) nats that autograd can differentiate. `evaluate` gives
its values and gradients at every position, `overlap` the inner products of two losses' gradients. All else follows from
inner products: with G the gradient in the logits (N, V), h the hidden states (N, H) and W the LM head,

    hidden states   <A, B> = sum_n (G^A_n W) . (G^B_n W)
    LM head         <A, B> = <sum_n G^A_n h_n^T, sum_m G^B_m h_m^T> = sum_nm (G^A_n . G^B_m) (h_n . h_m)

for any group of positions n, m, without a (V, H) matrix for each group. Inner products are float64.

Legend: N positions, C positions of one chunk, V vocabulary, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from matrix_llm.model.lm_head import lm_head_of, logit_transform

TokenLoss = Callable[[Tensor, Tensor], Tensor]
CHUNK_BYTES = 2**27  # of one (C, V) tensor in float64
COLUMNS = 8192  # tokens at a time in products in float64


@dataclass(frozen=True)
class LMHead:
    """What turns hidden states into logits: softcap * tanh(scale * (h W^T + bias) / softcap), or without the cap."""

    weight: Tensor
    """(V, H)."""
    bias: Tensor | None
    """(V,), or None."""
    scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """Bound on the logits; None: no bound."""

    @classmethod
    def of(cls, model: Any) -> LMHead:
        """The LM head of a model whose logits `model.lm_head.check_head` has verified."""
        head = lm_head_of(model)
        scale, softcap = logit_transform(model.config)
        bias = getattr(head, "bias", None)
        return cls(head.weight.detach(), None if bias is None else bias.detach(), scale, softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, V) from (C, H), as the model computes them."""
        z = F.linear(hidden, self.weight, self.bias) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def before_transform(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient in h W^T (C, V) from that in the logits (C, V), through cap and scale."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient * self.scale

    def chunk(self) -> int:
        """Positions at a time."""
        return max(1, CHUNK_BYTES // (8 * self.weight.shape[0]))


@dataclass(frozen=True)
class Terms:
    """A loss at N positions."""

    value: Tensor
    """(N,) nats, float64."""
    logits: Tensor
    """(N, V) float32: the gradient in h W^T of each position's own loss."""
    hidden: Tensor
    """(N, H) float64: the gradient in its hidden state."""

    def minus(self, other: Terms) -> Terms:
        """The difference of two losses."""
        return Terms(self.value - other.value, self.logits - other.logits, self.hidden - other.hidden)

    def at(self, places: Tensor) -> Terms:
        """The same at some of the positions."""
        return Terms(self.value[places], self.logits[places], self.hidden[places])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log q_y of each position, in float64."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def evaluate(loss: TokenLoss, hidden: Tensor, labels: Tensor, head: LMHead) -> Terms:
    """Values and gradients of a token loss, a chunk of positions at a time.

    Args:
        hidden: (N, H) in the dtype of the LM head.
        labels: (N,) token ids.
    """
    values, gradients = [], []
    for start in range(0, len(labels), head.chunk()):
        chunk = slice(start, start + head.chunk())
        with torch.no_grad():
            z = head.logits(hidden[chunk])
        with torch.enable_grad():
            z.requires_grad_(True)
            value = loss(z, labels[chunk])
            (gradient,) = torch.autograd.grad(value.sum(), z)
        values.append(value.detach().double())
        gradients.append(head.before_transform(gradient, z.detach()).float())
    g = torch.cat(gradients)
    return Terms(torch.cat(values), g, _times(g, head.weight))


@torch.no_grad()
def _times(g: Tensor, weight: Tensor) -> Tensor:
    """g W, (N, H) in float64, a block of tokens at a time."""
    total = torch.zeros(len(g), weight.shape[1], dtype=torch.float64, device=g.device)
    for start in range(0, g.shape[1], COLUMNS):
        block = slice(start, start + COLUMNS)
        total.addmm_(g[:, block].double(), weight[block].double())
    return total


@dataclass(frozen=True)
class Overlap:
    """Inner products of the gradients A and B of two losses at N positions."""

    hidden: Tensor
    """(N,) in the hidden state of each position."""
    head: Tensor
    """(N, N): (A_n . B_m) (h_n . h_m), whose sum over a group of n and m is that in the LM head's weight."""

    def of(self, group: Tensor) -> tuple[float, float]:
        """(in the hidden states, in the LM head) over the positions of a group."""
        group = group.to(self.hidden.device)
        return self.hidden[group].sum().item(), self.head[group][:, group].sum().item()

    def plus(self, other: Overlap, weight: float) -> Overlap:
        """This one + weight * the other: the inner products of sums of losses follow from those of the losses."""
        return Overlap(self.hidden + weight * other.hidden, self.head + weight * other.head)


@torch.no_grad()
def overlap(a: Terms, b: Terms, hidden: Tensor) -> Overlap:
    """The inner products of the gradients of `a` and `b`.

    Args:
        hidden: (N, H) the hidden states.
    """
    gram = torch.zeros(len(hidden), len(hidden), dtype=torch.float64, device=hidden.device)
    for start in range(0, a.logits.shape[1], COLUMNS):
        block = slice(start, start + COLUMNS)
        gram.addmm_(a.logits[:, block].double(), b.logits[:, block].double().T)
    h = hidden.double()
    return Overlap((a.hidden * b.hidden).sum(-1), gram * (h @ h.T))


@dataclass(frozen=True)
class Agreement:
    """The gradient of one loss against that of another, over a group of positions."""

    cosine: float | None
    """From -1 to 1; None where one of them is zero."""
    norm_ratio: float | None
    """|other| / |base|; None where the base is zero."""


def agreement(aa: float, ab: float, bb: float) -> Agreement:
    """From the inner products of A (the base) and B.

    >>> agreement(4.0, 2.0, 1.0)
    Agreement(cosine=1.0, norm_ratio=0.5)
    """
    aa, bb = max(aa, 0.0), max(bb, 0.0)
    if not aa:
        return Agreement(None, None)
    return Agreement(ab / math.sqrt(aa * bb) if bb else None, math.sqrt(bb / aa))


def sum_agreement(aa: float, ab: float, bb: float, weight: float) -> Agreement:
    """A + weight * B against A, from the inner products of A and B."""
    return agreement(aa, aa + weight * ab, aa + 2 * weight * ab + weight * weight * bb)
