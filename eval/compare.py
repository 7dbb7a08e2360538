"""Two runs on the same problems: do they differ, and where?

    python eval/compare.py runs/a/gsm8k.json runs/b/gsm8k.json
    python eval/compare.py runs/a/math.json runs/b/math.json --convention minerva --show 5

Runs are paired by problem id, and a problem counts by the share of its samples that are right, as in the score of a
run. With one sample each, an exact McNemar test asks of the problems that only one run solves whether chance would
split them so, and the unpaired p next to it is what two published scores would give. With several, a sign-flip test
asks the same of the differences. Conventions other than "verified" are graded from the generations next to the
summaries. No GPU, no model.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "eval"

import argparse
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matrix_llm.base.console import command_name, fail
from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import parse_json
from matrix_llm.base.statistics import (
    bootstrap_difference,
    mcnemar_exact,
    minimum_detectable_difference,
    sign_flip_test,
    two_proportion,
)
from matrix_llm.base.threads import wait_passively

from .grader.answers import CONVENTIONS, VERIFIED, Verdict, extract_answer, grade
from .report.comparison import describe
from .report.scores import question, score, share_right
from .text import shorten

OWN_TO_A_RUN = ("model", "revision", "model_fingerprint", "lora")  # settings that two runs are expected to differ in
SUMMARY_TYPES = {"benchmark": str, "convention": str, "settings": dict, "versions": dict, "generations": str}
REPEATS, SIGN_FLIPS = 10_000, 100_000  # draws of the bootstrap, and of the sign-flip test


@dataclass(frozen=True)
class Run:
    """One side of a comparison."""

    path: Path
    """Path of the summary, OUT/<name>.json."""
    summary: Mapping[str, Any]
    """The content of the summary."""
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    """{problem id: its samples} from the generations next to the summary; empty if there are none."""

    @classmethod
    def load(cls, path: Path) -> Run:
        summary = load_summary(path)
        return cls(path, summary, load_generations(_generations_beside(path, summary)))

    @property
    def benchmark(self) -> str:
        return self.summary["benchmark"]

    @property
    def samples(self) -> int:
        """Of each problem."""
        return self.summary.get("samples_per_problem", 1)

    def verdicts(self, convention: str) -> Mapping[str, Sequence[Verdict]]:
        """{problem id: the verdict on each sample}: as stored for the summary's own convention, else graded from the
        rows.
        """
        stored = {
            problem: correct if isinstance(correct, list) else [correct]
            for problem, correct in self.summary["verdicts"].items()
        }
        is_stored = all(len(each) == self.samples for each in stored.values())
        if convention == self.summary.get("convention", VERIFIED) and is_stored:
            return {problem: [Verdict(each, None) for each in correct] for problem, correct in stored.items()}
        missing = [problem for problem in stored if len(self.rows.get(problem, ())) != self.samples]
        if missing:
            why = f"--convention {convention} has to grade the generations"
            if not is_stored:
                why = f"{self.path} has {self.samples} samples of each problem, but holds other numbers of verdicts"
            file = _generations_beside(self.path, self.summary).name
            raise EvalError(
                f"{why}, and the generations next to {self.path} lack {len(missing)} of its problems, such as "
                f"{missing[0]}. Put the run's {file} next to it"
                + (", or leave --convention out." if is_stored else ", or start the evaluation again: it grades them.")
            )
        how = {"benchmark": self.benchmark, "convention": convention}
        return {
            problem: [grade(row["response"], row["gold"], problem=question(row), **how) for row in self.rows[problem]]
            for problem in stored
        }


def load_summary(path: Path) -> dict[str, Any]:
    """The summary OUT/<name>.json of a run, checked for what a comparison needs."""
    if path.is_dir():
        found = sorted(file.name for file in path.glob("*.json") if not file.name.endswith(".settings.json"))
        raise EvalError(
            f"{path} is a folder. Name a summary in it: {', '.join(found) or 'there is none; run eval/gsm8k.py first'}."
        )
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(
            f"{path} cannot be read ({error.strerror}). Give the summary that a run wrote, such as runs/a/gsm8k.json."
        ) from None
    except ValueError:
        hint = ""
        if path.suffix == ".jsonl":
            hint = f" Generations are graded by eval/regrade.py; their summary is {path.stem}.json."
        raise EvalError(f"{path} is not the summary of a run: it is not JSON.{hint}") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("verdicts"), dict) or "benchmark" not in summary:
        raise EvalError(
            f"{path} is not the summary of a run: it lacks benchmark or verdicts. Give OUT/NAME.json, "
            "such as runs/a/gsm8k.json."
        )
    fault = _find_fault(summary)
    if fault is not None:
        raise EvalError(
            f"{path} is not the summary of a run: {fault}. Start the evaluation again: it writes the summary anew."
        )
    return summary


def _find_fault(summary: Mapping[str, Any]) -> str | None:
    """What in a summary is of a type that no run writes; None if nothing is."""
    for name, kind in SUMMARY_TYPES.items():
        if not isinstance(summary.get(name), kind | None):
            what = "a text" if kind is str else "an object"
            return f"{name}={shorten(repr(summary[name]), 60)} must be {what}"
    for problem, correct in summary["verdicts"].items():
        verdicts = correct if isinstance(correct, list) else [correct]
        if not all(verdict is None or type(verdict) is bool for verdict in verdicts):
            return f"the verdict on {problem} is {shorten(repr(correct), 60)}, where each is true, false or null"
    samples = summary.get("samples_per_problem", 1)
    if type(samples) is not int or samples < 1:
        return f"samples_per_problem={samples!r} must be 1 or more"
    return None


def _generations_beside(path: Path, summary: Mapping[str, Any]) -> Path:
    return path.parent / Path(summary.get("generations") or path.with_suffix(".jsonl").name).name


def load_generations(file: Path) -> dict[str, list[dict[str, Any]]]:
    """{problem id: its rows, by sample}; empty if there is no such file."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line)
                if not {"id", "sample", "response", "gold"} <= row.keys() or type(row["sample"]) is not int:
                    raise ValueError("no generation")
                rows.setdefault(row["id"], {})[row["sample"]] = row
            except (ValueError, AttributeError, TypeError):
                raise EvalError(
                    f"{file}, line {number}, is not a generation of ours. Remove the line, or generate again."
                ) from None
    return {problem: [samples[number] for number in sorted(samples)] for problem, samples in rows.items()}


