"""Grade saved generations again, under every convention side by side: where they disagree about an answer, and where
some of them find none.

    python eval/regrade.py runs/a/gsm8k.jsonl --benchmark gsm8k
    python eval/regrade.py theirs.jsonl --benchmark math --show 20 --out regraded.json

Reads our files and those of others: JSON lines with a response, a gold answer and perhaps the problem, under the
names in FIELDS. No GPU, no model.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "eval"

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matrix_llm.base.console import command_name, fail
from matrix_llm.base.errors import EvalError
from matrix_llm.base.threads import wait_passively

from .files import write_json
from .grader.answers import BENCHMARKS, CONVENTIONS, VERIFIED, Verdict
from .grader.text import last_boxed
from .report.scores import grade_rows, places_by_problem, score_conventions, score_samples
from .report.table import DEFINITION, align, convention_lines, sample_lines
from .text import shorten, visible

FIELDS = {  # the first name that a row holds is taken
    "response": ("response", "completion", "generation", "output", "prediction"),
    "gold": ("gold", "answer", "target", "expected"),
    "problem": ("problem", "question", "prompt"),
}
LISTED_BAD = 5  # lines without a generation that are named
SHOWN = 110  # characters of a text in a list
KINDS = {  # what a row can be besides graded alike by every convention, each a list of the result
    "disagreements": "two conventions found an answer, and one calls the response right and the other wrong",
    "answer_missing": "right for the conventions that found an answer; others found none",
    "no_answer": "no convention found an answer",
    "ungraded": "a convention hit a limit",
}


def read_generations(path: Path, benchmark: str) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Rows with id, sample, line, problem, response and gold; and the lines that hold none, each with the reason.

    A row without an id is a separate problem. Rows with the same id are its samples, in file order unless they
    give `sample`.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
        raise EvalError(f"{path} {what}. Give a file of JSON lines, such as runs/a/gsm8k.jsonl.")
    # 1. Read line by line: a bad line is noted, and the others still count.
    rows: list[dict[str, Any]] = []
    bad: list[tuple[int, str]] = []
    seen: Counter[str] = Counter()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                given = _fields(row, benchmark)
            except UnicodeDecodeError:
                bad.append((number, "not UTF-8"))
            except (ValueError, RecursionError) as error:
                bad.append(
                    (number, f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error))
                )
            else:
                name = str(row["id"]) if row.get("id") is not None else f"line {number}"
                for response in given.pop("responses"):
                    sample = row["sample"] if type(row.get("sample")) is int else seen[name]
                    seen[name] += 1
                    rows.append({"id": name, "sample": sample, "line": number, **given, "response": response})
    # 2. A file without any generation is an error.
    if not rows:
        reasons = "; ".join(f"line {number}: {reason}" for number, reason in bad[:LISTED_BAD])
        raise EvalError(f"{path} holds no generation to grade ({reasons or 'it is empty'}).")
    return rows, bad


def _fields(row: Any, benchmark: str) -> dict[str, Any]:
    """{"responses", "gold", "problem"} of one row under whatever names it uses."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object with named fields")
    found = {
        field: next((row[name] for name in names if row.get(name) is not None), None) for field, names in FIELDS.items()
    }
    responses = found["response"] if isinstance(found["response"], list) else [found["response"]]
    if not responses or not all(isinstance(response, str) for response in responses):
        raise ValueError(
            f"no text under {' or '.join(FIELDS['response'])}; its fields are {', '.join(map(str, row)) or 'none'}"
        )
    gold = found["gold"]
    if benchmark == "math":
        source = next(
            (
                value
                for value in (gold, row.get("solution"))
                if isinstance(value, str) and last_boxed(value) is not None
            ),
            None,
        )
        gold = last_boxed(source) if source is not None else gold
    elif isinstance(gold, str):
        gold = gold.rsplit("####", 1)[-1]
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)  # pandas writes 18 as 18.0, and published conventions compare texts
    is_finite = not isinstance(gold, float) or math.isfinite(gold)
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or not str(gold).strip() or not is_finite:
        solution = " or a solution with \\boxed" if benchmark == "math" else ""
        raise ValueError(
            f"no gold answer under {' or '.join(FIELDS['gold'])}{solution}; its fields are {', '.join(map(str, row))}"
        )
    problem = found["problem"]
    return {"responses": responses, "gold": str(gold).strip(), "problem": problem if isinstance(problem, str) else ""}


