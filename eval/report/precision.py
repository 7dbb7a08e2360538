"""What a score cannot tell: how wide its interval is, why, and what would narrow it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matrix_llm.base.statistics import clustered_interval

WIDE = 0.05  # an interval wider than this is remarked on


def precision_notes(summary: Mapping[str, Any]) -> list[str]:
    """Lines to print below the table of a run, whose summary may hold `templates`; [] where nothing is to be said."""
    found, templates = summary["scores"][summary["convention"]], summary.get("templates")
    notes = []
    if templates is not None:
        notes.append(
            f"{summary['problems']:,} problems are made from {templates['templates']:,} templates, and problems of one "
            f"template resemble each other: clustered by template, the 95 % interval is {100 * templates['low']:.1f} "
            f"to {100 * templates['high']:.1f}"
        )
        found = templates
    width = found["high"] - found["low"]
    if width > WIDE:
        shares = list(shares_by_problem(summary).values())
        notes.append(_width_note(width, shares, summary["samples_per_problem"], templates))
    return notes


def template_score(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The accuracy over templates, each with the mean of its problems, and the interval clustered by template; None
    where the problems are made from none.

    Args:
        summary: of a run, as `eval.report.scores.summarise` returns it.
        rows: its generations; those of problems of a template name it.
    """
    problems: dict[str, list[float]] = {}
    named = {row["id"]: str(row["template"]) for row in rows if row.get("template") is not None}
    if not named:
        return None
    for problem, share in shares_by_problem(summary).items():
        problems.setdefault(named.get(problem, f"problem {problem}"), []).append(share)
    means = [math.fsum(each) / len(each) for each in problems.values()]
    low, high = clustered_interval(means, [len(each) for each in problems.values()])
    return {"templates": len(problems), "accuracy": math.fsum(means) / len(means), "low": low, "high": high}


def shares_by_problem(summary: Mapping[str, Any]) -> dict[str, float]:
    """{problem id: share of its samples that are right} of the summary's own convention."""
    shares = {}
    for problem, correct in summary["verdicts"].items():
        samples = correct if isinstance(correct, list) else [correct]
        shares[problem] = sum(each is True for each in samples) / len(samples)
    return shares


def _width_note(width: float, shares: Sequence[float], samples: int, templates: Mapping[str, Any] | None) -> str:
    """How many problems would narrow an interval to WIDE, and how far more samples of these problems could."""
    counted = "problems" if templates is None else "templates"
    count = len(shares) if templates is None else templates["templates"]
    wanted = math.ceil(count * (width / WIDE) ** 2)
    note = (
        f"warning: the 95 % interval is {100 * width:.1f} points wide: about {wanted:,} {counted} would make it "
        f"{100 * WIDE:.0f}, and there are {count:,}"
    )
    if templates is not None:
        return note
    if samples == 1:
        return f"{note}. More samples of each (--n) help less, and never beyond what {count:,} problems allow"
    floor = width * math.sqrt(between_problems(shares, samples))
    return f"{note}. More samples of each would narrow it to {100 * floor:.1f} at best"


def between_problems(shares: Sequence[float], samples: int) -> float:
    """The part of the variance of the shares that is between problems, 0 to 1: what no number of samples removes.

    The variance within a problem is estimated from its own samples, p(1-p) / (n-1).

    >>> between_problems([0.0, 1.0, 1.0], 4), round(between_problems([0.5, 0.75, 0.25, 0.5], 4), 2)
    (1.0, 0.0)
    """
    mean = math.fsum(shares) / len(shares)
    total = math.fsum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1)
    within = math.fsum(share * (1 - share) for share in shares) / len(shares) / (samples - 1)
    return min(1.0, max(0.0, 1 - within / total)) if total > 0 else 0.0
