"""Two runs on the same problems: do they differ, and where?

    python eval/compare.py runs/a/gsm8k.json runs/b/gsm8k.json
    python eval/compare.py runs/a/math.json runs/b/math.json --convention minerva --show 5

Paired by problem id: of the problems that one run alone solves, an exact McNemar test asks whether chance would split them so.
The unpaired p beside it is what two published scores would give. Any convention but "verified" is graded anew from the
generations beside the summaries; no GPU, no model.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

from eval.answers import CONVENTIONS, extract_answer, grade
from eval.report import DEFAULT, percent, visible
from eval.statistics import (
    bootstrap_difference,
    mcnemar_exact,
    minimum_detectable_difference,
    two_proportion,
    wilson_interval,
)
from matrix_llm.base.errors import EvalError

OWN_TO_A_RUN = ("model", "revision", "model_fingerprint", "lora")  # settings that two runs are expected to differ in
REPEATS = 10_000


def load_summary(path: Path) -> dict[str, Any]:
    """The summary OUT/<name>.json of a run, checked for what a comparison needs."""
    if path.is_dir():
        found = sorted(file.name for file in path.glob("*.json") if not file.name.endswith(".settings.json"))
        raise EvalError(
            f"{path} is a folder. Name a summary in it: {', '.join(found) or 'there is none; run eval/gsm8k.py first'}."
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(
            f"{path} cannot be read ({error.strerror}). Give the summary that a run wrote, such as runs/a/gsm8k.json."
        ) from None
    except ValueError:
        hint = (
            f" Generations are graded by eval/regrade.py; their summary is {path.stem}.json."
            if path.suffix == ".jsonl"
            else ""
        )
        raise EvalError(f"{path} is not the summary of a run: it is no JSON.{hint}") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("verdicts"), dict) or "benchmark" not in summary:
        raise EvalError(
            f"{path} is not the summary of a run: it lacks benchmark or verdicts. Give OUT/NAME.json, such as runs/a/gsm8k.json."
        )
    return summary


def load_generations(path: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{problem id: row of sample 0} from the generations beside a summary; empty if they are not there."""
    file = path.parent / Path(summary.get("generations") or path.with_suffix(".jsonl").name).name
    rows: dict[str, dict[str, Any]] = {}
    if file.is_file():
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    if row["sample"] == 0:
                        rows[row["id"]] = row
                except (ValueError, KeyError, TypeError):
                    raise EvalError(
                        f"{file}, line {number}, is not a generation of ours. Remove the line, or generate again."
                    ) from None
    return rows


def verdicts_of(
    path: Path, summary: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], convention: str
) -> dict[str, bool | None]:
    """{problem id: right?} of sample 0: stored for the summary's own convention, else graded from `rows`."""
    if convention == summary.get("convention", DEFAULT):
        return summary["verdicts"]
    missing = [problem for problem in summary["verdicts"] if problem not in rows]
    if missing:
        file = Path(summary.get("generations") or path.with_suffix(".jsonl").name).name
        raise EvalError(
            f"--convention {convention} grades anew, but the generations beside {path} lack {len(missing)} of its problems, "
            f"such as {missing[0]}. Put the run's {file} beside it, or leave --convention out."
        )
    benchmark = summary["benchmark"]
    return {
        problem: grade(
            rows[problem]["response"], rows[problem]["gold"], benchmark=benchmark, convention=convention
        ).correct
        for problem in summary["verdicts"]
    }


