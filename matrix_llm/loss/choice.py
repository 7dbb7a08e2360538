"""Which token losses there are, the settings of each, and what each needs besides logits and labels.

One table for the dense reference, the fused head and the recipe's `token_loss` and `token_loss_settings`:

    LOSSES           loss name -> setting name -> Setting
    check_settings   what the user gave -> every setting of that loss, defaults filled in

No tensors here. docs/losses.md says what each loss does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Any

import numpy as np

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import check_choice, check_value, nearest, setting

REQUIRED = object()
"""The default of a setting that has none: it must be given."""

NEEDS_TEACHER = ("asft", "kd", "soft_ce", "soft_mce")
"""Losses that read the logits of a second model."""

HAS_FLOOR = ("soft_ce", "soft_mce")
"""Losses whose smallest value is not 0 but the teacher's own (matrix) entropy."""

NEEDS_EMBEDDINGS = ("emo", "soft_mce")
"""Losses that read the token vectors."""

NEEDS_NUMBERS = ("ntl",)
"""Losses that read which tokens are numbers, and their values."""


@dataclass(frozen=True)
class Setting:
    """One setting of a loss: its type, its default and what it may be."""

    kind: Any
    """The type, as an annotation: `float`, `int | None`."""

    field: Field
    """The default, with the range or the choices, as `setting` of base/values.py makes it."""

    description: str
    """One sentence for people."""

    @property
    def default(self) -> Any:
        """The value if the user gives none; REQUIRED: the user must give one."""
        return self.field.default


LOSSES: dict[str, dict[str, Setting]] = {
    "ce": {},
    "dft": {},
    "minus_p": {},
    "power": {
        "alpha": Setting(
            float,
            setting(REQUIRED, at_least=-1, note="below 0 the gradient grows without bound as p falls"),
            "Exponent of (1 - p^alpha) / alpha: 0 is CE, 1 is 1 - p; the larger, the less unlikely labels count.",
        ),
    },
    "threshold": {
        "base": Setting(
            str,
            setting("p", choices=("p", "logp")),
            'The loss of a position that is kept: "p", 1 - p, or "logp", -log p.',
        ),
        "side": Setting(
            str,
            setting("top", choices=("top", "bottom")),
            'Positions that are kept: "top", p >= at, or "bottom", p <= at.',
        ),
        "at": Setting(float, setting(REQUIRED, at_least=0, at_most=1), "The probability that p is compared with."),
    },
    "focal": {
        "gamma": Setting(float, setting(2.0, at_least=0), "Exponent of the factor (1 - p)^gamma; 0 is CE."),
    },
    "eaft": {
        "alpha": Setting(float, setting(1.0, at_least=0), "Exponent of the weight (H_k / scale)^alpha; 0 is CE."),
        "k": Setting(int, setting(20, at_least=2), "Likeliest tokens whose entropy is H_k; all if there are fewer."),
        "scale": Setting(
            float, setting(3.0, above=0), "What H_k is divided by: 3, about ln 20, or 1 to leave it as it is."
        ),
    },
    "asft": {
        "weight": Setting(float, setting(0.1, at_least=0), "Weight of the KL term, which is added to DFT."),
        "direction": Setting(
            str,
            setting("ref_model", choices=("ref_model", "model_ref")),
            'The KL term: "ref_model", KL(reference || model), or "model_ref", KL(model || reference).',
        ),
    },
    "label_smoothing": {
        "epsilon": Setting(
            float, setting(0.1, at_least=0, below=1), "Share of the target that is spread over the whole vocabulary."
        ),
    },
    "z_loss": {
        "weight": Setting(float, setting(1e-4, at_least=0), "Weight of logsumexp(z)^2, which is added to CE."),
    },
    "gem": {
        "beta": Setting(
            float, setting(0.7, above=0), "Temperature of the distribution that the label is compared with."
        ),
        "h": Setting(
            str,
            setting("linear", choices=("linear", "logsigmoid")),
            'Weight of token j: "linear", 1, or "logsigmoid", sigmoid(0.01 (z_j - z_y)).',
        ),
    },
    "ntl": {
        "kind": Setting(
            str,
            setting("was", choices=("was", "mse")),
            '"was": the expected |difference| from the label\'s value; "mse": the squared error of the expected value.',
        ),
        "reweigh": Setting(
            bool, setting(False), "Whether probability outside the numbers is charged 1.01 times the largest distance."
        ),
        "squash": Setting(
            float | None,
            setting(None, above=1),
            'Ratio of the largest to the smallest distance, for "was"; null: the distances as they are.',
        ),
        "weight": Setting(
            float | None, setting(None, at_least=0), "Trains CE + weight NTL, 0.3 in the paper; null: NTL alone."
        ),
    },
    "emo": {
        "mode": Setting(
            int,
            setting(1, at_least=1, at_most=2),
            "1: (CE + [CE / d] d) / 2; 2: [d / CE] CE + d; no gradient passes through the brackets.",
        ),
        "clamp": Setting(
            float | None, setting(3.0, above=0), "Largest ratio CE / d, in mode 1 only; null: without bound."
        ),
        "with_target": Setting(
            bool,
            setting(True),
            "Whether the value of d = 1 - sum_j q_j cos(e_j, e_y) counts j = y; its gradient always does.",
        ),
    },
    "kd": {
        "beta": Setting(
            float,
            setting(0.0, at_least=0, at_most=1),
            "0: KL(teacher || model); 1: KL(model || teacher); between: the generalised Jensen-Shannon divergence.",
        ),
        "temperature": Setting(float, setting(1.0, above=0), "What the logits of both models are divided by."),
        "top_k": Setting(
            int | None, setting(None, at_least=1), "The teacher's likeliest tokens that are compared; null: all."
        ),
        "renormalise": Setting(
            bool, setting(True), "Whether the probabilities of the teacher's top_k tokens are scaled to sum to 1."
        ),
    },
    "soft_ce": {},
    "soft_mce": {
        "top_k": Setting(
            int | None,
            setting(None, at_least=1),
            "The teacher's likeliest tokens that make the target, scaled to sum to 1; null: all.",
        ),
    },
}