def regrade(path: Path, benchmark: str) -> dict[str, Any]:
    """Scores under every convention, bad lines, how each convention compares with our own, and the rows of KINDS."""
    rows, bad = read_generations(path, benchmark)
    graded = grade_rows(rows, benchmark=benchmark)
    try:
        places = places_by_problem(rows)
    except ValueError as error:
        raise EvalError(f"{path}: {error}") from None
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for place, row in enumerate(rows):
        verdicts = {convention: graded[convention][place] for convention in CONVENTIONS}
        told = {key: row[key] for key in ("id", "sample", "line", "problem", "gold", "response")}
        for kind in _kinds(list(verdicts.values())):
            shown = {convention: asdict(verdict) for convention, verdict in verdicts.items()}
            found[kind].append({**told, "verdicts": shown})
    samples = [len(each) for each in places.values()]
    return {
        "file": str(path),
        "benchmark": benchmark,
        "rows": len(rows),
        "problems": len(places),
        "samples_per_problem": [min(samples), max(samples)],
        "scores": score_conventions(graded, places),
        **score_samples([[graded[VERIFIED][place] for place in each] for each in places.values()]),
        "against_verified": {
            convention: _against(graded[convention], graded[VERIFIED])
            for convention in CONVENTIONS
            if convention != VERIFIED
        },
        "bad_lines": [{"line": number, "reason": reason} for number, reason in bad],
        **found,
    }


