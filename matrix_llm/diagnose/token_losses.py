"""Every token loss against CE: its mean value, its gradient's cosine and norm, and where that gradient goes.

    choose_losses    which losses are shown for a recipe, and why others are left out
    compare_losses   measures them on the positions of a diagnosis

Each loss takes one more pass over the positions: the dense reference (`losses.token_loss`) in float64, by autograd. The
means are those of a run: over all positions, but for NTL, whose mean is over the positions whose label is a number.

Legend: N positions, V vocabulary, H hidden width, D embedding width, M number tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from matrix_llm.base.errors import ModelError
from matrix_llm.config import MatrixConfig
from matrix_llm.diagnose.gradients import LMHead, Overlap, Terms, TokenLoss, agreement, evaluate, overlap
from matrix_llm.loss.choice import (
    LOSSES,
    NEEDS_EMBEDDINGS,
    NEEDS_NUMBERS,
    NEEDS_TEACHER,
    NTL_WEIGHT,
    check_settings,
)
from matrix_llm.loss.token_terms import number_share
from matrix_llm.losses import number_tokens, token_loss


@dataclass(frozen=True)
class Candidate:
    """A token loss, and how much MCE is added to it."""

    loss: str
    """A key of `loss.choice.LOSSES`, or "mce"."""

    given: dict[str, Any] = field(default_factory=dict)
    """Its settings as they are given; the others have their defaults."""

    mce_weight: float = 0.0
    """Weight of MCE on top of it."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings.

        Raises:
            RecipeError: an unknown loss or setting, or a value that is not allowed.
        """
        return {} if self.loss == "mce" else check_settings(self.loss, self.given)

    @property
    def name(self) -> str:
        """How it is shown, with the settings that are not the defaults.

        >>> Candidate("gem", {"beta": 0.7, "h": "logsigmoid"}, mce_weight=0.5).name
        'gem(h=logsigmoid)+0.5MCE'
        """
        known = LOSSES.get(self.loss, {})
        values = {key: self.settings[key] for key in self.given if self.settings[key] != known[key].default}
        other = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]
        name = "CE" if self.loss == "ce" and self.mce_weight else self.loss
        name += f"({', '.join(other)})" if other else ""
        weight = "" if self.mce_weight == 1 else f"{self.mce_weight:g}"
        return f"{name}+{weight}MCE" if self.mce_weight else name


CE = Candidate("ce")
SHOWN = [
    Candidate("dft"),
    Candidate("minus_p"),
    Candidate("power", {"alpha": 8}),
    Candidate("focal"),
    Candidate("eaft"),
    Candidate("label_smoothing"),
    Candidate("z_loss"),
    Candidate("gem"),
    Candidate("gem", {"h": "logsigmoid"}),
    Candidate("ntl", {"weight": NTL_WEIGHT}),
    Candidate("emo"),
    Candidate("emo", {"mode": 2}),
]
"""The losses that are always shown, after CE and before MCE and CE + MCE."""


@dataclass(frozen=True)
class Choice:
    """The losses of one diagnosis."""

    candidates: list[Candidate]
    """SHOWN as far as they can be measured, and the recipe's token loss if it is none of them nor CE."""

    own: Candidate
    """What a run with these settings trains, MCE included."""

    left_out: dict[str, str]
    """Name of a loss -> why it is not shown."""

    numbers: tuple[Tensor, Tensor] | None
    """(M,) ids and (M,) values of the number tokens, for NTL; None: there are none."""


def choose_losses(training: MatrixConfig, labels: Tensor, tokenizer: Any) -> Choice:
    """The losses to show for a recipe on these labels.

    Args:
        labels: (N,) token ids.
    """
    # 1. those that are always shown, and the recipe's own
    loss, given = training.token_loss, dict(training.token_loss_settings or {})
    if loss == "ntl":
        given = {"weight": NTL_WEIGHT, **given}  # the recipe's default
    own = Candidate(loss, given, float(training.mce_weight))
    candidates = list(SHOWN)
    if not any(_same_loss(own, each) for each in (CE, *SHOWN)):
        candidates.append(Candidate(own.loss, own.given))

    # 2. those that cannot be measured here
    left_out = dict.fromkeys(NEEDS_TEACHER, "no teacher is loaded here")
    if own.loss != "threshold":
        left_out["threshold"] = 'its "at" has no default; it is shown where a recipe sets it'
    numbers = None
    try:
        ids, values = number_tokens(tokenizer)
    except ModelError:
        left_out |= dict.fromkeys(NEEDS_NUMBERS, "the tokenizer does not have a token for each of the ten digits")
    else:
        numbers = ids.to(labels.device), values.to(labels.device)
        if not number_share(labels, numbers[0]):
            left_out |= dict.fromkeys(NEEDS_NUMBERS, "none of the labels is a token of one digit")
    return Choice([each for each in candidates if each.loss not in left_out], own, left_out, numbers)


