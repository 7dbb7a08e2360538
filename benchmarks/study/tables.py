"""Words and Markdown tables of the report."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.output import markdown_table
from benchmarks.study.analysis import Contrast, Row, paired_values
from benchmarks.study.design import ALPHA, ARMS, BY_NAME
from benchmarks.study.power import detectable_interval
from benchmarks.study.statistics import minimum_detectable_effect, paired_t, sign_flip

LABELS = {
    "heldout": "held-out generated problems",
    "gsm8k": "GSM8K",
    "math": "MATH",
    "pass@1": "pass@1",
    "pass@4": "pass@4",
    "pass@8": "pass@8",
    "ce_heldout": "CE a token, held-out responses (nats)",
    "ce_recipe": "CE a token, the recipe's held-out rows (nats)",
    "ece_token": "ECE of the next token",
    "ece_answer": "ECE of the answer",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "distinct_answers": "distinct final answers, share of samples",
    "unanswered": "greedy responses without an answer",
    "rank_head": "effective rank, LM head",
    "rank_hidden": "effective rank, last hidden states",
    "grad_norm": "gradient norm before clipping, mean over logged steps",
    "train_seconds": "training (s)",
    "peak_memory_gib": "peak memory (GiB)",
}
NOT_METRICS = {"seed", "steps", "measure_seconds", "resumed"}
SHARES = ("accuracy", "pass@", "unanswered")  # prefixes of the metrics that are given in percent


# --- words -----------------------------------------------------------------------------------------------------------


def points(share: float) -> str:
    """A difference of shares, in percentage points with its sign."""
    return "n/a" if math.isnan(share) else f"{100 * share:+.2f}"


def p_text(p: float) -> str:
    if math.isnan(p):
        return "n/a"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def detectable_range(contrast: Contrast) -> str:
    """The 95 % interval of the detectable difference, in points."""
    ends = detectable_interval(contrast.test.sd, len(contrast.seeds), alpha=contrast.level)
    return " to ".join(f"{100 * end:.2f}" for end in ends)


def describe(contrast: Contrast, which: str) -> str:
    """The verdict of one contrast in words, stated plainly where no difference is found."""
    c, place = contrast, LABELS.get(which, which)
    if len(c.seeds) < 2:
        return (
            f"**{c.arm} against {c.reference}, {place}: one seed only, so nothing can be said.** "
            f"Difference {points(c.test.mean)} points."
        )
    holm = "" if c.adjusted_p == c.test.p else f", Holm {p_text(c.adjusted_p)}"
    figures = (
        f"{points(c.test.mean)} points over {len(c.seeds)} seeds "
        f"(t interval {points(c.test.low)} to {points(c.test.high)}, p = {p_text(c.test.p)}{holm}; "
        f"bootstrap over seeds and problems {points(c.bootstrap[0])} to {points(c.bootstrap[1])})"
    )
    missed = (
        f"The t test alone finds a true difference of {100 * c.detectable:.2f} points with 80 % power, "
        f"going by the observed spread over seeds ({detectable_range(c)}: that spread is itself an estimate)."
    )
    if c.differs:
        direction = "better" if c.test.mean > 0 else "worse"
        return f"**{c.arm} is {direction} than {c.reference} on {place}**: {figures}. {missed}"
    return (
        f"**No difference found between {c.arm} and {c.reference} on {place}**: {figures}. {missed} "
        "No difference found is not the same as equal: the interval says what remains possible."
    )


def describe_likelihood(rows: Sequence[Row], arm: str, reference: str) -> str:
    """The secondary test, on held-out CE per token; "" with fewer than two pairs."""
    pairs = paired_values(rows, arm, reference, "ce_heldout")
    if len(pairs) < 2:
        return ""
    t = paired_t([a - b for a, b in pairs.values()])
    direction = "lower" if t.mean < 0 else "higher"
    verdict = f"{direction} with {arm}" if t.p < ALPHA else "no difference found"
    return (
        f"**Held-out CE a token: {verdict}**: {t.mean:+.5f} nats ({t.low:+.5f} to {t.high:+.5f}), "
        f"paired t, p = {p_text(t.p)}."
    )


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The names of all single figures: accuracies first, then those of LABELS in its order, then the rest by name."""
    found = {
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    place = {name: index for index, name in enumerate(LABELS)}

    def order(name: str) -> tuple[bool, int, str]:
        return not name.startswith("accuracy_"), place.get(name, len(place)), name

    return sorted(found - NOT_METRICS, key=order)


def metric_label(metric: str) -> str:
    if metric in LABELS:
        return LABELS[metric]
    if metric.startswith("accuracy_"):
        problems = metric.removeprefix("accuracy_")
        return f"accuracy, {LABELS.get(problems, problems)}"
    if metric.startswith("ce_"):
        return f"CE a token, text of {metric.removeprefix('ce_').replace('_', ' ')}"
    return metric


def format_value(metric: str, value: float) -> str:
    if metric.startswith(SHARES):
        return f"{100 * value:.2f} %"
    if metric.endswith("_seconds"):
        return f"{value:.1f}"
    return f"{value:.2f}" if metric.startswith(("rank", "peak")) else f"{value:.4f}"


# --- tables ----------------------------------------------------------------------------------------------------------


def seeds_table(contrast: Contrast, rows: Sequence[Row], which: str) -> str:
    """One line per seed: both accuracies, their difference, and McNemar's test."""
    accuracy = {(row["arm"], row["seed"]): row.get(f"accuracy_{which}") for row in rows}
    lines = []
    for seed, difference, mcnemar in zip(contrast.seeds, contrast.differences, contrast.mcnemar, strict=True):
        both = [accuracy.get((name, seed)) for name in (contrast.arm, contrast.reference)]
        shown = ["" if value is None else f"{100 * value:.2f} %" for value in both]
        counts = [str(mcnemar.arm_only), str(mcnemar.reference_only)]
        lines.append([str(seed), *shown, points(difference), *counts, p_text(mcnemar.p)])
    alone = [f"{name} alone right" for name in (contrast.arm, contrast.reference)]
    header = ["seed", contrast.arm, contrast.reference, "difference, points", *alone, "exact McNemar, p"]
    return markdown_table(header, lines)


def paired_table(rows: Sequence[Row], arm: str, reference: str) -> str:
    """Every figure of the arm minus its reference's, paired by seed."""
    lines = []
    for metric in metric_names(rows):
        differences = [a - b for a, b in paired_values(rows, arm, reference, metric).values()]
        if len(differences) < 2:
            continue
        t = paired_t(differences)
        is_share = metric.startswith(SHARES)
        scale, unit = (100, " points") if is_share else (1, "")
        digits = 2 if is_share or metric.startswith(("rank", "peak", "train")) else 4
        center, low, high = (f"{scale * value:+.{digits}f}" for value in (t.mean, t.low, t.high))
        ends = [minimum_detectable_effect(t.sd, t.seeds), *detectable_interval(t.sd, t.seeds)]
        best, *limits = (f"{scale * value:.{digits}f}" for value in ends)
        detectable = f"{best} ({' to '.join(limits)})"
        tests = [p_text(t.p), p_text(sign_flip(differences)), detectable]
        lines.append([metric_label(metric), center + unit, f"{low} to {high}", *tests])
    tests = ["paired t, p", "sign flip, p", "detectable (80 %), and its 95 % interval"]
    return markdown_table([f"{arm} minus {reference}", "mean", "95 % t interval", *tests], lines)


def ablation_table(contrasts: Sequence[Contrast]) -> str:
    lines = []
    for c in contrasts:
        intervals = [f"{points(low)} to {points(high)}" for low, high in ((c.test.low, c.test.high), c.bootstrap)]
        verdict = ("better" if c.test.mean > 0 else "worse") if c.differs else "no difference found"
        detectable = f"{points(c.detectable).removeprefix('+')} ({detectable_range(c)})"
        tests = [p_text(c.test.p), p_text(c.adjusted_p), detectable, verdict]
        what = [c.arm, BY_NAME[c.arm].description, c.reference, str(len(c.seeds))]
        lines.append([*what, points(c.test.mean), *intervals, *tests])
    figures = ["points", "95 % t interval", "bootstrap", "p", "Holm p", "detectable, and its 95 % interval", "verdict"]
    return markdown_table(["arm", "what", "against", "seeds", *figures], lines)


def sensitivity_table(studies: Mapping[str, Sequence[Row]]) -> str:
    """The main contrast of several studies, described without a verdict.

    Args:
        studies: {what differs from the first: rows of runs.jsonl}.
    """
    lines = []
    known = {metric for rows in studies.values() for metric in metric_names(rows)}
    texts = sorted(metric for metric in known if metric.startswith("ce_") and metric not in LABELS)
    for name, rows in studies.items():
        done = [row for row in rows if row.get("status") == "done"]
        accuracy = next((metric for metric in metric_names(done) if metric.startswith("accuracy_")), "")
        described = [accuracy, "ce_heldout", *texts]
        pairs = {key: paired_values(done, "mce", "ce", key) for key in (*described, "grad_norm", "rank_head")}
        seeds = len(pairs[accuracy])
        if seeds < 2:
            continue
        cells = [name, str(seeds)]
        for metric, by_seed in pairs.items():
            if not by_seed:
                cells += ["", ""] if metric in described else [""]
                continue
            mce, ce = np.array(list(by_seed.values())).T
            cells.append(f"{format_value(metric, float(ce.mean()))} / {format_value(metric, float(mce.mean()))}")
            if metric in described:
                t = paired_t(mce - ce)
                scale, digits = (100, 2) if metric == accuracy else (1, 4)
                center, low, high = (f"{scale * value:+.{digits}f}" for value in (t.mean, t.low, t.high))
                cells.append(f"{center} ({low} to {high})")
        lines.append(cells)
    header = ["accuracy, ce / mce", "mce minus ce, points", "held-out CE, ce / mce", "mce minus ce, nats"]
    header += [title for text in texts for title in (f"{metric_label(text)}, ce / mce", "mce minus ce, nats")]
    header += ["gradient norm, ce / mce", "effective rank of the LM head, ce / mce"]
    return markdown_table(["study", "seeds", *header], lines)


def arms_table(rows: Sequence[Row], base: Row | None = None) -> str:
    """Mean and standard deviation over seeds of every figure, one column per arm.

    Args:
        base: the figures of the weights that all runs start from, for a separate column.
    """
    arms = [arm.name for arm in ARMS if any(row["arm"] == arm.name for row in rows)]
    lines = [["seeds", *([""] if base else []), *(str(sum(row["arm"] == arm for row in rows)) for arm in arms)]]
    for metric in metric_names(rows):
        cells = []
        if base:
            cells.append("" if base.get(metric) is None else format_value(metric, base[metric]))
        for arm in arms:
            values = [row[metric] for row in rows if row["arm"] == arm and row.get(metric) is not None]
            cell = format_value(metric, float(np.mean(values))) if values else ""
            if len(values) > 1:
                cell += f" ± {format_value(metric, float(np.std(values, ddof=1))).removesuffix(' %')}"
            cells.append(cell)
        lines.append([metric_label(metric), *cells])
    return markdown_table(["mean ± standard deviation over seeds", *(["base"] if base else []), *arms], lines)


def rank_table(rows: Sequence[Row]) -> str:
    """Effective ranks at the first and last step at which they were read, means over seeds: does anything collapse?"""
    titles = {"curve_rank_head": "LM head, over training", "curve_rank_hidden": "last hidden states, over training"}
    measured = [curve for curve in titles if any(row.get(curve) for row in rows)]  # hidden states need checkpoints
    lines = []
    for arm in ARMS:
        cells = []
        for curve in measured:
            curves = [row[curve] for row in rows if row["arm"] == arm.name and row.get(curve)]
            if not curves:
                cells.append("")
                continue
            first, last = (float(np.mean([points[place][1] for points in curves])) for place in (0, -1))
            # The head's rank is taken at step 1, though its line in the log names the step that was logged.
            step = curves[0][0][0] if curve == "curve_rank_hidden" else 1
            cells.append(f"{first:.1f} (step {step}) to {last:.1f}")
        if any(cells):
            lines.append([arm.name, *cells])
    return markdown_table(["arm", *(titles[curve] for curve in measured)], lines)
