"""Write the report of a study: a page between its markers, with plots and raw rows next to it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study.analysis import Contrast, Row, analyse, primary_set
from benchmarks.study.design import StudyError
from benchmarks.study.folder import BASE, PROBLEMS, RUNS, SETUP
from benchmarks.study.limits import equality_sentence, readings_table, rise_table
from benchmarks.study.plots import draw_contrasts, draw_curves
from benchmarks.study.tables import (
    LABELS,
    ablation_table,
    arms_table,
    describe,
    describe_likelihood,
    p_text,
    paired_table,
    points,
    rank_table,
    seeds_table,
    sensitivity_table,
)
from matrix_llm.base.files import read_jsonl, write_text

BEGIN, END = "<!-- study: begin, written by benchmarks/study.py report -->", "<!-- study: end -->"
EMPTY_PAGE = f"# Does matrix cross-entropy help?\n\n{BEGIN}\n{END}\n"


def write_report(output: Path, page: Path, sensitivity: Sequence[Path] = ()) -> list[Path]:
    """Fill the page between its markers and return every file that was written. A page that does not exist is created.

    Args:
        output: folder of the study. sensitivity: folders of studies that differ in an override; their main contrast
        is described without a verdict.

    Raises:
        StudyError: no rows yet, a page without the markers, or a `sensitivity` folder without a study.
    """
    # 1. Read everything before anything is written.
    rows = last_rows(output / RUNS, ("arm", "seed"))
    if not rows:
        raise StudyError(f"{output / RUNS} holds no rows. Run the study, or collect its runs, first.")
    problems = kept_problems(rows, last_rows(output / PROBLEMS, ("arm", "seed", "set")))
    text = page.read_text(encoding="utf-8") if page.is_file() else EMPTY_PAGE
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise StudyError(f"{page} lacks the markers. Put these two lines where the report goes:\n{BEGIN}\n{END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    base = json.loads((output / BASE).read_text(encoding="utf-8"))["row"] if (output / BASE).is_file() else None
    setup = json.loads((output / SETUP).read_text(encoding="utf-8")) if (output / SETUP).is_file() else None
    others = {study_name(folder): read_jsonl(folder / RUNS) for folder in sensitivity}
    body = render(rows, problems, page.stem, base, others)

    # 2. Plots.
    accuracy, training = (page.with_name(f"{page.stem}_{name}.png") for name in ("accuracy", "training"))
    draw_contrasts(analyse(problems), primary_set(problems), accuracy)
    draw_curves([row for row in rows if row.get("status") == "done"], training)

    # 3. All that the verdicts need, then the page, which links to it.
    raw = {
        "rows.jsonl": jsonl(sorted_rows(rows)),
        "problems.jsonl": jsonl(sorted_rows(problems)),
        "setup.json": json.dumps({"setup": setup, "base": base}, indent=1) + "\n",
    }
    if others:
        raw["sensitivity.jsonl"] = jsonl([{"study": name, **row} for name, each in others.items() for row in each])
    written = [page, accuracy, training]
    for name, content in raw.items():
        written.append(page.with_name(f"{page.stem}_{name}"))
        write_text(written[-1], content)
    write_text(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")
    return written


def last_rows(path: Path, key: Sequence[str]) -> list[Row]:
    """The rows of a file; of several with the same key the last."""
    return list({tuple(row[name] for name in key): row for row in read_jsonl(path)}.values())


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["arm"], row["seed"]))


def jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def kept_problems(rows: Sequence[Row], problems: Sequence[Row]) -> list[Row]:
    """The verdicts of finished runs. A run that was killed between its two rows will be made again."""
    done = {(row["arm"], row["seed"]) for row in rows if row.get("status") == "done"}
    return [row for row in problems if (row["arm"], row["seed"]) in done]


def study_name(folder: Path) -> str:
    """The overrides of a study, which tell it from the one it is compared with."""
    if not all((folder / name).is_file() for name in (SETUP, RUNS)):
        raise StudyError(
            f"--sensitivity {folder} has no {SETUP} or no {RUNS}, so no study was run there. "
            "Give the --output of a `study.py run`."
        )
    overrides = json.loads((folder / SETUP).read_text(encoding="utf-8"))["overrides"]
    return " ".join(word.removeprefix("--") for word in overrides) or folder.name


def render(
    rows: Sequence[Row],
    problems: Sequence[Row],
    stem: str,
    base: Row | None = None,
    sensitivity: Mapping[str, Sequence[Row]] | None = None,
) -> str:
    """The Markdown between the markers.

    Args:
        stem: name of the page without its suffix, with which the names of its plots and raw files begin.
    """
    done, problems = [row for row in rows if row.get("status") == "done"], kept_problems(rows, problems)
    which = primary_set(problems)
    contrasts = analyse(problems, which)
    blocks = summary(rows, problems, which)
    for contrast in contrasts:
        if contrast.is_main:
            blocks += main_section(contrast, done, which)
            blocks += limits_section(contrast, done, which)
    blocks += other_sets(problems, which)
    blocks += [f"![accuracy differences]({stem}_accuracy.png)"]
    blocks += ablation_section([contrast for contrast in contrasts if not contrast.is_main])
    if sensitivity:
        blocks += [
            "## Sensitivity",
            "The main contrast again, described without a verdict; in brackets 95 % t intervals.",
            sensitivity_table({"as above": rows, **sensitivity}),
        ]
    blocks += ["## All figures", arms_table(done, base), "## Effective ranks over training", rank_table(done)]
    blocks += [f"![training]({stem}_training.png)"]
    names = ["rows.jsonl", "problems.jsonl", "setup.json", *(["sensitivity.jsonl"] if sensitivity else [])]
    blocks += [f"Raw: {', '.join(f'[{stem}_{name}]({stem}_{name})' for name in names)}."]
    return "\n\n".join(blocks)


def summary(rows: Sequence[Row], problems: Sequence[Row], which: str) -> list[str]:
    done = [row for row in rows if row.get("status") == "done"]
    failed = [f"{row['arm']} seed {row['seed']}" for row in rows if row.get("status") != "done"]
    size = len(next(row["correct"] for row in problems if row["set"] == which))
    hours = sum((row.get("train_seconds") or 0) + (row.get("measure_seconds") or 0) for row in done) / 3600
    return [
        f"{len(done)} runs, {size:,} problems ({LABELS.get(which, which)}), "
        f"{hours:.2f} hours of training and measuring in all.",
        f"Excluded, the loss became non-finite: {', '.join(failed) or 'none'}.",
    ]


def main_section(contrast: Contrast, done: Sequence[Row], which: str) -> list[str]:
    floor = f"the smallest that {len(contrast.seeds)} seeds allow is {2 / 2 ** len(contrast.seeds):.4f}"
    return [
        "## Main contrast",
        describe(contrast, which),
        describe_likelihood(done, contrast.arm, contrast.reference),
        seeds_table(contrast, done, which),
        f"Sign-flip permutation over seeds: p = {p_text(contrast.permutation_p)} ({floor}).",
        paired_table(done, contrast.arm, contrast.reference),
    ]


def limits_section(contrast: Contrast, done: Sequence[Row], which: str) -> list[str]:
    """What stands against the verdict: the loss at the start, and the gains that could have been missed."""
    return [
        "## What this contrast could have found",
        "Training CE at the start of the fine-tuning and after, of every arm:",
        rise_table(done),
        "The paper's gain, 69.2 to 72.3 %, at this accuracy, and the probability of finding it from the observed "
        "spread over seeds:",
        readings_table(contrast, done, which),
        equality_sentence(contrast),
    ]


def other_sets(problems: Sequence[Row], which: str) -> list[str]:
    """The main contrast on the problem sets that decide nothing."""
    return [
        f"{LABELS.get(other, other)}, described without a verdict: {c.arm} minus {c.reference} {points(c.test.mean)} "
        f"points (t interval {points(c.test.low)} to {points(c.test.high)}) over {len(c.seeds)} seeds."
        for other in sorted({row["set"] for row in problems} - {which})
        for c in analyse(problems, other)
        if c.is_main
    ]


def ablation_section(contrasts: Sequence[Contrast]) -> list[str]:
    if not contrasts:
        return []
    found = [contrast.arm for contrast in contrasts if contrast.differs]
    verdict = "no difference found in any"
    if found:
        verdict = f"a difference after Holm's correction in {', '.join(found)}"
    return ["## Ablations", f"{len(contrasts)} contrasts: {verdict}.", ablation_table(contrasts)]
