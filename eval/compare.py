"""Two runs on the same problems: do they differ, and where?

    python eval/compare.py runs/a/gsm8k.json runs/b/gsm8k.json
    python eval/compare.py runs/a/math.json runs/b/math.json --convention minerva --show 5

Runs are paired by problem id. Of the problems that only one run solves, an exact McNemar test asks whether chance would
split them so. The unpaired p next to it is what two published scores would give. Conventions other than "verified" are
graded from the generations next to the summaries. No GPU, no model.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "eval"

import argparse
import json
import math
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
    two_proportion,
    wilson_interval,
)
from matrix_llm.base.threads import wait_passively

from .grader.answers import CONVENTIONS, VERIFIED, extract_answer, grade
from .report.comparison import describe

OWN_TO_A_RUN = ("model", "revision", "model_fingerprint", "lora")  # settings that two runs are expected to differ in
REPEATS = 10_000


@dataclass(frozen=True)
class Run:
    """One side of a comparison."""

    path: Path
    """Path of the summary, OUT/<name>.json."""
    summary: Mapping[str, Any]
    """The content of the summary."""
    rows: Mapping[str, Mapping[str, Any]]
    """{problem id: sample 0} from the generations next to the summary; empty if there are none."""

    @classmethod
    def load(cls, path: Path) -> Run:
        summary = load_summary(path)
        return cls(path, summary, load_generations(_generations_beside(path, summary)))

    @property
    def benchmark(self) -> str:
        return self.summary["benchmark"]

    def verdicts(self, convention: str) -> Mapping[str, bool | None]:
        """{problem id: correct?} of sample 0: as stored for the summary's own convention, else graded from the rows."""
        stored = self.summary["verdicts"]
        if convention == self.summary.get("convention", VERIFIED):
            return stored
        missing = [problem for problem in stored if problem not in self.rows]
        if missing:
            raise EvalError(
                f"--convention {convention} has to grade the generations, "
                f"but those next to {self.path} lack {len(missing)} of its "
                f"problems, such as {missing[0]}. Put the run's "
                f"{_generations_beside(self.path, self.summary).name} next to it, "
                "or leave --convention out."
            )
        rows = ((problem, self.rows[problem]) for problem in stored)
        how = {"benchmark": self.benchmark, "convention": convention}
        return {
            problem: grade(row["response"], row["gold"], problem=row.get("problem"), **how).correct
            for problem, row in rows
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
    return summary


def _generations_beside(path: Path, summary: Mapping[str, Any]) -> Path:
    return path.parent / Path(summary.get("generations") or path.with_suffix(".jsonl").name).name


def load_generations(file: Path) -> dict[str, dict[str, Any]]:
    """{problem id: row of sample 0}; empty if there is no such file."""
    rows: dict[str, dict[str, Any]] = {}
    if not file.is_file():
        return rows
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line)
                if row["sample"] == 0:
                    rows[row["id"]] = row
            except (ValueError, KeyError, TypeError):
                raise EvalError(
                    f"{file}, line {number}, is not a generation of ours. Remove the line, or generate again."
                ) from None
    return rows


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

    # 2. the pairs
    right_a = [verdicts_a[problem] is True for problem in ids]
    right_b = [verdicts_b[problem] is True for problem in ids]
    total, correct_a, correct_b = len(ids), sum(right_a), sum(right_b)
    only_a = sum(x and not y for x, y in zip(right_a, right_b, strict=True))
    only_b = only_a + correct_b - correct_a
    flipped = [(problem, "A" if x else "B") for problem, x, y in zip(ids, right_a, right_b, strict=True) if x != y]

    # 3. the statistics
    low, high = bootstrap_difference(right_a, right_b, repeats=REPEATS)
    detectable = minimum_detectable_difference(total, len(flipped) / total)
    return {
        "benchmark": a.benchmark,
        "convention": convention,
        "problems": total,
        "a": _side(a, [verdicts_a[problem] for problem in ids]),
        "b": _side(b, [verdicts_b[problem] for problem in ids]),
        "both": correct_a - only_a,
        "only_a": only_a,
        "only_b": only_b,
        "neither": total - correct_b - only_a,
        "difference": (correct_b - correct_a) / total,
        "difference_low": low,
        "difference_high": high,
        "mcnemar_p": mcnemar_exact(only_a, only_b),
        "unpaired_p": two_proportion(correct_a, total, correct_b, total),
        "minimum_detectable_difference": detectable if math.isfinite(detectable) else None,
        "settings_that_differ": _different(a.summary, b.summary, "settings", leave_out=OWN_TO_A_RUN),
        "versions_that_differ": _different(a.summary, b.summary, "versions"),
        "notes": _notes(a, b, ids),
        "flipped": [_flip(problem, right, a, b, convention) for problem, right in flipped],
    }


def _side(run: Run, verdicts: Sequence[bool | None]) -> dict[str, Any]:
    correct, total = sum(verdict is True for verdict in verdicts), len(verdicts)
    low, high = wilson_interval(correct, total)
    return {
        "summary": str(run.path),
        "model": run.summary.get("model"),
        "correct": correct,
        "accuracy": correct / total,
        "low": low,
        "high": high,
        "ungraded": sum(verdict is None for verdict in verdicts),
    }


def _notes(a: Run, b: Run, ids: Sequence[str]) -> list[str]:
    """What a reader of the numbers should know."""
    notes = []
    sizes = [len(run.summary["verdicts"]) for run in (a, b)]
    if len(ids) < max(sizes):
        notes.append(f"compared on the {len(ids)} problems in both runs; A has {sizes[0]}, B has {sizes[1]}")
    pairs = [(a.rows[problem], b.rows[problem]) for problem in ids if problem in a.rows and problem in b.rows]
    changed = sum(any(x[key] != y[key] for key in ("problem", "gold")) for x, y in pairs)
    if changed:
        notes.append(
            f"{changed} problems have the same id and another text or gold: the two runs did not see the same data"
        )
    for name, run in (("A", a), ("B", b)):
        samples = run.summary.get("samples_per_problem", 1)
        if samples > 1:
            notes.append(f"{name} has {samples} samples a problem; sample 0 of each is compared")
    return notes


def _flip(problem: str, right: str, a: Run, b: Run, convention: str) -> dict[str, Any]:
    """A problem that only one run solves; its texts are None where the generations are missing."""
    row_a, row_b = a.rows.get(problem), b.rows.get(problem)
    known = row_a or row_b or {}
    return {
        "id": problem,
        "right": right,
        "problem": known.get("problem"),
        "gold": known.get("gold"),
        "answer_a": row_a and extract_answer(row_a["response"], convention=convention, benchmark=a.benchmark),
        "answer_b": row_b and extract_answer(row_b["response"], convention=convention, benchmark=b.benchmark),
        "generations": bool(row_a and row_b),
    }


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
