"""The report of one run, OUT/<name>.html: one file without scripts or network, and with the wrong answers to read.

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

from ..grader.answers import extract_answer
from ..text import percent, visible
from .scores import Row, places_by_problem
from .table import HEAD, score_cells

SHOWN_WRONG = 500  # wrong answers on the page
SHOWN_CHARACTERS = 20_000  # of one response
SHOWN_ANSWER = 200  # characters of an answer in a heading


def write_report(path: str | os.PathLike[str], summary: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes the page: scores, a chart with intervals, the settings, and the wrong answers.

    Args:
        summary: of `eval.report.scores.summarise`.
        rows: the generations it was made from.
    """
    wrong = [row for row in _first_samples(rows) if summary["verdicts"].get(row["id"], True) is not True]
    groups = {field.replace("_", " "): summary.get(field) for field in ("by_subject", "by_level")}
    page = _template().render(
        title=f"{summary.get('name', summary['benchmark'])}: {summary.get('model') or 'unnamed model'}",
        summary=summary,
        default=summary["scores"][summary["convention"]],
        head=HEAD,
        sections={name: scores for name, scores in groups.items() if scores} or {"by convention": summary["scores"]},
        facts=_facts(summary),
        wrong=[_describe_wrong(row, summary) for row in wrong[:SHOWN_WRONG]],
        wrong_total=len(wrong),
        percent=percent,
        score_cells=score_cells,
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


def _first_samples(rows: Sequence[Row]) -> list[Row]:
    return [rows[places[0]] for places in places_by_problem(rows).values()]


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


# --- wrong answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongAnswer:
    """Sample 0 of a problem that it did not solve, as the page shows it."""

    id: str
    """Id of the problem."""
    answer: str | None
    """None: no answer was found in the response."""
    gold: str
    """The right answer."""
    notes: str
    """Level, and why an answer may be missing; "" without any."""
    problem: str
    """The question."""
    response: str
    """The response, cut in the middle if it is very long."""


def _describe_wrong(row: Row, summary: Mapping[str, Any]) -> WrongAnswer:
    answer = extract_answer(row["response"], convention=summary["convention"], benchmark=summary["benchmark"])
    notes = [
        str(row["subject"]) if row.get("subject") else None,
        f"level {row['level']}" if row.get("level") is not None else None,
        "ungraded: a limit was hit" if summary["verdicts"][row["id"]] is None else None,
        "cut at max_tokens" if row.get("finish_reason") == "length" else None,
    ]
    return WrongAnswer(
        id=row["id"],
        answer=None if answer is None else _cut(answer),
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

LEFT, WIDTH = 190, 420  # position of 0 %, and distance from there to 100 %, in pixels
TOP, STEP = 8, 28  # where the first bar begins, and the distance to the next
LABEL = 26  # characters of a bar's name


@dataclass(frozen=True)
class Tick:
    x: float
    """Place in pixels."""
    label: str
    """The percentage that it marks."""


@dataclass(frozen=True)
class Bar:
    """One horizontal bar, in pixels: its middle line, its width, the ends of its interval."""

    label: str
    """Name of the group of problems."""
    y: float
    """Its middle line."""
    width: float
    """Its length, for the accuracy."""
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
    ticks: tuple[Tick, ...] = tuple(Tick(LEFT + WIDTH * share / 100, f"{share} %") for share in range(0, 101, 25))
    """Marks every 25 %."""
    top: int = TOP
    """Upper edge in pixels."""
    left: int = LEFT
    """Place of 0 % in pixels."""
    right: int = LEFT + WIDTH
    """Place of 100 % in pixels."""


def _draw(groups: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Horizontal bars from 0 to 100 %, each with a whisker for the interval and the count at the right."""
    bars = [
        Bar(
            label=name if len(name) <= LABEL else name[: LABEL - 1] + "…",
            y=TOP + STEP * row + STEP / 2,
            width=WIDTH * scores["accuracy"],
            low=LEFT + WIDTH * scores["low"],
            high=LEFT + WIDTH * scores["high"],
            count=f"{percent(scores['accuracy'])} of {scores['total']}",
        )
        for row, (name, scores) in enumerate(groups.items())
    ]
    return Chart(bars, bottom=TOP + STEP * len(bars))
