"""From rows to rates, numbers of seeds and verdicts, by the rules of preregistration.md."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.pretrained_study.design import (
    DETECTABLE,
    DIRECTION,
    MARGIN,
    PILOT_SEEDS,
    RATES,
    SEED_CHOICES,
    TUNING_SEEDS,
    make_arms,
)
from benchmarks.study.analysis import Row, paired_values
from benchmarks.study.design import ALPHA, StudyError
from benchmarks.study.power import Equivalence, detectable_interval, equivalence
from benchmarks.study.statistics import PairedTest, holm, minimum_detectable_effect, paired_t, sign_flip

PRIMARY, CONTROL = ("mce", "ce"), ("ce_fewer", "ce")
SECONDARY = (("ce_larger", "ce"), DIRECTION, ("mce_centred", "ce"), ("emo", "ce"))
MEASURE = "ce_heldout"


def choose_rates(tuning: Sequence[Row]) -> dict[str, float]:
    """Each tuned arm's rate: the one with the lowest mean held-out CE over the tuning seeds, of those not refused.

    A rate is refused for an arm if in any of its runs training CE rises above the base's after the warm-up, or the
    loss becomes non-finite.

    Raises:
        StudyError: the tuning of an arm is not complete, or every rate is refused.
    """
    by: dict[tuple[str, float], list[Row]] = {}
    for row in tuning:
        by.setdefault((row["arm"], row["rate"]), []).append(row)
    rates = {}
    for arm in dict.fromkeys(arm.name for arm in make_arms(1) if arm.group != "control"):
        if any(len(by.get((arm, rate), [])) < len(TUNING_SEEDS) for rate in RATES):
            raise StudyError(f"the tuning of {arm} is not complete. Run `pretrained_study.py tune` first.")
        allowed = {
            rate: float(np.mean([row["ce_tuning_heldout"] for row in by[arm, rate]]))
            for rate in RATES
            if all(row["status"] == "done" and not row["rises"] for row in by[arm, rate])
        }
        if not allowed:
            raise StudyError(
                f"every rate of {arm} makes training CE exceed the base's, so there is no fine-tuning to study. "
                "Lower RATES in benchmarks/pretrained_study/design.py, say so in preregistration.md, and tune again."
            )
        rates[arm] = min(allowed, key=lambda rate: allowed[rate])
    return rates


def choose_seeds(rows: Sequence[Row]) -> int:
    """The fewest of SEED_CHOICES that detect DETECTABLE of CE with 80 % power, by the pilot's spread; else the most.

    Only the pilot's spread is used, never its mean, so its seeds are part of the study.

    Raises:
        StudyError: the pilot is not complete.
    """
    pairs = paired_values(rows, *PRIMARY, MEASURE)
    pilot = [pairs[seed] for seed in PILOT_SEEDS if seed in pairs]
    if len(pilot) < len(PILOT_SEEDS):
        raise StudyError("the pilot is not complete. Run `pretrained_study.py run --stage pilot` first.")
    spread = paired_t([arm - reference for arm, reference in pilot]).sd
    wanted = DETECTABLE * float(np.mean([reference for _, reference in pilot]))
    enough = [seeds for seeds in SEED_CHOICES if minimum_detectable_effect(spread, seeds) <= wanted]
    return enough[0] if enough else SEED_CHOICES[-1]


@dataclass(frozen=True)
class Contrast:
    """An arm minus its reference in held-out CE a token, over the seeds that both have."""

    arm: str
    reference: str
    seeds: tuple[int, ...]
    test: PairedTest
    """In nats."""
    reference_ce: float
    """The reference's mean CE, in nats."""
    detectable: float
    """In nats, with 80 % power at the test's level."""
    detectable_range: tuple[float, float]
    """Its 95 % interval."""
    permutation_p: float
    equal: Equivalence
    """TOST within MARGIN of the reference's CE."""
    adjusted_p: float
    """Holm's over the secondary contrasts; the test's own for the primary one and the control."""

    @property
    def differs(self) -> bool:
        return self.adjusted_p < ALPHA


