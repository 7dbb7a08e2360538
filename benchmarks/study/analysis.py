"""From the rows of a study to its verdicts, by the rules of preregistration.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.study.design import ALPHA, ARMS, BY_NAME, Arm, StudyError
from benchmarks.study.folder import PROBLEMS
from benchmarks.study.statistics import (
    PairedTest,
    hierarchical_bootstrap,
    holm,
    minimum_detectable_effect,
    paired_t,
    sign_flip,
)
from eval.statistics import mcnemar_exact

Row = Mapping[str, Any]
PRIMARY_SETS = ("heldout", "gsm8k")  # the first that a study has decides


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test between the two runs of one seed."""

    arm_only: int
    """Problems that the arm alone solved."""
    reference_only: int
    """Problems that the reference alone solved."""
    p: float
    """Two-sided p value."""


@dataclass(frozen=True)
class Contrast:
    """An arm minus its reference in accuracy, over the seeds that both have."""

    arm: str
    """Name of the arm."""
    reference: str
    """Name of the arm it is compared with."""
    seeds: tuple[int, ...]
    """Seeds that both have, in order."""
    differences: tuple[float, ...]
    """Of accuracy, one per seed."""
    mcnemar: tuple[McNemar, ...]
    """One per seed."""
    test: PairedTest
    """The primary test."""
    bootstrap: tuple[float, float]
    """95 % interval, seeds and problems redrawn."""
    permutation_p: float
    """Of the sign-flip test."""
    detectable: float
    """The true difference that the t test at `level` finds with 80 % power."""
    level: float
    """ALPHA; for ablations ALPHA over their number, which is Holm's first step."""
    adjusted_p: float
    """Holm's for ablations, otherwise the test's own."""

    @property
    def differs(self) -> bool:
        """The rule: a difference only if the (corrected) t test and the bootstrap interval agree."""
        low, high = self.bootstrap
        return self.adjusted_p < ALPHA and not low <= 0 <= high

    @property
    def is_main(self) -> bool:
        return BY_NAME[self.arm].group == "main"


def paired_values(rows: Sequence[Row], arm: str, reference: str, metric: str) -> dict[int, tuple[Any, Any]]:
    """{seed: (the arm's value, its reference's)} of the seeds for which both have one, in order.

    Of two rows of a run the last counts.

    >>> rows = [{"arm": "ce", "seed": 1, "x": 2}, {"arm": "mce", "seed": 1, "x": 3}, {"arm": "mce", "seed": 2, "x": 4}]
    >>> paired_values(rows, "mce", "ce", "x")
    {1: (3, 2)}
    """
    values = {(row["arm"], row["seed"]): row[metric] for row in rows if row.get(metric) is not None}
    seeds = sorted(seed for name, seed in values if name == arm and (reference, seed) in values)
    return {seed: (values[arm, seed], values[reference, seed]) for seed in seeds}


def primary_set(problems: Sequence[Row]) -> str:
    """The problem set whose accuracy decides."""
    sets = {row["set"] for row in problems}
    if not sets:
        raise StudyError(f"there is no {PROBLEMS} with verdicts yet. Run the study, or collect its runs, first.")
    return next(name for name in (*PRIMARY_SETS, *sorted(sets)) if name in sets)


def analyse(problems: Sequence[Row], which: str | None = None) -> list[Contrast]:
    """The contrast of every arm that shares a seed with its reference.

    Args:
        problems: rows of problems.jsonl.
        which: the problem set to compare on; the primary one by default.
    """
    which = which or primary_set(problems)
    verdicts = [row for row in problems if row["set"] == which]
    contrasts = [contrast for arm in ARMS if (contrast := compare(arm, verdicts))]

    # Holm's correction, over everything outside the main contrast. Its first step tests at ALPHA over their number.
    corrected = [contrast for contrast in contrasts if not contrast.is_main]
    names, p_values = [contrast.arm for contrast in corrected], [contrast.test.p for contrast in corrected]
    adjusted = dict(zip(names, holm(p_values), strict=True))
    return [
        replace(
            contrast,
            adjusted_p=adjusted[contrast.arm],
            detectable=minimum_detectable_effect(contrast.test.sd, len(contrast.seeds), alpha=ALPHA / len(corrected)),
            level=ALPHA / len(corrected),
        )
        if contrast.arm in adjusted
        else contrast
        for contrast in contrasts
    ]


def compare(arm: Arm, verdicts: Sequence[Row]) -> Contrast | None:
    """The contrast of one arm, before any correction; None without a seed that its reference has too."""
    pairs = paired_values(verdicts, arm.name, arm.reference, "correct") if arm.reference else {}
    if not arm.reference or not pairs:
        return None
    if len({len(correct) for pair in pairs.values() for correct in pair}) > 1:
        raise StudyError(
            f"the runs of {arm.name} and {arm.reference} were scored on different numbers of problems, so they cannot "
            "be compared problem by problem. Score them again on the same set."
        )
    solved = np.array([[[c == "1" for c in correct] for correct in pair] for pair in pairs.values()])  # (S, 2, P)
    by_arm, by_reference = solved[:, 0], solved[:, 1]  # (S, P) each
    differences = by_arm.astype(float) - by_reference
    over_seeds = differences.mean(1).tolist()
    arm_only, reference_only = (by_arm & ~by_reference).sum(1), (by_reference & ~by_arm).sum(1)  # (S,)
    test = paired_t(over_seeds)
    return Contrast(
        arm=arm.name,
        reference=arm.reference,
        seeds=tuple(pairs),
        differences=tuple(over_seeds),
        mcnemar=tuple(
            McNemar(a, b, mcnemar_exact(a, b)) for a, b in zip(arm_only.tolist(), reference_only.tolist(), strict=True)
        ),
        test=test,
        bootstrap=hierarchical_bootstrap(differences),
        permutation_p=sign_flip(over_seeds),
        detectable=minimum_detectable_effect(test.sd, len(pairs)),
        level=ALPHA,
        adjusted_p=test.p,
    )
