"""The problems of GSM8K and MATH with their gold answers: from the Hub, from a file, or generated.

GSM8K   {"question": ..., "answer": "... #### 18"}                 gold "18", commas and signs as in the source
MATH    {"problem": ..., "solution": "... \\\\boxed{\\\\frac12} ..."}   gold "\\\\frac12", the last box
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import parse_json

from ..files import read_rows
from ..grader.text import last_boxed
from ..text import first_line

BENCHMARKS = ("gsm8k", "math")
BUILTIN = {"builtin": "test", "builtin_new_kinds": "new_kinds"}  # the splits of matrix_llm.data.wordproblems
BUILTIN_SEED, BUILTIN_PROBLEMS = 0, 512
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One problem of a benchmark."""

    id: str
    """Unique in its data set."""
    problem: str
    """The question as it is asked."""
    gold: str
    """The right answer: a number for GSM8K, LaTeX for MATH."""
    subject: str | None = None
    """Subject of a MATH problem; None elsewhere."""
    level: int | None = None
    """Level of a MATH problem, 1 to 5; None elsewhere."""


def problem_set_name(benchmark: str, *, data: str | None, subset: str | None) -> str:
    """The first part of a run's file names. A file called test.jsonl or like its benchmark adds nothing.

    >>> problem_set_name("gsm8k", data=None, subset=None)
    'gsm8k'
    >>> problem_set_name("gsm8k", data="a/backward_test.jsonl", subset=None)
    'gsm8k_backward_test'
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
    """All problems of a benchmark, in their own order.

    Args:
        data: a file, a key of BUILTIN, or None for the test set on the Hub.
        subset: "math500" or None.
        ids: a file with a JSON list of the ids to take from `data`.
        limit: how many problems must be generated at least. The limit itself is applied by `choose`.
    """
    # 1. rows
    if data in BUILTIN:
        if benchmark != "gsm8k":
            raise EvalError(
                f"--data {data} makes grade-school problems, so it cannot stand in for MATH. Use eval/gsm8k.py."
            )
        return _builtin(data, limit)
    if data is not None and data.startswith("builtin") and not Path(data).exists():
        from matrix_llm.base.values import nearest  # here: it needs numpy, and --help does not

        raise EvalError(f"--data {data}: generated problems are {' and '.join(BUILTIN)}.{nearest(data, BUILTIN)}")
    if data is not None:
        rows, source = list(read_rows(Path(data))), data
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
    # 2. problems
    if not rows:
        raise EvalError(f"{source} holds no rows, so there is nothing to measure.")
    stem = Path(data).stem if data else "test"
    problems = [_problem(benchmark, row, f"{benchmark}/{stem}/{index}", source) for index, row in enumerate(rows)]
    if ids is not None:
        problems = _pick(problems, Path(ids), source)
    elif subset == "math500" and data is not None and len(problems) > 500:
        raise EvalError(
            f"--subset math500: {data} holds {len(problems)} problems, and which 500 are meant is not in it. "
            "Give their ids with --ids FILE (a JSON list), or no --data to take HuggingFaceH4/MATH-500 from the Hub."
        )
    # 3. generations are stored by id
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise EvalError(
                f"{source}: the id {problem.id!r} occurs twice, so its generations could not be told apart. "
                "Make ids unique."
            )
        seen.add(problem.id)
    return problems


def choose(problems: Sequence[Problem], *, limit: int | None, shuffle_seed: int | None) -> list[Problem]:
    """The first `limit`, after a shuffle if a seed is given; returned in the order of `problems`."""
    order = list(range(len(problems)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    return [problems[index] for index in sorted(order[:limit])]


def _problem(benchmark: str, row: Mapping[str, Any], fallback_id: str, source: str) -> Problem:
    names = ("question", "problem", "query") if benchmark == "gsm8k" else ("problem", "question")
    text = next((row[name] for name in names if isinstance(row.get(name), str)), None)
    given = str(row.get("id") or row.get("unique_id") or fallback_id).removesuffix(".json")
    if not text:
        raise EvalError(
            f"{source}: row {given} has no text under {' or '.join(map(repr, names))}; "
            f"its columns are {', '.join(map(str, row))}. "
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
    level = re.search(r"\d{1,4}", str(row.get("level", "")))
    return Problem(given, text, gold, _subject(row, source, given), int(level.group()) if level else None)


def _subject(row: Mapping[str, Any], source: str, given: str) -> str | None:
    """The subject of a row as a text: scores are grouped and sorted by it."""
    name = "subject" if row.get("subject") else "type"
    subject = row.get(name)
    if isinstance(subject, (dict, list)):
        raise EvalError(
            f"{source}: row {given} has a {type(subject).__name__} as its {name!r}, where scores are grouped by "
            "a text. Write a text, or rename the column."
        )
    return None if subject is None or subject == "" else str(subject)


def _pick(problems: Sequence[Problem], path: Path, source: str) -> list[Problem]:
    """The problems whose ids are listed in `path`, in the order of the list."""
    try:
        wanted = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"--ids {path} cannot be read as a JSON list of ids: {first_line(error)}.") from None
    if not isinstance(wanted, list) or not wanted:
        raise EvalError(f"--ids {path} must hold a JSON list of at least one id.")
    by_id = {problem.id: problem for problem in problems}
    missing = [name for name in wanted if name not in by_id]
    if missing:
        raise EvalError(
            f"--ids {path}: {len(missing)} of {len(wanted)} ids are not in {source}, for example {missing[0]!r}."
        )
    return [by_id[name] for name in wanted]


def _builtin(data: str, limit: int | None) -> list[Problem]:
    from matrix_llm.data.wordproblems import generate

    split = BUILTIN[data]
    made = generate(max(limit or 0, BUILTIN_PROBLEMS), seed=BUILTIN_SEED, split=split)
    return [Problem(f"builtin/{split}/{index}", row.query, row.answer, row.type) for index, row in enumerate(made)]


def _hub(name: str, config: str | None = None) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, config, split="test"))
    except Exception as error:  # the Hub's client raises a dozen kinds
        raise EvalError(
            f"{name} cannot be loaded from the Hub ({first_line(error)}). Offline, give the file yourself: "
            "--data FILE.jsonl."
        ) from None