def _same_loss(a: Candidate, b: Candidate) -> bool:
    """Whether two candidates are the same but for MCE."""
    return a.loss == b.loss and a.settings == b.settings


@dataclass(frozen=True)
class Measured:
    """CE and MCE at N positions: what the token losses are compared with, and added to."""

    hidden: Tensor
    """(N, H)."""
    labels: Tensor
    """(N,)."""
    head: LMHead
    """The model's."""
    vectors: Tensor
    """(V, D) of any norm: EMO's token vectors. MCE's may be the same minus their mean."""
    ce: Terms
    """CE."""
    mce: Terms
    """MCE, by the solver in use."""
    products: tuple[Overlap, Overlap, Overlap]
    """CE with CE, CE with MCE, MCE with MCE."""


def make_loss(candidate: Candidate, choice: Choice, measured: Measured) -> TokenLoss:
    """The loss of each position in float64, scaled so that the mean over all N is the one that is trained."""
    settings, scale = dict(candidate.settings), 1.0
    if candidate.loss in NEEDS_EMBEDDINGS:
        settings["embeddings"] = measured.vectors
    if candidate.loss in NEEDS_NUMBERS:
        assert choice.numbers is not None
        settings["number_ids"], settings["number_values"] = choice.numbers
        share = number_share(measured.labels, choice.numbers[0])
        if settings["weight"] is None:
            scale = share
        else:  # CE + weight NTL: only NTL has a mean of its own
            settings["weight"] *= share
    return lambda logits, labels: scale * token_loss(logits.double(), labels, candidate.loss, **settings)


def compare_losses(
    choice: Choice, measured: Measured, weight: float, groups: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """Every token loss against CE, over groups of positions.

    Args:
        weight: w of the CE + w MCE that is shown.
        groups: places of positions by kind of group and name of group, (n,) each.

    Returns:
        "losses": for each `name`, `loss`, all `settings`, `mce_weight`, `value` (the mean) and `gradients` by kind and
        name of group, CE first; "own": the name of what a run trains; "left_out": {name: why}.
    """
    ce, mce = measured.ce, measured.mce
    ce_ce, ce_mce, mce_mce = measured.products
    left_out, found, added = dict(choice.left_out), [], []
    found.append(_describe(CE, ce.value, (ce_ce, ce_ce, ce_ce), groups))
    for candidate in choice.candidates:
        terms = evaluate(make_loss(candidate, choice, measured), measured.hidden, measured.labels, measured.head)
        if not (torch.isfinite(terms.value).all() and torch.isfinite(terms.hidden).all()):
            left_out[candidate.name] = "its value or its gradient overflows at one of the positions"
            continue
        with_ce, square = overlap(ce, terms, measured.hidden), overlap(terms, terms, measured.hidden)
        found.append(_describe(candidate, terms.value, (ce_ce, with_ce, square), groups))
        w = choice.own.mce_weight
        if w > 0 and _same_loss(candidate, choice.own):
            square = square.plus(overlap(terms, mce, measured.hidden), 2 * w).plus(mce_mce, w * w)
            products = ce_ce, with_ce.plus(ce_mce, w), square
            added.append(_describe(choice.own, terms.value + w * mce.value, products, groups))
    found.append(_describe(Candidate("mce"), mce.value, measured.products, groups))
    products = ce_ce, ce_ce.plus(ce_mce, weight), ce_ce.plus(ce_mce, 2 * weight).plus(mce_mce, weight * weight)
    found.append(_describe(Candidate("ce", mce_weight=weight), ce.value + weight * mce.value, products, groups))
    return {"losses": found + added, "own": choice.own.name, "left_out": left_out}


def _describe(
    candidate: Candidate,
    value: Tensor,  # (N,)
    products: tuple[Overlap, Overlap, Overlap],  # CE with CE, CE with the loss, the loss with itself
    groups: dict[str, dict[str, Tensor]],
) -> dict[str, Any]:
    norms = products[2].hidden.clamp(min=0).sqrt()  # (N,) |g_n|, g_n the loss's gradient in the hidden state
    whole = norms.sum().item()

    def of_group(at: Tensor) -> dict[str, Any]:
        in_hidden, in_head = zip(*(each.of(at) for each in products), strict=True)
        share = norms[at.to(norms.device)].sum().item() / whole if whole else None
        return {
            "hidden": asdict(agreement(*in_hidden)),
            "head": asdict(agreement(*in_head)),
            "share_of_gradient": share,  # sum |g_n| of the group / sum |g_n|
        }

    return {
        "name": candidate.name,
        "loss": candidate.loss,
        "settings": candidate.settings,
        "mce_weight": candidate.mce_weight,
        "value": value.mean().item(),
        "gradients": {
            kind: {name: of_group(at) for name, at in group.items() if len(at)} for kind, group in groups.items()
        },
    }
