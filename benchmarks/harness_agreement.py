"""Scores of eval/gsm8k.py beside those of lm-evaluation-harness: the same problems, compared one by one.

    python benchmarks/harness_agreement.py "ours, vLLM=OUT/gsm8k.jsonl" "harness, hf=THEIRS/samples_TASK_DATE.jsonl" \
        --model MODEL --rows rows.jsonl
    python benchmarks/harness_agreement.py --tables rows.jsonl

Prints how often any two runs wrote the same text and why not, how near the other token was where two texts part (with
--model, in float32), and how often the rules of the two programs agree on one text. Tasks for the harness that ask as
eval/gsm8k.py does are in benchmarks/lm_eval/. Needs no installed harness.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.agreement.answers import Answers, read_answers
from benchmarks.agreement.tables import all_tables, make_rows
from benchmarks.agreement.tokens import Reader
from eval.files import read_rows
from matrix_llm.base.console import fail
from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import write_text


def read_runs(named: Sequence[str]) -> dict[str, Answers]:
    """{name: answers} of arguments NAME=FILE.

    Raises:
        EvalError: an argument without a name, a name given twice, or two runs without a common problem.
    """
    runs: dict[str, Answers] = {}
    for argument in named:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise EvalError(f"{argument!r} is not NAME=FILE, such as ours=OUT/gsm8k.jsonl.")
        if name in runs:
            raise EvalError(f"the name {name!r} is given twice. Give each run its own.")
        runs[name] = read_answers(Path(path))
    if len(runs) < 2:
        raise EvalError("one run cannot be compared. Give NAME=FILE at least twice, or --tables ROWS.")
    names = list(runs)
    for name in names[1:]:
        common = runs[names[0]].keys() & runs[name].keys()
        if not common:
            raise EvalError(f"{names[0]!r} and {name!r} have no problem in common. Give runs over the same test file.")
        wrong = [i for i in sorted(common) if runs[names[0]][i].gold != runs[name][i].gold]
        if wrong:
            raise EvalError(
                f"{names[0]!r} and {name!r} have different gold answers for problem {wrong[0]}. "
                "Give runs over the same test file."
            )
    return runs


def _stored_rows(path: Path, *, with_others: bool) -> list[dict[str, Any]]:
    if with_others:
        raise EvalError(f"--tables {path} prints rows on file. Leave NAME=FILE, --model and --rows out.")
    rows = list(read_rows(path))
    if not any("run" in row for row in rows):
        raise EvalError(f"--tables {path} holds no rows of a run. Give a file that --rows wrote.")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=FILE", help="NAME.jsonl of ours, or the harness's samples")
    parser.add_argument("--model", type=Path, help="folder of the model, to see how near the other token was")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write the rows behind the tables, without any text")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="print the tables of rows on file")
    options = parser.parse_args(arguments)
    try:
        if options.tables:
            rows = _stored_rows(options.tables, with_others=bool(options.runs or options.model or options.rows))
        else:
            runs = read_runs(options.runs)
            rows = make_rows(runs, Reader(options.model) if options.model else None)
        if options.rows:
            write_text(options.rows, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(all_tables(rows))
    except EvalError as error:
        return fail(str(error), 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
