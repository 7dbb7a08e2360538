"""Generations to verdicts, verdicts to scores, scores to the summary of a run.

grade_rows      -> one verdict for each (row, convention); the only place that grades a run
score           -> accuracy, interval and counts of a set of problems
score_samples   -> pass@k and the majority vote, where problems have several samples
summarise       -> the summary of a run, as in OUT/<name>.json

One definition of accuracy, wherever a score is shown: the mean over problems of the share of a problem's samples that
are right. The interval beside it is clustered by problem. With one sample each these are the share of right answers and
Wilson's interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matrix_llm.base.statistics import clustered_interval, pass_at_k

from ..grader.answers import CONVENTIONS, VERIFIED, Verdict, answers_equal, grade

Row = Mapping[str, Any]
"""A generation: at least id, sample, response and gold; see `eval.generate.files.ROW_FIELDS`."""


def grade_rows(rows: Sequence[Row], *, benchmark: str) -> dict[str, list[Verdict]]:
    """{convention: one verdict a row}."""
    return {
        convention: [
            grade(row["response"], row["gold"], benchmark=benchmark, convention=convention, problem=question(row))
            for row in rows
        ]
        for convention in CONVENTIONS
    }


def question(row: Row) -> str | None:
    """The text of the problem; None where the row does not have it."""
    return row.get("problem") or None


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
    """Scores of problems, each with the verdicts of its samples; ungraded counts as wrong.

    `accuracy` is the mean over problems of the share of right samples, `low` and `high` are its 95 % interval,
    clustered by problem; `total` counts problems, and the other counts are of samples.
    """
    everything = [verdict for samples in verdicts for verdict in samples]
    return {
        "correct": count_right(everything),
        "samples": len(everything),
        "total": len(verdicts),
        **_mean([share_right(samples) for samples in verdicts], [len(samples) for samples in verdicts]),
        "extraction_failures": sum(verdict.extracted is None for verdict in everything),
        "ungraded": sum(verdict.correct is None for verdict in everything),
    }


def count_right(verdicts: Iterable[Verdict]) -> int:
    return sum(verdict.correct is True for verdict in verdicts)


def share_right(verdicts: Sequence[Verdict]) -> float:
    return count_right(verdicts) / len(verdicts)


def _mean(shares: Sequence[float], draws: Sequence[float]) -> dict[str, float]:
    """The mean over problems and its interval; `draws` as `clustered_interval` takes them."""
    low, high = clustered_interval(shares, draws)
    return {"accuracy": math.fsum(shares) / len(shares), "low": low, "high": high}


def score_conventions(
    graded: Mapping[str, Sequence[Verdict]], places: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """{convention: scores} of what `grade_rows` and `places_by_problem` returned."""
    return {
        convention: score([[verdicts[place] for place in found] for found in places.values()])
        for convention, verdicts in graded.items()
    }


def score_samples(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """pass@k with its intervals for the powers of two up to n and for n, and the majority vote over all samples, as
    they stand in a summary; empty if n is 1.

    n is the number of samples of each problem. Where it differs (other people's files), pass@k goes up to the smallest,
    since beyond it not every problem has an estimate, and the vote is over all that each has.
    """
    fewest, most = min(map(len, verdicts)), max(map(len, verdicts))
    if most == 1:
        return {}
    ks = [k for k in (2**i for i in range(fewest.bit_length())) if k < fewest] + [fewest]
    passed = {}
    for k in ks:
        shares = [pass_at_k(len(samples), count_right(samples), k) for samples in verdicts]
        passed[str(k)] = _mean(shares, [len(samples) / k for samples in verdicts])
    return {
        "pass_at_k": {k: each["accuracy"] for k, each in passed.items()},
        "pass_at_k_intervals": {k: [each["low"], each["high"]] for k, each in passed.items()},
        "majority": {"k": most, **score([[majority_verdict(samples)] for samples in verdicts])},
    }


def majority_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on the majority answer: on the first sample that gave it, so that nothing is graded twice."""
    winner = majority_vote((verdict.extracted for verdict in verdicts), equal=answers_equal)
    return next((verdict for verdict in verdicts if verdict.extracted == winner), verdicts[0])


def stored_verdicts(verdicts: Sequence[Verdict]) -> bool | list[bool | None] | None:
    """A problem's verdicts as a summary holds them: of its one sample, or the list of all."""
    correct = [verdict.correct for verdict in verdicts]
    return correct[0] if len(correct) == 1 else correct


def summarise(
    rows: Sequence[Row],
    *,
    benchmark: str,
    settings: Mapping[str, Any],
    wall_seconds: float,
    versions: Mapping[str, str],
    graded: Mapping[str, Sequence[Verdict]] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The summary of a run under all conventions.

    Args:
        rows: the run's generations, every problem with the same number n of samples.
        graded: of `grade_rows`, where they are graded already.
        extra: added unchanged (name, limit, generations, ...).

    With n > 1 there is also what `score_samples` returns, and `verdicts` has a list for each problem.

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
    graded = graded or grade_rows(rows, benchmark=benchmark)
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
        "verdicts": {problem: stored_verdicts(verdicts) for problem, verdicts in verified.items()},
    }
    return {**summary, **score_samples(list(verified.values())), **extra}


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
