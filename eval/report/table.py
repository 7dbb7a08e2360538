"""Scores as Markdown for the terminal, padded so that it also reads as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..text import percent, visible

HEAD = ("accuracy", "95 % interval", "correct", "no answer found", "ungraded")


def score_table(summary: Mapping[str, Any]) -> str:
    """The scores of a summary: by convention, by subject and level, and of several samples."""
    # 1. what was measured
    facts = [
        f"{summary['problems']} problems, samples of each: {summary['samples_per_problem']}",
        f"cut at max_tokens: {summary['truncated']}",
    ]
    if summary["samples_per_problem"] > 1:
        facts.append("interval and counts are of sample 0")
    name = visible(str(summary.get("name", summary["benchmark"])))

    # 2. the tables
    lines = [f"{name}: {'; '.join(facts)}", "", *score_lines(summary["scores"])]
    for field in ("by_subject", "by_level"):
        if summary.get(field):
            lines += ["", *score_lines(summary[field], f"{field.replace('_', ' ')} ({summary['convention']})")]

    # 3. several samples
    if summary.get("pass_at_k"):
        majority = summary["majority"]
        shares = ", ".join(f"pass@{k} {percent(share)}" for k, share in summary["pass_at_k"].items())
        vote = f"majority of {majority['k']} {percent(majority['accuracy'])}"
        lines += ["", f"{shares}; {vote} ({summary['convention']})"]
    return "\n".join(lines)


def score_lines(scores: Mapping[str, Mapping[str, Any]], title: str = "convention") -> list[str]:
    """A Markdown table of {name: scores as `eval.report.scores.score` returns them}, one line each."""
    return _align((title, *HEAD), [(visible(name), *score_cells(each)) for name, each in scores.items()])


def score_cells(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells under HEAD."""
    return (
        percent(scores["accuracy"]),
        f"{100 * scores['low']:.1f} to {100 * scores['high']:.1f}",
        f"{scores['correct']} / {scores['total']}",
        str(scores["extraction_failures"]),
        str(scores["ungraded"]),
    )


def _align(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, numbers to the right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]
