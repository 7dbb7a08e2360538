"""From runs.jsonl and problems.jsonl to the tables, plots and sentences of docs/results.md. Every verdict follows study.py's header.

analyse       rows -> one Contrast for each arm and its reference
sentence      a Contrast in words, plainly where there is no difference
write_report  puts it all between the page's markers, plots and raw rows beside
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from study import ARMS, BASE, BY_NAME, PROBLEMS, RUNS, SETUP, StudyError
from study_statistics import Paired, hierarchical_bootstrap, holm, minimum_detectable_effect, paired_t, sign_flip

from eval.statistics import mcnemar_exact
from matrix_llm.base.files import atomic_path, read_jsonl, write_text

ALPHA = 0.05
BEGIN, END = "<!-- study: begin, written by benchmarks/study.py report -->", "<!-- study: end -->"
EMPTY_PAGE = f"# Does matrix cross-entropy help?\n\n{BEGIN}\n{END}\n"
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
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Contrast:
    """An arm minus its reference on the primary metric, over the seeds that both have."""

    arm: str
    reference: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]  # of accuracy, one a seed
    mcnemar: tuple[tuple[int, int, float], ...]  # (arm alone right, reference alone right, exact p), one a seed
    test: Paired
    bootstrap: tuple[float, float]
    permutation_p: float
    detectable: float
    adjusted_p: float  # Holm's for ablations, else the test's own

    @property
    def differs(self) -> bool:
        low, high = self.bootstrap
        return self.adjusted_p < ALPHA and not low <= 0 <= high


def primary_set(problems: Sequence[Row]) -> str:
    sets = {row["set"] for row in problems}
    found = next((name for name in ("heldout", "gsm8k", *sorted(sets)) if name in sets), None)
    if found is None:
        raise StudyError(f"there is no {PROBLEMS} with verdicts yet. Run the study, or collect its runs, first.")
    return found


def analyse(problems: Sequence[Row], which: str | None = None) -> list[Contrast]:
    """The contrasts of all arms that have a reference and a seed in common with it; of two rows of one run the last counts."""
    which = which or primary_set(problems)
    verdicts = {
        (row["arm"], row["seed"]): np.array([c == "1" for c in row["correct"]])
        for row in problems
        if row["set"] == which
    }
    contrasts = []
    for arm in ARMS:
        seeds = tuple(sorted(s for name, s in verdicts if name == arm.name and (arm.reference, s) in verdicts))
        if arm.reference is None or not seeds:
            continue
        pairs = [(verdicts[arm.name, seed], verdicts[arm.reference, seed]) for seed in seeds]
        if len({len(v) for pair in pairs for v in pair}) > 1:
            raise StudyError(
                f"the runs of {arm.name} and {arm.reference} were scored on different numbers of problems ({which})."
            )
        matrix = np.array([a.astype(float) - b for a, b in pairs])  # (S, P)
        differences = matrix.mean(1)
        counts = [(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in pairs]
        test = paired_t(differences.tolist())
        contrasts.append(
            Contrast(
                arm.name,
                arm.reference,
                seeds,
                tuple(differences.tolist()),
                tuple((a, b, mcnemar_exact(a, b)) for a, b in counts),
                test,
                hierarchical_bootstrap(matrix),
                sign_flip(differences.tolist()),
                minimum_detectable_effect(test.sd, len(seeds)),
                test.p,
            )
        )
    corrected = [c for c in contrasts if BY_NAME[c.arm].group != "main"]
    for c, p in zip(corrected, holm([c.test.p for c in corrected]), strict=True):
        detectable = minimum_detectable_effect(
            c.test.sd, len(c.seeds), alpha=ALPHA / len(corrected)
        )  # Holm's first step
        contrasts[contrasts.index(c)] = replace(c, adjusted_p=p, detectable=detectable)
    return contrasts


# --- words ---------------------------------------------------------------------------------------------------------------------


def points(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:+.2f}"


def p_text(p: float) -> str:
    return "n/a" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def sentence(contrast: Contrast, which: str) -> str:
    """The verdict of one contrast.

    The rule: a difference only where the (corrected) t test and the bootstrap interval agree.
    """
    c, place = contrast, LABELS.get(which, which)
    if len(c.seeds) < 2:
        return f"**{c.arm} against {c.reference}, {place}: one seed only, so nothing can be said.** Difference {points(c.test.mean)} points."
    figures = (
        f"{points(c.test.mean)} points over {len(c.seeds)} seeds (t interval {points(c.test.low)} to {points(c.test.high)}, p = "
        f"{p_text(c.test.p)}{'' if c.adjusted_p == c.test.p else f', Holm {p_text(c.adjusted_p)}'}; bootstrap over seeds and problems "
        f"{points(c.bootstrap[0])} to {points(c.bootstrap[1])})"
    )
    missed = f"The t test alone finds a true difference of {100 * c.detectable:.2f} points with 80 % power."
    if c.differs:
        return f"**{c.arm} is {'better' if c.test.mean > 0 else 'worse'} than {c.reference} on {place}**: {figures}. {missed}"
    return (
        f"**No difference found between {c.arm} and {c.reference} on {place}**: {figures}. {missed} "
        "No difference found is not the same as equal: the interval says what remains possible."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names of all single figures, the labelled ones first, in that order."""
    found = dict.fromkeys(
        k for row in rows for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    )
    names = [name for name in found if name not in NOT_METRICS]
    place = {name: index for index, name in enumerate(LABELS)}
    return sorted(names, key=lambda name: (not name.startswith("accuracy_"), place.get(name, len(place)), name))