def compare(path_a: Path, path_b: Path, *, convention: str = DEFAULT) -> dict[str, Any]:
    """Everything the command prints, as one dictionary that JSON can hold. Differences are B - A; ungraded is wrong."""
    summaries = [load_summary(path) for path in (path_a, path_b)]
    if summaries[0]["benchmark"] != summaries[1]["benchmark"]:
        names = [summary["benchmark"] for summary in summaries]
        raise EvalError(
            f"{path_a} is of {names[0]}, {path_b} of {names[1]}: only runs on the same problems can be compared."
        )
    generations = [load_generations(path, summary) for path, summary in zip((path_a, path_b), summaries, strict=True)]
    a, b = (
        verdicts_of(path, summary, rows, convention)
        for path, summary, rows in zip((path_a, path_b), summaries, generations, strict=True)
    )
    ids = [problem for problem in a if problem in b]
    if not ids:
        first = [next(iter(verdicts), "none") for verdicts in (a, b)]
        raise EvalError(
            f"{path_a} and {path_b} share no problem id ({first[0]} and {first[1]}): compare two runs on the same --data."
        )

    right_a, right_b = ([verdicts[problem] is True for problem in ids] for verdicts in (a, b))
    total, correct_a, correct_b = len(ids), sum(right_a), sum(right_b)
    only_a = sum(x and not y for x, y in zip(right_a, right_b, strict=True))
    only_b = only_a + correct_b - correct_a
    low, high = bootstrap_difference(right_a, right_b, repeats=REPEATS)
    detectable = minimum_detectable_difference(total, (only_a + only_b) / total)

    settings = [summary.get("settings") or {} for summary in summaries]
    versions = [summary.get("versions") or {} for summary in summaries]
    notes = []
    if total < max(len(a), len(b)):
        notes.append(f"compared on the {total} problems in both runs; A has {len(a)}, B has {len(b)}")
    in_both = [problem for problem in ids if problem in generations[0] and problem in generations[1]]
    changed = sum(
        any(generations[0][problem][key] != generations[1][problem][key] for key in ("problem", "gold"))
        for problem in in_both
    )
    if changed:
        notes.append(
            f"{changed} problems have the same id and another text or gold: the two runs did not see the same data"
        )
    for name, summary in zip("AB", summaries, strict=True):
        if summary.get("samples_per_problem", 1) > 1:
            notes.append(f"{name} has {summary['samples_per_problem']} samples a problem; sample 0 of each is compared")

    def side(
        path: Path, summary: Mapping[str, Any], verdicts: Mapping[str, bool | None], correct: int
    ) -> dict[str, Any]:
        interval = wilson_interval(correct, total)
        return {
            "summary": str(path),
            "model": summary.get("model"),
            "correct": correct,
            "accuracy": correct / total,
            "low": interval[0],
            "high": interval[1],
            "ungraded": sum(verdicts[problem] is None for problem in ids),
        }

    def flip(problem: str) -> dict[str, Any]:
        rows = [found.get(problem) for found in generations]
        answers = [
            row and extract_answer(row["response"], convention=convention, benchmark=summaries[0]["benchmark"])
            for row in rows
        ]
        known = rows[0] or rows[1] or {}
        return {
            "id": problem,
            "right": "A" if a[problem] is True else "B",
            "problem": known.get("problem"),
            "gold": known.get("gold"),
            "answer_a": answers[0],
            "answer_b": answers[1],
            "generations": all(rows),
        }

    return {
        "benchmark": summaries[0]["benchmark"],
        "convention": convention,
        "problems": total,
        "a": side(path_a, summaries[0], a, correct_a),
        "b": side(path_b, summaries[1], b, correct_b),
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
        "settings_that_differ": _different(settings[0], settings[1], leave_out=OWN_TO_A_RUN),
        "versions_that_differ": _different(versions[0], versions[1]),
        "notes": notes,
        "flipped": [flip(problem) for problem, x, y in zip(ids, right_a, right_b, strict=True) if x != y],
    }