def compare(path_a: Path, path_b: Path, *, convention: str = VERIFIED) -> dict[str, Any]:
    """Everything the command prints, as one dictionary that JSON can hold. Differences are B - A; ungraded is wrong.

    Raises:
        EvalError: a file that is not a summary, other benchmarks, no common problem, or generations that are missing.
    """
    # 1. both runs, graded by one convention
    a, b = Run.load(path_a), Run.load(path_b)
    if a.benchmark != b.benchmark:
        raise EvalError(
            f"{path_a} is of {a.benchmark}, {path_b} of {b.benchmark}: only runs on the same problems can be compared."
        )
    verdicts_a, verdicts_b = a.verdicts(convention), b.verdicts(convention)
    ids = [problem for problem in verdicts_a if problem in verdicts_b]
    if not ids:
        first = [next(iter(verdicts), "none") for verdicts in (verdicts_a, verdicts_b)]
        raise EvalError(
            f"{path_a} and {path_b} share no problem id ({first[0]} and {first[1]}): "
            "compare two runs on the same --data."
        )

    # 2. the pairs: of each problem, the share of right samples in both runs
    shares_a = [share_right(verdicts_a[problem]) for problem in ids]
    shares_b = [share_right(verdicts_b[problem]) for problem in ids]
    pairs = list(zip(ids, shares_a, shares_b, strict=True))
    flipped = sorted(((problem, x, y) for problem, x, y in pairs if x != y), key=lambda each: -abs(each[2] - each[1]))

    # 3. the statistics
    low, high = bootstrap_difference(shares_a, shares_b, repeats=REPEATS)
    return {
        "benchmark": a.benchmark,
        "convention": convention,
        "problems": len(ids),
        "a": _side(a, [verdicts_a[problem] for problem in ids]),
        "b": _side(b, [verdicts_b[problem] for problem in ids]),
        "a_better": sum(x > y for x, y in zip(shares_a, shares_b, strict=True)),
        "b_better": sum(x < y for x, y in zip(shares_a, shares_b, strict=True)),
        "difference": (math.fsum(shares_b) - math.fsum(shares_a)) / len(ids),
        "difference_low": low,
        "difference_high": high,
        **_tests(shares_a, shares_b, several=max(a.samples, b.samples) > 1),
        "settings_that_differ": _different(a.summary, b.summary, "settings", leave_out=OWN_TO_A_RUN),
        "versions_that_differ": _different(a.summary, b.summary, "versions"),
        "notes": [*_notes(a, b, ids), *_template_notes(a, pairs)],
        "flipped": [_flip(*each, a, b, convention) for each in flipped],
    }