def label(name: str) -> str:
    if name.startswith("accuracy_"):
        return f"accuracy, {LABELS.get(name.removeprefix('accuracy_'), name.removeprefix('accuracy_'))}"
    return LABELS.get(
        name, name.replace("ce_", "CE a token, text of ", 1).replace("_", " ") if name.startswith("ce_") else name
    )


def number(name: str, value: float) -> str:
    if name.startswith(("accuracy", "pass@", "unanswered")):
        return f"{100 * value:.2f} %"
    return (
        f"{value:.1f}"
        if name.endswith("_seconds")
        else f"{value:.2f}"
        if name.startswith(("rank", "peak"))
        else f"{value:.4f}"
    )


def arms_table(rows: Sequence[Row], base: Row | None = None) -> str:
    """Mean and standard deviation over seeds of every figure, one column an arm; `base`: the weights they all start from."""
    names = [arm.name for arm in ARMS if any(row["arm"] == arm.name for row in rows)]
    lines = []
    for metric in metrics_of(rows):
        cells = [number(metric, base[metric]) if base.get(metric) is not None else ""] if base else []
        for name in names:
            values = [row[metric] for row in rows if row["arm"] == name and row.get(metric) is not None]
            spread = f" ± {number(metric, float(np.std(values, ddof=1))).removesuffix(' %')}" if len(values) > 1 else ""
            cells.append(number(metric, float(np.mean(values))) + spread if values else "")
        lines.append([label(metric), *cells])
    seeds = ["seeds", *([""] if base else []), *(str(sum(row["arm"] == name for row in rows)) for name in names)]
    return table(["mean ± standard deviation over seeds", *(["base"] if base else []), *names], [seeds, *lines])


def paired_table(rows: Sequence[Row], arm: str, reference: str) -> str:
    """Every figure of the arm minus its reference's, paired by seed."""
    by = {(row["arm"], row["seed"]): row for row in rows}
    lines = []
    for metric in metrics_of(rows):
        found = [
            by[arm, s][metric] - by[reference, s][metric]
            for name, s in sorted(by)
            if name == arm and (reference, s) in by and all(by[k, s].get(metric) is not None for k in (arm, reference))
        ]
        if len(found) < 2:
            continue
        t = paired_t(found)
        scale, unit = (100, " points") if metric.startswith(("accuracy", "pass@", "unanswered")) else (1, "")
        digits = 2 if scale == 100 or metric.startswith(("rank", "peak", "train")) else 4
        cells = [f"{scale * value:+.{digits}f}" for value in (t.mean, t.low, t.high)]
        mde = scale * minimum_detectable_effect(t.sd, t.seeds)
        lines.append(
            [
                label(metric),
                cells[0] + unit,
                f"{cells[1]} to {cells[2]}",
                p_text(t.p),
                p_text(sign_flip(found)),
                f"{mde:.{digits}f}",
            ]
        )
    return table(
        [f"{arm} minus {reference}", "mean", "95 % t interval", "paired t, p", "sign flip, p", "detectable (80 %)"],
        lines,
    )