def _different(a: Mapping[str, Any], b: Mapping[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    return {
        name: [a.get(name), b.get(name)] for name in {**a, **b} if name not in leave_out and a.get(name) != b.get(name)
    }


# --- what is printed ---------------------------------------------------------------------------------------------------


def describe(result: Mapping[str, Any], *, show: int) -> str:
    """The comparison as text for a terminal."""
    lines = [f"{result['benchmark']}, convention {result['convention']}, {result['problems']} problems", ""]
    lines += [
        "|   |  accuracy |  95 % interval | correct | ungraded | run |",
        "|---|----------:|---------------:|--------:|---------:|-----|",
    ]
    for name in "ab":
        side = result[name]
        interval = f"{100 * side['low']:.1f} to {100 * side['high']:.1f}"
        run = visible(f"{side['summary']}" + (f" ({side['model']})" if side["model"] else ""))
        counts = f"{side['correct']:>7} | {side['ungraded']:>8}"
        lines.append(f"| {name.upper()} | {percent(side['accuracy']):>9} | {interval:>14} | {counts} | {run} |")
    flips = result["only_a"] + result["only_b"]
    interval = f"{_points(result['difference_low'])} to {_points(result['difference_high'])}"
    split = f"A alone right on {result['only_a']}, B alone on {result['only_b']} (both {result['both']}, neither {result['neither']})"
    detectable = "no difference: too few problems flip for a test at 5 %"
    if result["minimum_detectable_difference"] is not None:
        points = 100 * result["minimum_detectable_difference"]
        detectable = f"a true difference of {points:.2f} points has an 80 % chance to be found, while {percent(flips / result['problems'])} flip"
    lines += [
        "",
        f"B - A           {_points(result['difference'])} points, 95 % {interval} (paired bootstrap, {REPEATS} draws)",
        f"exact McNemar   p = {_p(result['mcnemar_p'])}: {flips} problems flip, {split}",
        f"unpaired        p = {_p(result['unpaired_p'])} (what the two accuracies alone would say)",
        f"detectable      {detectable}",
        "",
        _reading(result),
    ]
    lines += [f"note: {note}" for note in result["notes"]]
    for kind in ("settings", "versions"):
        differing = result[f"{kind}_that_differ"]
        if differing:
            listed = "; ".join(f"{name}: {_brief(x)} and {_brief(y)}" for name, (x, y) in differing.items())
            effect = (
                "so the difference is not of the model alone" if kind == "settings" else "which may move single answers"
            )
            lines.append(f"warning: {kind} differ, {effect}: {listed}")
    if result["flipped"] and show > 0:
        lines += ["", f"flipped problems, {min(show, flips)} of {flips} (--show N)"]
        for flip in result["flipped"][:show]:
            problem = f"; {_brief(flip['problem'], 100)}" if flip["problem"] else ""
            lines.append(f"  {visible(flip['id'])}: {flip['right']} alone is right{problem}")
            if flip["generations"]:
                lines.append(
                    f"      gold {_brief(flip['gold'])}; A answers {_brief(flip['answer_a'])}; B answers {_brief(flip['answer_b'])}"
                )
    return "\n".join(lines)


def _reading(result: Mapping[str, Any]) -> str:
    if result["mcnemar_p"] >= 0.05:
        return "=> no difference beyond chance (McNemar p >= 0.05); that is not the same as equal, see the interval"
    better, worse = ("B", "A") if result["difference"] > 0 else ("A", "B")
    return f"=> {better} is better than {worse} beyond chance on these problems (McNemar p < 0.05)"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _brief(value: Any, limit: int = 60) -> str:
    """One line, no control characters, at most `limit` characters."""
    if value is None:
        return "nothing"
    text = visible(str(value).strip().split("\n", 1)[0])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="eval/compare.py", description="Compare two runs on the same problems, paired."
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="summary of the first run, such as runs/a/gsm8k.json")
    parser.add_argument("b", type=Path, metavar="B.json", help="summary of the second run")
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default=DEFAULT, help="how answers are graded (default: verified)"
    )
    parser.add_argument("--show", type=int, default=20, metavar="N", help="flipped problems to list (default: 20)")
    parser.add_argument(
        "--json", action="store_true", help="print everything as JSON instead, with all flipped problems"
    )
    options = parser.parse_args(arguments)
    try:
        result = compare(options.a, options.b, convention=options.convention)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if options.json else describe(result, show=options.show))
    return 0


if __name__ == "__main__":
    sys.exit(main())
