"""Scores as Markdown for the terminal, padded so that it also reads as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..grader.answers import looks_for
from ..text import percent, visible

HEAD = ("accuracy", "95 % interval", "correct", "no answer found", "ungraded")
SAMPLES_HEAD = ("share", "95 % interval")
DEFINITION = (
    "accuracy: mean over problems of the share of samples that are right; interval: clustered by problem; "
    "counts: of samples"
)


def score_table(summary: Mapping[str, Any]) -> str:
    """The scores of a summary: by convention, by subject and level, and of several samples."""
    # 1. what was measured
    facts = [
        f"{summary['problems']} problems, samples of each: {summary['samples_per_problem']}",
        f"cut at max_tokens: {summary['truncated']}",
    ]
    lines = [f"{visible(str(summary.get('name', summary['benchmark'])))}: {'; '.join(facts)}"]
    if summary["samples_per_problem"] > 1:
        lines.append(DEFINITION)

    # 2. the tables
    lines += ["", *convention_lines(summary["scores"], summary["benchmark"])]
    for field in ("by_subject", "by_level"):
        if summary.get(field):
            lines += ["", *score_lines(summary[field], f"{field.replace('_', ' ')} ({summary['convention']})")]
    lines += sample_lines(summary, summary["convention"])
    return "\n".join(lines)


def convention_lines(scores: Mapping[str, Mapping[str, Any]], benchmark: str) -> list[str]:
    """The table by convention, and why some find no answer."""
    notes = explain_missing(scores, benchmark)
    lines = [f"{convention} {note}" for convention, note in notes.items()]
    return [*score_lines(scores), *([""] if lines else []), *lines]


def explain_missing(scores: Mapping[str, Mapping[str, Any]], benchmark: str) -> dict[str, str]:
    """{convention: what it looks for, and how many responses have it} of those that find an answer in less than half
    of the responses: such a score says how the model words its answers.
    """
    notes = {}
    for convention, each in scores.items():
        found = each["samples"] - each["extraction_failures"]
        if 2 * found < each["samples"]:
            notes[convention] = (
                f"looks for {looks_for(convention, benchmark)}; {found} of {each['samples']} responses have it"
            )
    return notes


def sample_lines(scores: Mapping[str, Any], convention: str) -> list[str]:
    """The table of what `eval.report.scores.score_samples` returned, after an empty line; [] if it is not there."""
    rows = [(name, percent(share), interval(low, high)) for name, share, low, high in sample_rows(scores)]
    return ["", *align((f"several samples ({convention})", *SAMPLES_HEAD), rows)] if rows else []


def sample_rows(scores: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """(name, share, ends of its interval) of pass@k for each k, and of the majority vote."""
    if not scores.get("pass_at_k"):
        return []
    ends = scores["pass_at_k_intervals"]
    majority = scores["majority"]
    return [
        *((f"pass@{k}", share, *ends[k]) for k, share in scores["pass_at_k"].items()),
        (f"maj@{majority['k']}", majority["accuracy"], majority["low"], majority["high"]),
    ]


def score_lines(scores: Mapping[str, Mapping[str, Any]], title: str = "convention") -> list[str]:
    """A Markdown table of {name: scores as `eval.report.scores.score` returns them}, one line each."""
    return align((title, *HEAD), [(visible(name), *score_cells(each)) for name, each in scores.items()])


def score_cells(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells under HEAD."""
    return (
        percent(scores["accuracy"]),
        interval(scores["low"], scores["high"]),
        f"{scores['correct']} / {scores['samples']}",
        str(scores["extraction_failures"]),
        str(scores["ungraded"]),
    )


def interval(low: float, high: float) -> str:
    """
    >>> interval(0.6668, 0.7165)
    '66.7 to 71.7'
    """
    return f"{100 * low:.1f} to {100 * high:.1f}"


def align(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, numbers to the right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]