def contrast(rows: Sequence[Row], arm: str, reference: str, level: float = ALPHA) -> Contrast | None:
    """None with fewer than two seeds."""
    pairs = paired_values(rows, arm, reference, MEASURE)
    if len(pairs) < 2:
        return None
    differences = [a - b for a, b in pairs.values()]
    base, test = float(np.mean([b for _, b in pairs.values()])), paired_t(differences)
    return Contrast(
        arm,
        reference,
        tuple(pairs),
        test,
        base,
        minimum_detectable_effect(test.sd, len(pairs), alpha=level),
        detectable_interval(test.sd, len(pairs), alpha=level) if test.sd > 0 else (0.0, 0.0),
        sign_flip(differences),
        equivalence(differences, MARGIN * base),
        test.p,
    )


@dataclass(frozen=True)
class Verdicts:
    """What the rows say so far."""

    primary: Contrast | None
    control: Contrast | None
    secondary: tuple[Contrast, ...]
    wanted_seeds: int | None
    """None until the pilot is complete."""
    void: tuple[str, ...]
    """Why the study counts for nothing, if it does."""

    @property
    def complete(self) -> bool:
        """Whether primary and control have all their seeds. Before that nothing is concluded."""
        have = [c is not None and len(c.seeds) for c in (self.primary, self.control)]
        return self.wanted_seeds is not None and all(n == self.wanted_seeds for n in have)


def judge(rows: Sequence[Row]) -> Verdicts:
    """All contrasts, and whether the study is void."""
    try:
        wanted: int | None = choose_seeds(rows)
    except StudyError:
        wanted = None
    found = [c for arm, reference in SECONDARY if (c := contrast(rows, arm, reference, ALPHA / len(SECONDARY)))]
    adjusted = holm([c.test.p for c in found])
    secondary = tuple(_with_p(c, p) for c, p in zip(found, adjusted, strict=True))
    primary, control = contrast(rows, *PRIMARY), contrast(rows, *CONTROL)
    return Verdicts(primary, control, secondary, wanted, tuple(_reasons(rows, control, wanted)))


def _with_p(found: Contrast, p: float) -> Contrast:
    return replace(found, adjusted_p=p)


def _reasons(rows: Sequence[Row], control: Contrast | None, wanted: int | None) -> list[str]:
    """What voids the study."""
    reasons = []
    if risen := sorted({f"{row['arm']} seed {row['seed']}" for row in rows if row.get("rises")}):
        reasons.append(f"training CE exceeded the base's after the warm-up in {', '.join(risen)}")
    if broken := sorted({f"{row['arm']} seed {row['seed']}" for row in rows if row["status"] != "done"}):
        reasons.append(f"the loss became non-finite in {', '.join(broken)}")
    complete = control is not None and len(control.seeds) == wanted
    if control is not None and complete and not (control.differs and control.test.mean > 0):
        reasons.append("the positive control was not found: 20 % fewer rows did not raise held-out CE")
    return reasons


def described(rows: Sequence[Row], arm: str, reference: str, metrics: Sequence[str]) -> dict[str, PairedTest]:
    """Paired t intervals of other measures, without verdicts."""
    found = {}
    for metric in metrics:
        pairs = paired_values(rows, arm, reference, metric)
        values = [a - b for a, b in pairs.values() if not (math.isnan(a) or math.isnan(b))]
        if len(values) > 1:
            found[metric] = paired_t(values)
    return found


def travel_cosines(sketches: Mapping[tuple[str, int], Any]) -> dict[str, float]:
    """Mean cosine of the ways that two runs' weights went: the same seed in two arms, two seeds of one arm.

    Args:
        sketches: {(arm, seed): (K,)} of mechanism.Travel.
    """
    keys = sorted(sketches)
    found: dict[str, list[float]] = {}
    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            same_arm, same_seed = first[0] == second[0], first[1] == second[1]
            if same_arm == same_seed:
                continue
            a, b = sketches[first], sketches[second]
            cosine = float(a @ b / math.sqrt((a @ a) * (b @ b)))
            name = f"{first[0]}, two seeds" if same_arm else f"{first[0]} and {second[0]}, one seed"
            found.setdefault(name, []).append(cosine)
    return {name: float(np.mean(values)) for name, values in found.items()}