def check_settings(name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every setting of the loss `name`: those given, converted and checked, and the defaults of the others.

    Args:
        name: a key of LOSSES.
        given: setting name -> value; None: every default.

    Raises:
        RecipeError: an unknown loss or setting, a value that is not allowed, a setting without default that is not
            given, or settings that do not go together.

    >>> check_settings("eaft", {"scale": 1})
    {'alpha': 1.0, 'k': 20, 'scale': 1}
    """
    # 1. The loss and the names of its settings
    check_choice("token_loss", name, list(LOSSES))
    known, given = LOSSES[name], dict(given or {})
    for key in given:
        if key not in known:
            has = f"has {', '.join(known)}" if known else "has no settings"
            raise RecipeError(f"{name} has no setting {key!r}: it {has}.{nearest(key, known)} Remove {key}.")

    # 2. The values
    settings = {}
    for key, each in known.items():
        value = given.get(key, each.default)
        if value is REQUIRED:
            raise RecipeError(f"{name} needs {key}, which has no default: {each.description} Give {key}.")
        value = value.item() if isinstance(value, np.generic) else value
        settings[key] = check_value(f"{name}'s {key}", value, each.field, each.kind)

    # 3. What does not go together
    if name == "emo" and settings["mode"] == 2:
        if given.get("clamp") is not None:
            raise RecipeError(
                f"emo's clamp={settings['clamp']} bounds the ratio CE / d of mode 1, which mode=2 does not have. "
                "Remove clamp, or use mode 1."
            )
        settings["clamp"] = None
    if name == "kd" and settings["beta"] == 1 and settings["top_k"] is not None:
        raise RecipeError(
            f"kd's top_k={settings['top_k']} leaves the teacher's other tokens without probability, so that beta=1, "
            "KL(model || teacher), is infinite. Remove top_k, or use a beta below 1."
        )
    if name == "ntl" and settings["kind"] == "mse" and settings["squash"] is not None:
        raise RecipeError(
            f"ntl's squash={settings['squash']} changes the distances of kind 'was', which kind='mse' does not have. "
            "Remove squash, or use kind 'was'."
        )
    return settings


NTL_WEIGHT = 0.3  # its authors train CE + 0.3 NTL; NTL alone says nothing of tokens that are no numbers


def recipe_settings(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """`check_settings` of a recipe's token_loss_settings, where ntl is added to CE by default.

    Raises:
        RecipeError: as `check_settings`.

    >>> recipe_settings("ntl", None)["weight"]
    0.3
    """
    return check_settings(name, {"weight": NTL_WEIGHT, **(given or {})} if name == "ntl" else given)