def _tests(shares_a: Sequence[float], shares_b: Sequence[float], *, several: bool) -> dict[str, Any]:
    """The paired test, by name, with its p value; for one sample of each problem also the counts it rests on."""
    if several:
        return {"test": "sign flips", "p": sign_flip_test(shares_a, shares_b, repeats=SIGN_FLIPS)}
    only_a = sum(x > y for x, y in zip(shares_a, shares_b, strict=True))
    only_b = sum(x < y for x, y in zip(shares_a, shares_b, strict=True))
    total, correct_a, correct_b = len(shares_a), int(sum(shares_a)), int(sum(shares_b))
    p = mcnemar_exact(only_a, only_b)
    detectable = minimum_detectable_difference(total, (only_a + only_b) / total)
    return {
        "test": "exact McNemar",
        "p": p,
        "mcnemar_p": p,
        "both": correct_a - only_a,
        "only_a": only_a,
        "only_b": only_b,
        "neither": total - correct_b - only_a,
        "unpaired_p": two_proportion(correct_a, total, correct_b, total),
        "minimum_detectable_difference": detectable if math.isfinite(detectable) else None,
    }


def _side(run: Run, verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    scores = score(verdicts)
    kept = ("correct", "samples", "accuracy", "low", "high", "ungraded")
    return {"summary": str(run.path), "model": run.summary.get("model"), **{name: scores[name] for name in kept}}


def _notes(a: Run, b: Run, ids: Sequence[str]) -> list[str]:
    """What a reader of the numbers should know."""
    notes = []
    sizes = [len(run.summary["verdicts"]) for run in (a, b)]
    if len(ids) < max(sizes):
        notes.append(f"compared on the {len(ids)} problems in both runs; A has {sizes[0]}, B has {sizes[1]}")
    pairs = [(a.rows[problem][0], b.rows[problem][0]) for problem in ids if problem in a.rows and problem in b.rows]
    changed = sum(any(x[key] != y[key] for key in ("problem", "gold")) for x, y in pairs)
    if changed:
        notes.append(
            f"{changed} problems have the same id and another text or gold: the two runs did not see the same data"
        )
    if max(a.samples, b.samples) > 1:
        notes.append(f"A has {a.samples} samples a problem, B {b.samples}; a problem counts by the share that is right")
    return notes


def _template_notes(run: Run, pairs: Sequence[tuple[str, float, float]]) -> list[str]:
    """The test over templates, where problems are made from them: those of one template are no independent draws."""
    differences: dict[str, list[float]] = {}
    for problem, x, y in pairs:
        template = run.rows[problem][0].get("template") if problem in run.rows else None
        if template is not None:
            differences.setdefault(str(template), []).append(y - x)
    if not differences:
        return []
    means = [math.fsum(each) / len(each) for each in differences.values()]
    p = sign_flip_test([0.0] * len(means), means, repeats=SIGN_FLIPS)
    return [
        f"the problems are made from {len(means)} templates, and those of one resemble each other: trust the "
        f"sign-flip test over templates, p = {p:.3f}, rather than the interval and the p value over problems"
    ]


def _flip(problem: str, share_a: float, share_b: float, a: Run, b: Run, convention: str) -> dict[str, Any]:
    """A problem that one run solves more often; its texts are None where the generations are missing."""
    rows_a, rows_b = a.rows.get(problem), b.rows.get(problem)
    known = (rows_a or rows_b or [{}])[0]
    return {
        "id": problem,
        "right": "A" if share_a > share_b else "B",
        "share_a": share_a,
        "share_b": share_b,
        "problem": known.get("problem"),
        "gold": known.get("gold"),
        "answer_a": rows_a and _most_given(a, rows_a, convention),
        "answer_b": rows_b and _most_given(b, rows_b, convention),
        "generations": bool(rows_a and rows_b),
    }


def _most_given(run: Run, rows: Sequence[Mapping[str, Any]], convention: str) -> str | None:
    """The answer that most samples give in the same words; None if it is none."""
    how = {"convention": convention, "benchmark": run.benchmark}
    return Counter(extract_answer(row["response"], **how) for row in rows).most_common(1)[0][0]


def _different(
    a: Mapping[str, Any], b: Mapping[str, Any], part: str, leave_out: Collection[str] = ()
) -> dict[str, list[Any]]:
    """{name: both values} of what differs in one part of two summaries."""
    x, y = a.get(part) or {}, b.get(part) or {}
    return {
        name: [x.get(name), y.get(name)] for name in {**x, **y} if name not in leave_out and x.get(name) != y.get(name)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_name("eval/compare.py"), description="Compare two runs on the same problems, paired."
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="summary of the first run, such as runs/a/gsm8k.json")
    parser.add_argument("b", type=Path, metavar="B.json", help="summary of the second run")
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default=VERIFIED, help="how answers are graded (default: verified)"
    )
    parser.add_argument("--show", type=int, default=20, metavar="N", help="flipped problems to list (default: 20)")
    parser.add_argument(
        "--json", action="store_true", help="print everything as JSON instead, with all flipped problems"
    )
    options = parser.parse_args(arguments)
    wait_passively()
    try:
        result = compare(options.a, options.b, convention=options.convention)
    except EvalError as error:
        return fail(str(error), 1)
    print(json.dumps(result, indent=2) if options.json else describe(result, show=options.show, repeats=REPEATS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
