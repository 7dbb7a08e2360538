"""What a score cannot tell: how wide its interval is, why, and what would narrow it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matrix_llm.base.statistics import clustered_interval

WIDE = 0.05  # an interval wider than this is remarked on
Z = 1.959963984540054  # the normal quantile of a 95 % interval


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
    if found["high"] - found["low"] > WIDE:
        shares = list(shares_by_problem(summary).values())
        count = None if templates is None else templates["templates"]
        notes.append(_width_note(found, shares, summary["samples_per_problem"], count))
    return ["", *notes] if notes else []


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


def _width_note(found: Mapping[str, Any], shares: Sequence[float], samples: int, templates: int | None) -> str:
    """How many problems would narrow an interval to WIDE, and how far more samples of these problems could."""
    accuracy, width = found["accuracy"], found["high"] - found["low"]
    counted, count = ("problems", len(shares)) if templates is None else ("templates", templates)
    effective = draws_for(accuracy, width)  # as many independent answers as the problems are worth
    wanted = math.ceil(count * draws_for(accuracy, WIDE) / effective)
    note = (
        f"warning: the 95 % interval is {100 * width:.1f} points wide: about {wanted:,} {counted} would make it "
        f"{100 * WIDE:.0f}, and there are {count:,}"
    )
    if templates is not None:
        return note
    if samples == 1:
        return f"{note}. More samples of each (--n) help less, and never beyond what {count:,} problems allow"
    least = between_problems(shares, samples)
    floor = wilson_width(accuracy, effective / least) if least > 0 else 0.0
    return f"{note}. More samples of each would narrow it to {100 * floor:.1f} at best"


def wilson_width(accuracy: float, draws: float) -> float:
    """The width of Wilson's 95 % interval of `draws` independent answers, which need not be a whole number.

    >>> round(wilson_width(0.5, 1500), 3)
    0.051
    """
    return 2 * Z * math.sqrt(accuracy * (1 - accuracy) / draws + (Z / (2 * draws)) ** 2) / (1 + Z * Z / draws)


def draws_for(accuracy: float, width: float) -> float:
    """How many independent answers have an interval of this width, the inverse of `wilson_width`."""
    low, high = 1e-3, 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if wilson_width(accuracy, middle) > width else (low, middle)
    return high


def between_problems(shares: Sequence[float], samples: int) -> float:
    """The part of the variance of the shares that is between problems, 0 to 1: what no number of samples removes. 1
    where the samples show no variance.

    The variance within a problem is estimated from its own samples, p(1-p) / (n-1).

    >>> between_problems([0.0, 1.0, 1.0], 4), round(between_problems([0.5, 0.75, 0.25, 0.5], 4), 2)
    (1.0, 0.0)
    """
    mean = math.fsum(shares) / len(shares)
    total = math.fsum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1)
    within = math.fsum(share * (1 - share) for share in shares) / len(shares) / (samples - 1)
    if total == 0:
        return 0.0 if within > 0 else 1.0
    return min(1.0, max(0.0, 1 - within / total))
