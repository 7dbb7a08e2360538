"""How often each grading convention, and math-verify, agrees with reference labels, and how long it takes.

    python benchmarks/grading.py rows.jsonl [pairs.jsonl ...]

Rows: {"benchmark": "gsm8k" | "math", "response": ..., "gold": ..., "reference_label": true | false | null}; rows
without a label are left out. Pairs: {"pred": ..., "gold": ..., "equal": true | false}. The graders take turns over the
same rows in one process; the times are wall times of this run on a shared processor, so compare them only with each
other. `--skip_source TEXT` leaves out rows whose "source" contains TEXT, for a source whose labels are known to be
wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.answers import CONVENTIONS, answers_equal, grade


def math_verify(response: str, gold: str, benchmark: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    try:
        given = parse(response, extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=5)
        wanted = parse(f"\\boxed{{{gold}}}" if benchmark == "math" else gold, parsing_timeout=5)
        return bool(verify(wanted, given, timeout_seconds=5))
    except Exception:  # a crash is not a verdict, so it counts as "not right"
        return False


def math_verify_pair(pred: str, gold: str) -> bool:
    return math_verify(f"${pred}$", gold, "math")


def measure(name: str, cases: list[tuple[tuple[str, ...], bool]], grader: Callable[..., bool]) -> str:
    grader(*cases[0][0])  # imports and worker starts are not grading
    start = time.perf_counter()
    verdicts = [grader(*arguments) for arguments, _ in cases]
    seconds = time.perf_counter() - start
    false_positives = sum(verdict and not label for verdict, (_, label) in zip(verdicts, cases, strict=True))
    false_negatives = sum(label and not verdict for verdict, (_, label) in zip(verdicts, cases, strict=True))
    agreement = 100 * (1 - (false_positives + false_negatives) / len(cases))
    return f"| {name} | {agreement:.2f} % | {false_positives} / {false_negatives} | {1000 * seconds / len(cases):.2f} |"


def by_convention(convention: str) -> Callable[[str, str, str], bool]:
    return lambda response, gold, benchmark: (
        grade(response, gold, benchmark=benchmark, convention=convention).correct is True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--skip_source", action="append", default=[])
    arguments = parser.parse_args()
    for path in arguments.files:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [row for row in rows if not any(text in row.get("source", "") for text in arguments.skip_source)]
        if "pred" in rows[0]:
            pairs = [((row["pred"], row["gold"]), bool(row["equal"])) for row in rows if not row.get("raw")]
            graders: list[tuple[str, Callable[..., bool]]] = [
                ("verified", answers_equal),
                ("math-verify", math_verify_pair),
            ]
            cases: list[tuple[tuple[str, ...], bool]] = list(pairs)
        else:
            rows = [row for row in rows if row.get("reference_label") is not None]
            cases = [((row["response"], row["gold"], row["benchmark"]), bool(row["reference_label"])) for row in rows]
            graders = [(convention, by_convention(convention)) for convention in CONVENTIONS]
            graders.append(("math-verify", math_verify))
        print(f"\n{path.name}: {len(cases)} labelled rows\n")
        print("| grader | agreement | false positives / negatives | s per 1,000 |")
        print("|---|---|---|---|", flush=True)
        for name, grader in graders:
            print(measure(name, cases, grader), flush=True)


if __name__ == "__main__":
    main()
