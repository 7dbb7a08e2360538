"""The design: arms, sizes, rates and margins. preregistration.md says why."""

from dataclasses import dataclass
from typing import Any

from benchmarks.study.design import Arm

RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # the one grid, for every arm
TUNING_SEEDS = (901, 902)
PILOT_SEEDS = (1, 2, 3)
SEED_CHOICES = (8, 12, 16)
DETECTABLE = 0.005  # of the reference's CE: what the chosen number of seeds has to detect with 80 % power
MARGIN = 0.005  # of the reference's CE: TOST calls two arms equal within it
WARMUP, WINDOW = 0.05, 10  # share of steps; steps over which training CE is compared with the base's
WEIGHT_DECAY, CLIPPING, EPSILON = 0.01, 1.0, 1e-8
LARGER = 1.8  # |grad(CE + MCE)| / |grad CE| on this model, docs/diagnose.md

ACCURATE: dict[str, Any] = {"mce_weight": 1.0, "mce_top_k": 32, "mce_steps": 8}
CONTROL_SHARE = 0.8


@dataclass(frozen=True)
class Sizes:
    """How large the study is; each is an option of `prepare`, and all are kept with the study."""

    rows: int = 1000
    """Rows that a seed draws from the pool, each trained on once."""
    batch_rows: int = 8
    """Rows of one optimizer step."""
    pool: int = 3000
    """Rows of the training set that the seeds of the study draw from."""
    tuning_pool: int = 1200
    """Rows that the tuning seeds draw from; none is in the pool."""
    tuning_heldout: int = 200
    """Rows that a tuned rate is judged on; none is in a pool."""
    heldout: int = 400
    """Rows of the test set, for the primary measure."""
    math_rows: int = 100
    """Rows of MATH's test set, whose CE says what is forgotten."""
    max_length: int = 320
    """Tokens of a row; longer rows are left out."""
    greedy: int = 0
    """Problems of GSM8K's test set, and of the generator, that are answered greedily; 0: not measured."""
    trained_layers: int = 6
    """Upper layers that are trained, with the final norm and an untied LM head; 0: the whole model, as it is."""


def make_arms(rows: int) -> tuple[Arm, ...]:
    """The arms, for seeds that draw this many rows. Their settings are keys of a recipe, so that they run at 7B too.

    `ce_larger` is CE with its loss, and so its gradient, multiplied by LARGER. AdamW divides each step by the running
    size of the gradient, and its weight decay does not pass through the gradient. So a factor on the loss changes
    nothing but two thresholds that the gradient is compared with: max_grad_norm and epsilon. Dividing both by the
    factor is the same run, and needs no setting of its own.
    """
    ce = {"mce_weight": 0}
    larger = ce | {"max_grad_norm": CLIPPING / LARGER, "adam_epsilon": EPSILON / LARGER}
    fewer = ce | {"max_train_rows": round(CONTROL_SHARE * rows)}
    return (
        Arm("ce", ce, None, "main", "cross-entropy alone"),
        Arm("mce", ACCURATE, "ce", "main", "CE + MCE, 32 tokens kept and 8 steps: gradient within 1.2 %"),
        Arm("ce_fewer", fewer, "ce", "control", "CE on 80 % of the rows: the positive control"),
        Arm("ce_larger", larger, "ce", "secondary", f"CE with the loss times {LARGER}"),
        Arm("mce_centred", ACCURATE | {"mce_embeddings": "centred"}, "ce", "secondary", "CE + MCE, centred vectors"),
        Arm("emo", ce | {"token_loss": "emo"}, "ce", "secondary", "EMO: another loss that knows the token vectors"),
    )


# More contrasts, between arms that are there anyway: (arm, reference)
DIRECTION = ("mce", "ce_larger")  # what is left of MCE when the size of its gradient is taken away


def tuned_as(arm: str) -> str:
    """The arm whose rate it takes: the control has CE's, since nothing but the rows may differ.

    >>> tuned_as("ce_fewer"), tuned_as("mce")
    ('ce', 'mce')
    """
    return "ce" if arm == "ce_fewer" else arm