def seeds_table(contrast: Contrast, rows: Sequence[Row], which: str) -> str:
    accuracy = {(row["arm"], row["seed"]): row.get(f"accuracy_{which}") for row in rows}
    lines = []
    for seed, difference, (a, b, p) in zip(contrast.seeds, contrast.differences, contrast.mcnemar, strict=True):
        each = [accuracy.get((name, seed)) for name in (contrast.arm, contrast.reference)]
        shown = ["" if value is None else f"{100 * value:.2f} %" for value in each]
        lines.append([str(seed), *shown, points(difference), str(a), str(b), p_text(p)])
    header = [
        "seed",
        contrast.arm,
        contrast.reference,
        "difference, points",
        f"{contrast.arm} alone right",
        f"{contrast.reference} alone right",
    ]
    return table([*header, "exact McNemar, p"], lines)


def ablation_table(contrasts: Sequence[Contrast]) -> str:
    lines = []
    for c in contrasts:
        intervals = [f"{points(low)} to {points(high)}" for low, high in ((c.test.low, c.test.high), c.bootstrap)]
        verdict = ("better" if c.test.mean > 0 else "worse") if c.differs else "no difference found"
        figures = [
            points(c.test.mean),
            *intervals,
            p_text(c.test.p),
            p_text(c.adjusted_p),
            points(c.detectable).lstrip("+"),
            verdict,
        ]
        lines.append([c.arm, BY_NAME[c.arm].what, c.reference, str(len(c.seeds)), *figures])
    header = [
        "arm",
        "what",
        "against",
        "seeds",
        "points",
        "95 % t interval",
        "bootstrap",
        "p",
        "Holm p",
        "detectable",
        "verdict",
    ]
    return table(header, lines)


def rank_table(rows: Sequence[Row]) -> str:
    """Effective ranks at the first and last step at which each was read, means over seeds: whether anything collapses."""
    lines = []
    titles = {"curve_rank_head": "LM head, over training", "curve_rank_hidden": "last hidden states, over training"}
    known = [
        curve for curve in titles if any(row.get(curve) for row in rows)
    ]  # runs without checkpoints have no hidden states' curve
    for arm in ARMS:
        cells: list[str] = []
        for curve in known:
            curves = [row[curve] for row in rows if row["arm"] == arm.name and row.get(curve)]
            ends = [[float(np.mean([c[place][1] for c in curves])) for place in (0, -1)] for _ in range(bool(curves))]
            first = (
                f"step {curves[0][0][0]}" if curve == "curve_rank_hidden" and curves else "step 1"
            )  # the head's is logged later
            cells += [f"{a:.1f} ({first}) to {b:.1f}" for a, b in ends] or [""]
        if any(cells):
            lines.append([arm.name, *cells])
    return table(["arm", *(titles[curve] for curve in known)], lines)


# --- plots -----------------------------------------------------------------------------------------------------------------------


