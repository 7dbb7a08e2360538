"""The problems of GSM8K and MATH with their gold answers: from the Hub, from a file, or generated. Standard library at import.

GSM8K   {"question": ..., "answer": "... #### 18"}                    gold "18", commas and signs as they stand
MATH    {"problem": ..., "solution": "... \\\\boxed{\\\\frac12} ..."}      gold "\\\\frac12", the content of the last box
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.conventions import last_boxed
from matrix_llm.base.errors import EvalError

BENCHMARKS = ("gsm8k", "math")
BUILTIN = "builtin"
BUILTIN_SEED, BUILTIN_PROBLEMS = 0, 512
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    gold: str
    subject: str | None = None
    level: int | None = None


def problem_set_name(benchmark: str, *, data: str | None, subset: str | None) -> str:
    """The first part of a run's file names. A file called test.jsonl or like its benchmark adds nothing.

    >>> problem_set_name("gsm8k", data=None, subset=None), problem_set_name("gsm8k", data="a/backward_test.jsonl", subset=None)
    ('gsm8k', 'gsm8k_backward_test')
    """
    name = subset or benchmark
    stem = Path(data).stem if data else "test"
    return (
        name
        if stem in ("test", "gsm8k", "math", "math500", name)
        else f"{name}_{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)}"
    )


def load_problems(
    benchmark: str,
    *,
    data: str | None = None,
    subset: str | None = None,
    ids: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """All problems in their own order. `limit` is a hint for what would be generated without end; `choose` is what limits."""
    if data == BUILTIN:
        if benchmark != "gsm8k":
            raise EvalError(
                "--data builtin makes grade-school problems, so it cannot stand in for MATH. Use eval/gsm8k.py."
            )
        return _builtin(limit)
    if data is not None:
        rows, source = read_rows(Path(data)), data
    elif benchmark == "gsm8k":
        rows, source = _hub("openai/gsm8k", "main"), "openai/gsm8k"
    elif subset == "math500":
        rows, source = _hub("HuggingFaceH4/MATH-500"), "HuggingFaceH4/MATH-500"
    else:
        source = "EleutherAI/hendrycks_math"
        rows = [
            {**row, "id": f"{subject}/test/{index}"}
            for subject in MATH_SUBJECTS
            for index, row in enumerate(_hub(source, subject))
        ]
    if not rows:
        raise EvalError(f"{source} holds no rows, so there is nothing to measure.")
    stem = Path(data).stem if data else "test"
    problems = [_problem(benchmark, row, f"{benchmark}/{stem}/{index}", source) for index, row in enumerate(rows)]
    if ids is not None:
        problems = _only(problems, Path(ids), source)
    elif subset == "math500" and data is not None and len(problems) > 500:
        raise EvalError(
            f"--subset math500: {data} holds {len(problems)} problems, and which 500 are meant is not in it. "
            "Give their ids with --ids FILE (a JSON list), or no --data to take HuggingFaceH4/MATH-500 from the Hub."
        )
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise EvalError(
                f"{source}: the id {problem.id!r} occurs twice, so its generations could not be told apart. Make ids unique."
            )
        seen.add(problem.id)
    return problems


def choose(problems: Sequence[Problem], *, limit: int | None, shuffle_seed: int | None) -> list[Problem]:
    """The first `limit`, after a shuffle if a seed is given; returned in the order of `problems`."""
    order = list(range(len(problems)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    return [problems[index] for index in sorted(order[:limit])]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json (a list, or one object a line) or .parquet file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise EvalError(
            f"--data {path} {what}. Give a .jsonl, .json or .parquet file, or leave --data out to load from the Hub."
        )
    if path.suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise EvalError(
                f"--data {path} cannot be read as parquet: {_first_line(error)}. Download it again."
            ) from None
    if path.suffix not in (".json", ".jsonl"):
        raise EvalError(f"--data {path} ends in {path.suffix!r}; known are .jsonl, .json and .parquet.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EvalError(f"--data {path} is not UTF-8 text. Convert it, or check that it is not compressed.") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        lines = [(1, text)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[Any] = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvalError(
                f"--data {path}, line {number}, is not JSON ({error.msg}). Repair or remove that line."
            ) from None
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise EvalError(f"--data {path}: row {number} is {type(row).__name__}, not an object with named fields.")
    return rows


def _problem(benchmark: str, row: Mapping[str, Any], fallback_id: str, source: str) -> Problem:
    names = ("question", "problem", "query") if benchmark == "gsm8k" else ("problem", "question")
    text = next((row[name] for name in names if isinstance(row.get(name), str)), None)
    given = str(row.get("id") or row.get("unique_id") or fallback_id).removesuffix(".json")
    if not text:
        raise EvalError(
            f"{source}: row {given} has no text under {' or '.join(map(repr, names))}; its columns are {', '.join(map(str, row))}. "
            "Rename the column."
        )
    if benchmark == "gsm8k":
        answer = row.get("answer")
        gold = str(answer).rsplit("####", 1)[-1].strip() if answer is not None else None
        wanted = "'answer' with the number, alone or after '#### '"
    else:
        solution, answer = row.get("solution"), row.get("answer")
        gold = last_boxed(solution) if isinstance(solution, str) else None
        gold = gold if gold is not None else (str(answer) if answer is not None else None)
        wanted = "'solution' with a \\boxed{...}, or 'answer'"
    if not gold:
        raise EvalError(
            f"{source}: row {given} has no gold answer; needed is {wanted}. Its columns are {', '.join(map(str, row))}."
        )
    level = re.search(r"\d+", str(row.get("level", "")))
    return Problem(given, text, gold, row.get("subject") or row.get("type"), int(level.group()) if level else None)


def _only(problems: Sequence[Problem], path: Path, source: str) -> list[Problem]:
    """The problems whose ids are listed in `path`, in the order of the list."""
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"--ids {path} cannot be read as a JSON list of ids: {_first_line(error)}.") from None
    if not isinstance(wanted, list) or not wanted:
        raise EvalError(f"--ids {path} must hold a JSON list of at least one id.")
    by_id = {problem.id: problem for problem in problems}
    missing = [name for name in wanted if name not in by_id]
    if missing:
        raise EvalError(
            f"--ids {path}: {len(missing)} of {len(wanted)} ids are not in {source}, for example {missing[0]!r}."
        )
    return [by_id[name] for name in wanted]


def _builtin(limit: int | None) -> list[Problem]:
    from matrix_llm.data.wordproblems import generate  # the only import from matrix_llm: problems, no model code

    made = generate(max(limit or 0, BUILTIN_PROBLEMS), seed=BUILTIN_SEED, split="test")
    return [Problem(f"builtin/test/{index}", row.query, row.answer, row.type) for index, row in enumerate(made)]


def _hub(name: str, config: str | None = None) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, config, split="test"))
    except Exception as error:  # the Hub's client raises a dozen kinds
        raise EvalError(
            f"{name} cannot be loaded from the Hub ({_first_line(error)}). Offline, give the file yourself: --data FILE.jsonl."
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
