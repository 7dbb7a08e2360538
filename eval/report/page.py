"""The report of one run, OUT/<name>.html: one file without scripts or network, and with answers to read, the wrong ones
and the right ones: a false positive is found nowhere else.

The layout is in page.html.j2; here is what it shows. Jinja escapes every value, and `visible` spells out every
character that could hide or rearrange text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from matrix_llm.base.files import write_text

from ..grader.answers import Verdict
from ..text import percent, visible
from .scores import Row
from .table import HEAD, SAMPLES_HEAD, explain_missing, interval, sample_rows, score_cells

SHOWN_WRONG = 500  # wrong answers of one kind on the page
SHOWN_RIGHT = 200  # right ones of one kind
SHOWN_CHARACTERS = 20_000  # of one response
SHOWN_ANSWER = 200  # characters of an answer in a heading
PLAIN_REASONS = ("", "unequal", "no answer found")  # what the headings say already


def write_report(
    path: str | os.PathLike[str],
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    graded: Mapping[str, Sequence[Verdict]],
) -> None:
    """Writes the page: scores, a chart with intervals, the settings, and the answers.

    Args:
        summary: of `eval.report.scores.summarise`.
        rows: the generations it was made from.
        graded: their verdicts, of `eval.report.scores.grade_rows`.
    """
    groups = {field.replace("_", " "): summary.get(field) for field in ("by_subject", "by_level")}
    page = _template().render(
        title=f"{summary.get('name', summary['benchmark'])}: {summary.get('model') or 'unnamed model'}",
        summary=summary,
        default=summary["scores"][summary["convention"]],
        head=HEAD,
        notes=explain_missing(summary["scores"], summary["benchmark"]),
        sections={name: scores for name, scores in groups.items() if scores} or {"by convention": summary["scores"]},
        samples_head=SAMPLES_HEAD,
        samples={name: (percent(share), interval(*ends)) for name, share, *ends in sample_rows(summary)},
        facts=_facts(summary),
        answers=_answers(
            list(zip(rows, graded[summary["convention"]], strict=True)), summary["samples_per_problem"] > 1
        ),
        percent=percent,
        cells=lambda groups: {name: score_cells(scores) for name, scores in groups.items()},
        draw=_draw,
    )
    write_text(path, page)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_show,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2")


def _show(value: Any) -> Any:
    """What Jinja writes for a value, before it escapes it. Markup is what its own macros return."""
    return value if isinstance(value, Markup) else visible(str(value))


def _facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    speed = summary.get("tokens_per_second")
    return {
        "model": summary.get("model"),
        "problems": summary["problems"],
        "samples of each": summary["samples_per_problem"],
        "cut at max_tokens": summary["truncated"],
        "ended by a stop string": summary["stop_hits"],
        "prompt tokens": summary["prompt_tokens"],
        "generated tokens": summary["generated_tokens"],
        "wall time": f"{summary['wall_seconds']:.1f} s" + (f", {speed:.0f} tokens/s" if speed else ""),
        **{f"setting: {name}": value for name, value in summary["settings"].items() if name != "model"},
        **{f"version: {name}": value for name, value in summary["versions"].items()},
    }


# --- answers ----------------------------------------------------------------------------------------------------------

Graded = tuple[Row, Verdict]


@dataclass(frozen=True)
class Answer:
    """A response and its verdict, as the page shows them."""

    id: str
    """Id of the problem, and the number of the sample where there are several."""
    answer: str | None
    """None: no answer was found in the response."""
    gold: str
    """The right answer."""
    notes: str
    """Subject, level, and why the verdict is what it is; "" without any."""
    problem: str
    """The question."""
    response: str
    """The response, cut in the middle if it is very long."""


@dataclass(frozen=True)
class Group:
    """Answers of one kind, under a heading that opens and closes."""

    title: str
    """What they have in common."""
    total: int
    """How many there are."""
    shown: list[Answer]
    """The first of them."""


def _answers(graded: Sequence[Graded], several: bool) -> dict[str, list[Group]]:
    """{"Wrong answers", "Right answers": groups}; of right ones, those that are not the gold as written come first."""
    wrong = [pair for pair in graded if pair[1].correct is not True]
    right = [pair for pair in graded if pair[1].correct is True]
    kinds = {
        "Wrong answers": {
            "Another answer than the gold": [pair for pair in wrong if pair[1].correct is False and _has_answer(pair)],
            "No answer found": [pair for pair in wrong if pair[1].correct is False and not _has_answer(pair)],
            "Ungraded, counted as wrong": [pair for pair in wrong if pair[1].correct is None],
        },
        "Right answers": {
            "Not written as the gold is": [pair for pair in right if not _is_gold(pair)],
            "The gold as written": [pair for pair in right if _is_gold(pair)],
        },
    }
    limits = {"Wrong answers": SHOWN_WRONG, "Right answers": SHOWN_RIGHT}
    return {
        title: [
            Group(kind, len(pairs), [_describe(*pair, several) for pair in pairs[: limits[title]]])
            for kind, pairs in groups.items()
            if pairs
        ]
        for title, groups in kinds.items()
    }


def _has_answer(pair: Graded) -> bool:
    return pair[1].extracted is not None


def _is_gold(pair: Graded) -> bool:
    return pair[1].extracted is not None and pair[1].extracted.strip() == str(pair[0]["gold"]).strip()


def _describe(row: Row, verdict: Verdict, several: bool) -> Answer:
    notes = [
        str(row["subject"]) if row.get("subject") else None,
        f"level {row['level']}" if row.get("level") is not None else None,
        f"ungraded: {verdict.reason or 'a limit was hit'}" if verdict.correct is None else None,
        verdict.reason if verdict.correct is False and verdict.reason not in PLAIN_REASONS else None,
        "cut at max_tokens" if row.get("finish_reason") == "length" else None,
    ]
    return Answer(
        id=f"{row['id']}, sample {row['sample']}" if several else row["id"],
        answer=None if verdict.extracted is None else _cut(verdict.extracted),
        gold=_cut(row["gold"]),
        notes=", ".join(filter(None, notes)),
        problem=row["problem"],
        response=_cut_in_the_middle(row["response"]),
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_ANSWER else text[:SHOWN_ANSWER] + "…"


def _cut_in_the_middle(text: str) -> str:
    """The start and the end of a very long response: the answer is at the end."""
    half = SHOWN_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


# --- the chart --------------------------------------------------------------------------------------------------------

STEP, TOP = 42, 6  # height of one bar with its label, and the place of the first, in pixels
LABEL = 30  # characters of a bar's name


@dataclass(frozen=True)
class Bar:
    """One bar under its label. Shares are in percent of the chart's width, so that text keeps its size at any width."""

    label: str
    """Name of the group of problems."""
    top: int
    """Upper edge in pixels."""
    share: float
    """The accuracy."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    count: str
    """The accuracy in words."""


@dataclass(frozen=True)
class Chart:
    bars: list[Bar]
    """From top to bottom."""
    bottom: int
    """Lower edge in pixels."""
    ticks: tuple[tuple[int, str], ...] = ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end"))
    """Marks in percent, and which part of the label stands there."""


def _draw(groups: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Horizontal bars from 0 to 100 %, each with a whisker for the interval, below its name and its count."""
    bars = [
        Bar(
            label=name if len(name) <= LABEL else name[: LABEL - 1] + "…",
            top=TOP + STEP * row,
            share=100 * scores["accuracy"],
            low=100 * scores["low"],
            high=100 * scores["high"],
            count=f"{percent(scores['accuracy'])} of {scores['total']}",
        )
        for row, (name, scores) in enumerate(groups.items())
    ]
    return Chart(bars, bottom=TOP + STEP * len(bars))
