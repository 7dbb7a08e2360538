"""Generations to verdicts, verdicts to scores, scores to the summary of a run.

grade_rows  -> one verdict for each (row, convention); the only place that grades a run
score       -> counts, accuracy and interval of a set of problems
summarise   -> the summary of a run, as in OUT/<name>.json
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matrix_llm.base.statistics import pass_at_k, wilson_interval

from ..grader.answers import CONVENTIONS, VERIFIED, Verdict, answers_equal, grade

Row = Mapping[str, Any]
"""A generation: at least id, sample, response and gold; see `eval.generate.files.ROW_FIELDS`."""


def grade_rows(rows: Sequence[Row], *, benchmark: str) -> dict[str, list[Verdict]]:
    """{convention: one verdict a row}."""
    return {
        convention: [
            grade(row["response"], row["gold"], benchmark=benchmark, convention=convention, problem=row.get("problem"))
            for row in rows
        ]
        for convention in CONVENTIONS
    }


def places_by_problem(rows: Sequence[Row]) -> dict[str, list[int]]:
    """{problem id: the places of its rows, by sample}, in order of first appearance.

    Raises:
        ValueError: a problem has two rows of one sample.
    """
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["id"], []).append(place)
    for problem, found in places.items():
        found.sort(key=lambda place: rows[place]["sample"])
        samples = [rows[place]["sample"] for place in found]
        if len(set(samples)) < len(samples):
            raise ValueError(
                f"{problem} has two rows of one sample (samples {samples}): the file was written twice. "
                "Generate it again."
            )
    return places


def score(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Scores of problems, each with the verdicts of its samples.

    Counts and interval are of the first sample of each problem; `accuracy` is the mean over problems of the share of
    correct samples, which with one sample is correct / total. Ungraded counts as wrong.
    """
    first = [samples[0] for samples in verdicts]
    correct, total = sum(verdict.correct is True for verdict in first), len(first)
    low, high = wilson_interval(correct, total)
    shares = [_correct(samples) / len(samples) for samples in verdicts]
    return {
        "correct": correct,
        "total": total,
        "accuracy": math.fsum(shares) / total,
        "low": low,
        "high": high,
        "extraction_failures": sum(verdict.extracted is None for verdict in first),
        "ungraded": sum(verdict.correct is None for verdict in first),
    }


def score_conventions(
    graded: Mapping[str, Sequence[Verdict]], places: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """{convention: scores} of what `grade_rows` and `places_by_problem` returned."""
    return {
        convention: score([[verdicts[place] for place in found] for found in places.values()])
        for convention, verdicts in graded.items()
    }


def summarise(
    rows: Sequence[Row],
    *,
    benchmark: str,
    settings: Mapping[str, Any],
    wall_seconds: float,
    versions: Mapping[str, str],
    **extra: Any,
) -> dict[str, Any]:
    """The summary of a run under all conventions.

    Args:
        rows: the run's generations, every problem with the same number n of samples.
        extra: added unchanged (name, limit, generations, ...).

    With n > 1 there are also pass@k for the powers of two up to n and for n, and the majority vote over all n.

    Raises:
        ValueError: no rows, or problems with different numbers of samples.
    """
    # 1. the rows of each problem
    if not rows:
        raise ValueError("no generations, so there is nothing to score.")
    places = places_by_problem(rows)
    samples = len(next(iter(places.values())))
    for problem, found in places.items():
        if len(found) != samples:
            raise ValueError(
                f"{problem} has {len(found)} samples, others {samples}: the run is unfinished. "
                "Start it again to complete it."
            )

    # 2. verdicts; groups and single verdicts use our own convention
    graded = grade_rows(rows, benchmark=benchmark)
    verified = {problem: [graded[VERIFIED][place] for place in found] for problem, found in places.items()}
    first = {problem: rows[found[0]] for problem, found in places.items()}

    # 3. scores and counts
    generated = sum(row.get("tokens", 0) for row in rows)
    summary = {
        "benchmark": benchmark,
        "model": settings.get("model"),
        "revision": settings.get("revision"),
        "problems": len(places),
        "samples_per_problem": samples,
        "scores": score_conventions(graded, places),
        "convention": VERIFIED,
        "by_subject": _score_groups(first, verified, "subject"),
        "by_level": _score_groups(first, verified, "level"),
        "truncated": sum(row.get("finish_reason") == "length" for row in rows),
        "stop_hits": sum(row.get("stop_reason") is not None for row in rows),
        "prompt_tokens": sum(row.get("prompt_tokens", 0) for row in rows),
        "generated_tokens": generated,
        "wall_seconds": wall_seconds,
        "tokens_per_second": generated / wall_seconds if wall_seconds > 0 else None,
        "settings": dict(settings),
        "versions": dict(versions),
        "verdicts": {problem: verdicts[0].correct for problem, verdicts in verified.items()},
    }
    if samples > 1:
        summary["pass_at_k"] = _pass_at_powers_of_two(verified, samples)
        summary["majority"] = {"k": samples, **_score_majority(verified)}
    return {**summary, **extra}


def _correct(verdicts: Iterable[Verdict]) -> int:
    return sum(verdict.correct is True for verdict in verdicts)


def _score_groups(
    first: Mapping[str, Row], verified: Mapping[str, Sequence[Verdict]], field: str
) -> dict[str, dict[str, Any]]:
    """{value of `field`: scores of the problems that have it}, in order of the values."""
    groups: dict[Any, list[Sequence[Verdict]]] = {}
    for problem, row in first.items():
        value = row.get(field)
        if value is not None:  # rows may be anybody's: numbers come first, then texts
            groups.setdefault(value if isinstance(value, int) else str(value), []).append(verified[problem])
    return {str(name): score(groups[name]) for name in sorted(groups, key=lambda name: (isinstance(name, str), name))}


def _pass_at_powers_of_two(verified: Mapping[str, Sequence[Verdict]], samples: int) -> dict[str, float]:
    correct = [_correct(verdicts) for verdicts in verified.values()]
    ks = [k for k in (2**i for i in range(samples.bit_length())) if k < samples] + [samples]
    return {str(k): math.fsum(pass_at_k(samples, c, k) for c in correct) / len(correct) for k in ks}


def _score_majority(verified: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
    """Scores of the majority answers, by the verdict on the first sample that gave each, so that nothing is graded
    twice.
    """
    votes = []
    for verdicts in verified.values():
        winner = majority_vote((verdict.extracted for verdict in verdicts), equal=answers_equal)
        votes.append([next((verdict for verdict in verdicts if verdict.extracted == winner), verdicts[0])])
    return score(votes)


def majority_vote(answers: Iterable[str | None], equal: Callable[[str, str], bool] | None = None) -> str | None:
    """The first spelling of the answer that most samples give. None entries do not vote; without votes it is None.

    Equal strings are counted together first; then each distinct string joins the first cluster whose first spelling
    it is `equal` to. Ties go to the answer that appears first.

    >>> majority_vote(["1/2", "3", None, "0.5", "3", "1/2"], equal=lambda a, b: {a, b} == {"1/2", "0.5"})
    '1/2'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    clusters: Counter[str] = Counter()
    for answer, count in votes.items():
        first = next((known for known in clusters if equal(known, answer)), answer) if equal else answer
        clusters[first] += count
    return max(clusters, key=lambda answer: clusters[answer], default=None)  # max keeps the first of equals