def draw_contrasts(contrasts: Sequence[Contrast], which: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.45 * len(contrasts)), layout="constrained")
    for place, c in enumerate(reversed(contrasts)):
        colour = "#d62728" if c.differs else "#1f77b4"
        axes.plot(
            [100 * x for x in c.bootstrap], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
        )
        if len(c.seeds) > 1:
            axes.plot([100 * c.test.low, 100 * c.test.high], [place, place], color=colour, linewidth=1)
        axes.plot([100 * d for d in c.differences], [place] * len(c.seeds), "o", color=colour, markersize=3)
        axes.plot(100 * c.test.mean, place, "D", color=colour, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(contrasts)), [f"{c.arm} - {c.reference}" for c in reversed(contrasts)])
    axes.set(
        xlabel="accuracy difference, points; dots: seeds, thick: bootstrap 95 %, thin: t 95 %",
        title=LABELS.get(which, which),
    )
    axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Training CE and both effective ranks against steps, a line an arm: the mean over its seeds. What nobody has is not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "curve_ce": "training CE (nats)",
        "curve_rank_head": "effective rank, LM head",
        "curve_rank_hidden": "effective rank, hidden",
    }
    found = {curve: title for curve, title in titles.items() if any(row.get(curve) for row in rows)} or titles
    figure, panels = plt.subplots(1, len(found), figsize=(1 + 4 * len(found), 4), layout="constrained", squeeze=False)
    for axes, (curve, title) in zip(panels[0], found.items(), strict=True):
        for place, arm in enumerate(ARMS):
            values: dict[int, list[float]] = {}
            for row in rows:
                for step, value in row.get(curve) or [] if row["arm"] == arm.name else []:
                    values.setdefault(step, []).append(value)
            if values:
                steps = sorted(values)
                colour = plt.colormaps["tab20"](
                    2 * place if place < 10 else 2 * place - 19
                )  # the usual ten, then their light shades
                axes.plot(steps, [np.mean(values[s]) for s in steps], label=arm.name, color=colour, linewidth=1.4)
        axes.set(xlabel="optimizer step", title=title)
        axes.grid(alpha=0.3)
    if panels[0, 0].lines:
        panels[0, 0].set_yscale("log")
        panels[0, 0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


# --- the page --------------------------------------------------------------------------------------------------------------------


def secondary(rows: Sequence[Row], arm: str = "mce", reference: str = "ce", metric: str = "ce_heldout") -> str:
    by = {(row["arm"], row["seed"]): row.get(metric) for row in rows}
    seeds = [
        s for name, s in sorted(by) if name == arm and by[name, s] is not None and by.get((reference, s)) is not None
    ]
    if len(seeds) < 2:
        return ""
    t = paired_t([by[arm, s] - by[reference, s] for s in seeds])
    verdict = f"{'lower' if t.mean < 0 else 'higher'} with {arm}" if t.p < ALPHA else "no difference found"
    return f"**Held-out CE a token: {verdict}**: {t.mean:+.5f} nats ({t.low:+.5f} to {t.high:+.5f}), paired t, p = {p_text(t.p)}."


def sensitivity_table(studies: Mapping[str, Sequence[Row]]) -> str:
    """Main contrast of several studies, described: {what differs: rows}."""
    lines = []
    for name, rows in studies.items():
        by = {(row["arm"], row["seed"]): row for row in rows if row.get("status") == "done"}
        seeds = [s for arm, s in sorted(by) if arm == "mce" and ("ce", s) in by]
        if len(seeds) < 2:
            continue
        metric = next(m for m in metrics_of(list(by.values())) if m.startswith("accuracy_"))
        cells = [name, str(len(seeds))]
        for key in (metric, "ce_heldout", "grad_norm", "rank_head"):
            pairs = [[by[arm, s][key] for arm in ("ce", "mce")] for s in seeds]
            cells += [" / ".join(number(key, float(mean)) for mean in np.mean(pairs, axis=0))]
            if key in (metric, "ce_heldout"):
                t = paired_t([b - a for a, b in pairs])
                scale, digits = (100, 2) if key == metric else (1, 4)
                low, high = (f"{scale * x:+.{digits}f}" for x in (t.low, t.high))
                cells += [f"{scale * t.mean:+.{digits}f} ({low} to {high})"]
        lines.append(cells)
    header = [
        "study",
        "seeds",
        "accuracy, ce / mce",
        "mce minus ce, points",
        "held-out CE, ce / mce",
        "mce minus ce, nats",
    ]
    return table([*header, "gradient norm, ce / mce", "effective rank of the LM head, ce / mce"], lines)


def kept_problems(rows: Sequence[Row], problems: Sequence[Row]) -> list[Row]:
    """The verdicts of finished runs: a run that was killed between its two rows will be made again."""
    done = {(row["arm"], row["seed"]) for row in rows if row.get("status") == "done"}
    return [p for p in problems if (p["arm"], p["seed"]) in done]


def render(
    rows: Sequence[Row],
    problems: Sequence[Row],
    stem: str,
    base: Row | None = None,
    sensitivity: Mapping[str, Sequence[Row]] | None = None,
) -> str:
    """The Markdown between the markers."""
    done, which = [row for row in rows if row.get("status") == "done"], primary_set(problems)
    kept = kept_problems(rows, problems)
    contrasts = analyse(kept, which)
    main = [c for c in contrasts if BY_NAME[c.arm].group == "main"]
    others = [c for c in contrasts if c not in main]
    size = len(next(p["correct"] for p in kept if p["set"] == which))
    hours = sum((row.get("train_seconds") or 0) + (row.get("measure_seconds") or 0) for row in done) / 3600
    parts = [
        f"{len(done)} runs, {size:,} problems ({LABELS.get(which, which)}), {hours:.2f} hours of training and measuring in all.",
        "",
    ]
    failed = [f"{row['arm']} seed {row['seed']}" for row in rows if row.get("status") != "done"]
    parts += [f"Excluded, the loss became non-finite: {', '.join(failed) or 'none'}.", ""]
    for c in main:
        parts += [
            "## Main contrast",
            "",
            sentence(c, which),
            "",
            secondary(done, c.arm, c.reference),
            "",
            seeds_table(c, done, which),
            "",
        ]
        floor = f"the smallest that {len(c.seeds)} seeds allow is {2 / 2 ** len(c.seeds):.4f}"
        parts += [
            f"Sign-flip permutation over seeds: p = {p_text(c.permutation_p)} ({floor}).",
            "",
            paired_table(done, c.arm, c.reference),
            "",
        ]
    for other in sorted({p["set"] for p in kept} - {which}):
        parts += [
            f"{LABELS.get(other, other)}, described without a verdict: {c.arm} minus {c.reference} {points(c.test.mean)} points "
            f"(t interval {points(c.test.low)} to {points(c.test.high)}) over {len(c.seeds)} seeds.\n"
            for c in analyse(kept, other)
            if BY_NAME[c.arm].group == "main"
        ]
    parts += [f"![accuracy differences]({stem}_accuracy.png)", ""]
    if others:
        found = [c.arm for c in others if c.differs]
        verdict = (
            f"a difference after Holm's correction in {', '.join(found)}" if found else "no difference found in any"
        )
        parts += ["## Ablations", "", f"{len(others)} contrasts: {verdict}.", ""]
        parts += [ablation_table(others), ""]
    if sensitivity:
        parts += [
            "## Sensitivity",
            "",
            "The main contrast again, described without a verdict; in brackets 95 % t intervals.",
            "",
        ]
        parts += [sensitivity_table({"as above": rows, **sensitivity}), ""]
    parts += [
        "## All figures",
        "",
        arms_table(done, base),
        "",
        "## Effective ranks over training",
        "",
        rank_table(done),
        "",
    ]
    files = [
        f"{stem}_rows.jsonl",
        f"{stem}_problems.jsonl",
        f"{stem}_setup.json",
        *([f"{stem}_sensitivity.jsonl"] if sensitivity else []),
    ]
    raw = ", ".join(f"[{name}]({name})" for name in files)
    return "\n".join([*parts, f"![training]({stem}_training.png)", "", f"Raw: {raw}."])


def overrides_of(folder: Path) -> str:
    """What names a study that is described beside another."""
    if not all((folder / name).is_file() for name in (SETUP, RUNS)):
        raise StudyError(
            f"--sensitivity {folder} has no {SETUP} or no {RUNS}, so no study was run there. Give the --output of `study.py run`."
        )
    overrides = json.loads((folder / SETUP).read_text(encoding="utf-8"))["overrides"]
    return " ".join(word.removeprefix("--") for word in overrides) or folder.name


def write_report(output: Path, page: Path, sensitivity: Sequence[Path] = ()) -> list[Path]:
    """Fills the page between its markers (a page without them, or none, is refused or made), with plots and rows beside it.

    `sensitivity`: folders of studies that differ in an override, whose main contrast is described beside.
    """
    rows = list({(row["arm"], row["seed"]): row for row in read_jsonl(output / RUNS)}.values())
    problems = list({(row["arm"], row["seed"], row["set"]): row for row in read_jsonl(output / PROBLEMS)}.values())
    if not rows:
        raise StudyError(f"{output / RUNS} holds no rows. Run the study, or collect its runs, first.")
    text = page.read_text(encoding="utf-8") if page.is_file() else EMPTY_PAGE
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise StudyError(f"{page} lacks the markers. Put these two lines where the report goes:\n{BEGIN}\n{END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    base = json.loads((output / BASE).read_text(encoding="utf-8"))["row"] if (output / BASE).is_file() else None
    others = {overrides_of(folder): read_jsonl(folder / RUNS) for folder in sensitivity}
    body = render(rows, problems, page.stem, base, others)
    plots = [page.with_name(f"{page.stem}_{name}.png") for name in ("accuracy", "training")]
    kept = kept_problems(rows, problems)
    draw_contrasts(analyse(kept), primary_set(kept), plots[0])
    draw_curves([row for row in rows if row.get("status") == "done"], plots[1])
    raw = []
    for name, table_ in (("rows", rows), ("problems", kept)):  # all that the verdicts need
        raw.append(page.with_name(f"{page.stem}_{name}.jsonl"))
        write_text(
            raw[-1],
            "".join(json.dumps(row) + "\n" for row in sorted(table_, key=lambda row: (row["arm"], row["seed"]))),
        )
    if others:
        raw.append(page.with_name(f"{page.stem}_sensitivity.jsonl"))
        write_text(
            raw[-1], "".join(json.dumps({"study": name, **row}) + "\n" for name, each in others.items() for row in each)
        )
    setup = output / SETUP
    found = {"setup": json.loads(setup.read_text(encoding="utf-8")) if setup.is_file() else None, "base": base}
    raw.append(page.with_name(f"{page.stem}_setup.json"))
    write_text(raw[-1], json.dumps(found, indent=1) + "\n")
    write_text(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")
    return [page, *plots, *raw]