def _kinds(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The KINDS of a row, by its verdict under each convention."""
    if any(verdict.correct is None for verdict in verdicts):
        yield "ungraded"
    decided = [verdict for verdict in verdicts if verdict.correct is not None]
    of_answers = {verdict.correct for verdict in decided if verdict.extracted is not None}
    if len(of_answers) > 1:
        yield "disagreements"
    elif not of_answers and decided:
        yield "no_answer"
    elif of_answers == {True} and any(verdict.extracted is None for verdict in decided):
        yield "answer_missing"


def _against(theirs: Sequence[Verdict], ours: Sequence[Verdict]) -> dict[str, int]:
    """Counts of rows by what two conventions make of them; they add up to all rows."""
    counts = dict.fromkeys(("agree", "disagree", "only_theirs", "only_ours", "neither", "ungraded"), 0)
    for one, other in zip(theirs, ours, strict=True):
        if one.correct is None or other.correct is None:
            counts["ungraded"] += 1
        elif one.extracted is not None and other.extracted is not None:
            counts["agree" if one.correct == other.correct else "disagree"] += 1
        elif one.extracted is None and other.extracted is None:
            counts["neither"] += 1
        else:
            counts["only_ours" if one.extracted is None else "only_theirs"] += 1
    return counts


def describe(result: Mapping[str, Any], *, show: int) -> str:
    """The result as text for a terminal, with at most `show` rows of each kind."""
    # 1. the scores
    fewest, most = result["samples_per_problem"]
    title = f"{result['file']}: {result['rows']} responses to {result['problems']} problems"
    if most > 1:
        title += f", {fewest if fewest == most else f'{fewest} to {most}'} samples of each\n{DEFINITION}"
    lines = [title, "", *convention_lines(result["scores"], result["benchmark"]), *sample_lines(result, VERIFIED)]

    # 2. bad lines
    bad = result["bad_lines"]
    if bad:
        lines += ["", f"warning: {len(bad)} lines hold no generation and are not counted"]
        lines += [f"  line {each['line']}: {visible(each['reason'])}" for each in bad[:LISTED_BAD]]
        lines += [f"  and {len(bad) - LISTED_BAD} more (--out lists all)"] if len(bad) > LISTED_BAD else []

    # 3. where conventions differ: about an answer, or because one of them found none
    lines += ["", *_against_lines(result["against_verified"])]
    for kind, meaning in KINDS.items():
        found = result[kind]
        lines += ["", f"{kind.replace('_', ' ')}, {len(found)} of {result['rows']} responses: {meaning}"]
        if found and show > 0:
            lines[-1] += f"; {min(show, len(found))} shown (--show N, --out FILE for all)"
        for each in found[: max(show, 0)]:
            lines += ["", *_describe_disagreement(each)] if kind == "disagreements" else [_describe_briefly(each)]
    return "\n".join(lines)


def _against_lines(against: Mapping[str, Mapping[str, int]]) -> list[str]:
    head = ("against verified", "agree", "disagree", "no answer here", "none in verified", "none in both", "ungraded")
    order = ("agree", "disagree", "only_ours", "only_theirs", "neither", "ungraded")
    return align(head, [(name, *(str(counts[key]) for key in order)) for name, counts in against.items()])


def _place(each: Mapping[str, Any]) -> str:
    return f"{visible(each['id'])}, sample {each['sample']}, line {each['line']}: gold {shorten(each['gold'], SHOWN)}"


def _describe_briefly(each: Mapping[str, Any]) -> str:
    """One line: the place, the conventions that found no answer or gave no verdict, and the answer of the others."""
    verdicts = each["verdicts"]
    ungraded = [name for name, verdict in verdicts.items() if verdict["correct"] is None]
    silent = [name for name in verdicts if name not in ungraded and verdicts[name]["extracted"] is None]
    found = next((verdict for verdict in verdicts.values() if verdict["extracted"] is not None), None)
    parts = [_place(each)]
    parts += [f"{'right' if found['correct'] else 'wrong'} {shorten(found['extracted'], SHOWN)}"] if found else []
    parts += [f"no answer found by {', '.join(silent)}"] if silent else []
    parts += (
        [f"ungraded by {', '.join(ungraded)} ({shorten(verdicts[ungraded[0]]['reason'], SHOWN)})"] if ungraded else []
    )
    return "  " + "; ".join(parts)


def _describe_disagreement(each: Mapping[str, Any]) -> list[str]:
    lines = [_place(each)]
    if each["problem"]:
        lines.append(f"  problem    {shorten(each['problem'], SHOWN)}")
    lines.append(f"  response   {_shorten_start(each['response'])}")
    for convention, verdict in each["verdicts"].items():
        word = {True: "right", False: "wrong", None: "ungraded"}[verdict["correct"]]
        extracted = "no answer found" if verdict["extracted"] is None else shorten(verdict["extracted"], SHOWN)
        lines.append(f"  {convention:<9}  {word:<8}  {extracted}")
    return lines


def _shorten_start(text: str) -> str:
    """The end of a text, where the answer is, in one line."""
    text = visible(" ".join(text[-4 * SHOWN :].split()))
    return text if len(text) <= SHOWN else "…" + text[1 - SHOWN :]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_name("eval/regrade.py"), description="Grade generations on file under every convention."
    )
    parser.add_argument("generations", type=Path, help="JSON lines with a response and a gold answer each")
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    parser.add_argument("--show", type=int, default=10, metavar="N", help="rows to list of each kind (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON, with all rows of each kind")
    options = parser.parse_args(arguments)
    wait_passively()
    try:
        result = regrade(options.generations, options.benchmark)
        print(describe(result, show=options.show))
        if options.out:
            write_json(options.out, result)
            print(f"\n{options.out}: all of this as JSON")
    except EvalError as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{options.generations} cannot be read ({error.strerror}). Give another file of JSON lines.", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
