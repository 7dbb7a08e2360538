"""What limits a verdict: the loss that a fine-tuning starts from, and the gains that a study could have missed."""

from collections.abc import Sequence

import numpy as np

from benchmarks.output import markdown_table
from benchmarks.study.analysis import Contrast, Row, paired_values
from benchmarks.study.design import ARMS
from benchmarks.study.power import equivalence, paper_gain, power_of_t, seeds_for_equivalence

MARGIN = 0.015  # of accuracy: what "equal" is taken to mean where no margin was stated beforehand


def mean_curve(rows: Sequence[Row], arm: str) -> list[tuple[int, float]]:
    """(step, training CE) of an arm, the mean over its seeds, at the steps that all of them logged."""
    curves = [dict(row["curve_ce"]) for row in rows if row["arm"] == arm and row.get("curve_ce")]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(step, float(np.mean([curve[step] for curve in curves]))) for step in steps]


def rise_table(rows: Sequence[Row]) -> str:
    """Does the fine-tuning lower the training loss? Its first logged value, its highest, and when it is back."""
    lines = []
    for arm in ARMS:
        curve = mean_curve(rows, arm.name)
        if not curve:
            continue
        (first, start), (last, end) = curve[0], curve[-1]
        peak, highest = max(curve, key=lambda point: point[1])
        rose = highest > start
        back = next((step for step, ce in curve if step > peak and ce <= start), None)
        returned = "" if not rose else "never" if back is None else str(back)
        at_peak = f"{highest:.3f} (step {peak})" if rose else "does not rise"
        lines.append([arm.name, f"{start:.3f} (step {first})", at_peak, returned, f"{end:.3f} (step {last})"])
    header = ["training CE, mean over seeds", "first logged", "highest", "back at the first, step", "last"]
    return markdown_table(header, lines)


def readings_table(contrast: Contrast, rows: Sequence[Row], which: str) -> str:
    """The probability that this contrast finds the paper's gain, carried to the reference's accuracy in three ways."""
    pairs = paired_values(rows, contrast.arm, contrast.reference, f"accuracy_{which}")
    if len(pairs) < 2:
        return ""
    accuracy = float(np.mean([reference for _, reference in pairs.values()]))
    lines = []
    for reading, gain in paper_gain(accuracy).items():
        power = power_of_t(gain, contrast.test.sd, len(contrast.seeds))
        # The upper end of the t interval says which gains the data themselves speak against.
        excluded = "yes" if gain > contrast.test.high else "no"
        lines.append([reading, f"{100 * gain:+.2f}", f"{power:.2f}", excluded])
    header = ["the paper's gain, read in", f"points at {100 * accuracy:.1f} %", "power of the t test"]
    return markdown_table([*header, "outside the t interval"], lines)


def equality_sentence(contrast: Contrast) -> str:
    """Are the arms equal within MARGIN, and if that is open, how many seeds would tell?"""
    if len(contrast.seeds) < 2 or contrast.test.sd == 0:
        return ""
    found = equivalence(contrast.differences, MARGIN)
    verdict = "equal within it" if found.equal else "not shown to be equal"
    return (
        f"Within ±{100 * MARGIN:.1f} points: {verdict} (TOST, p = {found.p:.3f}). This margin was chosen "
        "after the data had been seen, so that is a description and not a claim. "
        f"Two equal losses with this spread are shown to be equal with 80 % power by "
        f"{seeds_for_equivalence(contrast.test.sd, MARGIN)} seeds; this study has {len(contrast.seeds)}."
    )
