"""Write the page of the study from whatever rows there are: an interim report concludes nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.output import markdown_table
from benchmarks.pretrained_study.analysis import Contrast, Verdicts, choose_rates, described, judge, travel_cosines
from benchmarks.pretrained_study.design import DETECTABLE, MARGIN, RATES, make_arms
from benchmarks.pretrained_study.folder import RUNS, TUNING
from benchmarks.study.analysis import Row
from benchmarks.study.design import StudyError
from benchmarks.study.report import jsonl, last_rows, sorted_rows
from benchmarks.study.tables import p_text
from matrix_llm.base.files import write_text

BEGIN, END = "<!-- pretrained study: begin, written by its report -->", "<!-- pretrained study: end -->"
EMPTY_PAGE = f"# Does matrix cross-entropy help a pretrained model?\n\n{BEGIN}\n{END}\n"
DESCRIBED = {
    "ce_math": "CE a token, MATH (nats)",
    "numbers_exact": 'numbers after "=" right, teacher-forced (share)',
    "accuracy_gsm8k": "greedy accuracy, GSM8K (share)",
    "accuracy_generated": "greedy accuracy, generated problems (share)",
    "rank_head": "effective rank, LM head",
    "rank_hidden": "effective rank, last hidden states",
    "grad_norm": "gradient norm before clipping",
    "clipped": "steps that were clipped (share)",
    "train_seconds": "training (s)",
}


def write_report(output: Path, page: Path) -> list[Path]:
    """Fill the page between its markers, with the raw rows next to it. A page that does not exist is created.

    Raises:
        StudyError: no rows at all, or a page without the markers.
    """
    rows = last_rows(output / RUNS, ("arm", "seed"))
    tuning = last_rows(output / TUNING, ("arm", "seed", "rate"))
    if not rows and not tuning:
        raise StudyError(f"{output} holds no rows yet. Run `pretrained_study.py tune` first.")
    text = page.read_text(encoding="utf-8") if page.is_file() else EMPTY_PAGE
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise StudyError(f"{page} lacks the markers. Put these two lines where the report goes:\n{BEGIN}\n{END}")
    sketches = {}
    for row in rows:
        if (file := output / "runs" / f"{row['arm']}-s{row['seed']}.npy").is_file():
            sketches[row["arm"], row["seed"]] = np.load(file, allow_pickle=False)
    cosines = travel_cosines(sketches)
    body = "\n\n".join([*render(rows, tuning), *travel_section(cosines), f"Raw: {_links(page)}."])
    written = [page.with_name(f"{page.stem}_{name}.jsonl") for name in ("rows", "tuning")]
    write_text(written[0], jsonl(sorted_rows(rows)))
    write_text(written[1], jsonl(sorted_rows(tuning)))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")
    return [page, *written]


def _links(page: Path) -> str:
    return ", ".join(f"[{page.stem}_{name}.jsonl]({page.stem}_{name}.jsonl)" for name in ("rows", "tuning"))


def render(rows: Sequence[Row], tuning: Sequence[Row]) -> list[str]:
    """The blocks between the markers."""
    blocks = [*status(rows, tuning), *tuning_section(tuning)]
    if not rows:
        return blocks
    verdicts = judge(rows)
    blocks += ["## Verdict", headline(verdicts)]
    found = [c for c in (verdicts.primary, verdicts.control, *verdicts.secondary) if c]
    if found:
        blocks += ["Held-out CE a token, paired over seeds:", contrast_table(found)]
    if verdicts.primary:
        tests = described(rows, "mce", "ce", list(DESCRIBED))
        lines = [
            [DESCRIBED[name], f"{t.mean:+.4f}", f"{t.low:+.4f} to {t.high:+.4f}", str(t.seeds)]
            for name, t in tests.items()
        ]
        blocks += ["mce minus ce, described without a verdict:", markdown_table(["", "mean", "95 %", "seeds"], lines)]
    blocks += ["## All arms", arms_table(rows), *gradient_section(rows)]
    return blocks


def status(rows: Sequence[Row], tuning: Sequence[Row]) -> list[str]:
    every = [*rows, *tuning]
    hours = sum((row.get("train_seconds") or 0) + (row.get("measure_seconds") or 0) for row in every) / 3600
    return [f"{len(tuning)} tuning runs and {len(rows)} runs, {hours:.2f} hours of training and measuring."]


def headline(verdicts: Verdicts) -> str:
    """One paragraph: void, interim, or the answer."""
    if verdicts.void:
        return f"**The study is void**: {'; '.join(verdicts.void)}. Nothing is concluded from its other figures."
    primary = verdicts.primary
    if not verdicts.complete or primary is None:
        have = len(primary.seeds) if primary else 0
        wanted = verdicts.wanted_seeds or "an open number (the pilot is not complete)"
        return f"**Interim**: {have} of {wanted} seeds of mce and ce. Nothing is concluded before all are there."
    figures = f"{describe(primary)} The positive control was found: {describe(verdicts.control)}"
    if primary.differs:
        way = "lowers" if primary.test.mean < 0 else "raises"
        small = " (and by TOST the difference is within the margin)" if primary.equal.equal else ""
        return f"**MCE {way} held-out CE{small}**. {figures}"
    if primary.equal.equal:
        return f"**MCE makes no difference larger than {100 * MARGIN:.1f} % of held-out CE**. {figures}"
    return f"**No difference found, and equality not shown**. {figures}"


def describe(c: Contrast | None) -> str:
    if c is None:
        return ""
    low, high = c.detectable_range
    return (
        f"{c.arm} minus {c.reference} {c.test.mean:+.5f} nats ({c.test.low:+.5f} to {c.test.high:+.5f}), "
        f"{_percent(c, c.test.mean)} of {c.reference_ce:.4f}, p = {p_text(c.test.p)}, {len(c.seeds)} seeds; "
        f"detectable {c.detectable:.5f} ({low:.5f} to {high:.5f}); TOST p = {p_text(c.equal.p)}."
    )


def _percent(c: Contrast, value: float) -> str:
    return f"{100 * value / c.reference_ce:+.2f} %"


def contrast_table(found: Sequence[Contrast]) -> str:
    lines = []
    for c in found:
        limits = " to ".join(_percent(c, end).removeprefix("+") for end in c.detectable_range)
        lines.append(
            [
                f"{c.arm} - {c.reference}",
                str(len(c.seeds)),
                f"{c.test.mean:+.5f} ({_percent(c, c.test.mean)})",
                f"{c.test.low:+.5f} to {c.test.high:+.5f}",
                p_text(c.test.p),
                p_text(c.adjusted_p),
                p_text(c.permutation_p),
                f"{_percent(c, c.detectable).removeprefix('+')} ({limits})",
                f"{p_text(c.equal.p)}{', equal' if c.equal.equal else ''}",
            ]
        )
    header = ["contrast", "seeds", "nats", "95 % t interval", "p", "Holm p", "sign flip p"]
    return markdown_table([*header, f"detectable (aim {100 * DETECTABLE:.1f} %)", "TOST p"], lines)


def tuning_section(tuning: Sequence[Row]) -> list[str]:
    """Mean held-out CE of every arm at every rate; refused rates in brackets."""
    if not tuning:
        return []
    try:
        rates = choose_rates(tuning)
    except StudyError:
        rates = {}
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in tuning):
        cells = []
        for rate in RATES:
            of_rate = [row for row in tuning if row["arm"] == arm and row["rate"] == rate]
            values = [row["ce_tuning_heldout"] for row in of_rate if row["status"] == "done"]
            refused = any(row["status"] != "done" or row["rises"] for row in of_rate)
            mean = f"{np.mean(values):.4f}" if values else ""
            cells.append(f"({mean})" if refused else f"**{mean}**" if rates.get(arm) == rate else mean)
        lines.append([arm, *cells])
    table = markdown_table(["arm", *(f"{rate:g}" for rate in RATES)], lines)
    said = "CE a token on the tuning rows, by rate; in brackets: refused, since training CE rises above the base's."
    return ["## Rates", said, table]


def arms_table(rows: Sequence[Row]) -> str:
    lines = []
    for arm in make_arms(1):
        own = [row for row in rows if row["arm"] == arm.name and row["status"] == "done"]
        if not own:
            continue
        cells = []
        for metric in ("ce_heldout", *DESCRIBED):
            values = [row[metric] for row in own if row.get(metric) is not None]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}" if values else "")
        rates = ", ".join(sorted({f"{row['rate']:g}" for row in own if "rate" in row}))
        lines.append([arm.name, arm.description, rates, str(len(own)), *cells])
    return markdown_table(["arm", "what", "rate", "seeds", "held-out CE", *DESCRIBED.values()], lines)


def gradient_section(rows: Sequence[Row]) -> list[str]:
    """The cosine of each arm's gradient with CE's, over training, means over seeds."""
    lines = []
    for arm in make_arms(1):
        curves = [row["curve_gradient"] for row in rows if row["arm"] == arm.name and row.get("curve_gradient")]
        if not curves or arm.group == "control" or arm.name == "ce":
            continue
        for place in range(min(map(len, curves))):
            points = [curve[place] for curve in curves]
            names = ("cosine_hidden", "ratio_hidden", "cosine_head", "ratio_head")
            means = [f"{np.mean([point[name] for point in points]):.4f}" for name in names]
            lines.append([arm.name, f"{points[0]['step']:.0f}", *means])
    if not lines:
        return []
    header = ["arm", "step", "cosine, hidden states", "norm / CE's", "cosine, LM head", "norm / CE's"]
    return ["The gradient of each loss next to CE's, on the same held-out rows:", markdown_table(header, lines)]


def travel_section(cosines: dict[str, float]) -> list[str]:
    if not cosines:
        return []
    lines = [[name, f"{value:.4f}"] for name, value in cosines.items()]
    said = "Where the weights went: mean cosine of the differences from the base, of two runs:"
    return [said, markdown_table(["runs", "cosine"], lines)]
