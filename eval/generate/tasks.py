"""What a model can be scored on: a table of tasks, and the problems of each with their gold answers.

A task is a data set with its layout (`eval.generate.rows`), the rule that grades it ("gsm8k" or "math"), and how often
each problem is asked by default. `--task NAME` chooses one; `--data` reads its problems from elsewhere.

Ids, splits, columns and counts are those of the data sets' pages and of public code that reads them.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import parse_json

from ..text import first_line
from .rows import (
    Place,
    Problem,
    Reader,
    read_competition,
    read_instance,
    read_olympiad,
    read_perturbed,
    read_whole_number,
    read_word_problem,
)
from .sources import HubData, find_source, read_source

__all__ = ["BUILTIN", "TASKS", "Problem", "Task", "choose", "find_task", "load_problems", "problem_set_name"]

BUILTIN = {"builtin": "test", "builtin_new_kinds": "new_kinds"}  # the splits of matrix_llm.data.wordproblems
BUILTIN_SEED, BUILTIN_PROBLEMS = 0, 512
SUBSETS = ("math500",)
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How often each problem is asked, and at what temperature."""

    n: int
    """Samples of each problem."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """Sample from the likeliest tokens that hold this much probability."""


GREEDY = Sampling(1, 0.0, 1.0)
# For sets of 30 and 40 problems, which say little when each is asked once: the temperature and top-p of public scripts
# that measure reasoning models on them (open-r1's), and a number of samples that keeps 30 problems to 480 texts.
SIXTEEN = Sampling(16, 0.6, 0.95)


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    name: str
    """What --task takes; the first part of the names of a run's files."""
    title: str
    """Its usual name, for people."""
    rule: str
    """The rule that grades it: "gsm8k" (an amount) or "math" (a formula)."""
    data: HubData
    """Where its problems are on the Hub."""
    problems: int
    """How many there are."""
    read: Reader
    """From a row to a problem."""
    licence: str
    """Of the data set, as its page gives it; "not stated" where the page gives none."""
    sampling: Sampling = GREEDY
    """How its problems are asked unless --n, --temperature or --top_p is given."""


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("gsm8k", "GSM8K", "gsm8k", HubData("openai/gsm8k", configs=("main",)), 1319, read_word_problem, "MIT"),
        Task(
            "math", "MATH", "math", HubData("EleutherAI/hendrycks_math", configs=MATH_SUBJECTS), 5000,
            read_competition, "MIT",
        ),
        Task("math500", "MATH-500", "math", HubData("HuggingFaceH4/MATH-500"), 500, read_competition, "not stated"),
        Task(
            "aime24", "AIME 2024", "math",
            HubData("HuggingFaceH4/aime_2024", "train", revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
            30, read_whole_number, "not stated", SIXTEEN,
        ),
        Task(
            "aime25", "AIME 2025", "math",
            HubData("math-ai/aime25", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b"),
            30, read_whole_number, "not stated", SIXTEEN,
        ),
        Task(
            "amc23", "AMC 2023", "math",
            HubData("math-ai/amc23", revision="80815d37005feb82cd7f8fbc6901d5d3eff43057"),
            40, read_whole_number, "not stated", SIXTEEN,
        ),
        Task(
            "olympiadbench", "OlympiadBench (English text-only maths)", "math",
            HubData(
                "Hothan/OlympiadBench", "train", ("OE_TO_maths_en_COMP",), "91184b52131e7fc9455fef848035173aea8cc01a"
            ),
            674, read_olympiad, "Apache-2.0",
        ),
        Task(
            "gsm_plus", "GSM-Plus", "gsm8k",
            HubData("qintongli/GSM-Plus", revision="3b708db57b96a16e8e3368ed2956990c0809440e"),
            10552, read_perturbed, "CC-BY-SA-4.0",
        ),
        Task(
            "gsm_plus_mini", "GSM-Plus testmini", "gsm8k",
            HubData("qintongli/GSM-Plus", "testmini", revision="3b708db57b96a16e8e3368ed2956990c0809440e"),
            2400, read_perturbed, "CC-BY-SA-4.0",
        ),
        *(
            Task(
                name, title, "gsm8k",
                HubData("apple/GSM-Symbolic", configs=(config,), revision="93b5b3758d9d9841ffe81d6cd2ae2b030685b078"),
                problems, read_instance, "CC-BY-NC-ND-4.0",
            )
            for name, title, config, problems in (
                ("gsm_symbolic", "GSM-Symbolic", "main", 5000),
                ("gsm_symbolic_p1", "GSM-Symbolic P1", "p1", 5000),
                ("gsm_symbolic_p2", "GSM-Symbolic P2", "p2", 2500),
            )
        ),
    )
}  # fmt: skip


def find_task(name: str, subset: str | None = None) -> Task:
    """The task called `name`; --subset math500 is another way to write --task math500.

    Raises:
        EvalError: there is no such task, or the subset is not one of it.
    """
    if name not in TASKS:
        from matrix_llm.base.values import nearest  # here: it needs numpy, and --help does not

        raise EvalError(f"--task {name} is not known: {', '.join(TASKS)}.{nearest(name, TASKS)}")
    if subset is None:
        return TASKS[name]
    if subset not in SUBSETS:
        raise EvalError(f"--subset {subset} is not known. Known: {', '.join(SUBSETS)}.")
    if name not in ("math", subset):
        raise EvalError(f"--subset {subset} is a part of MATH, but --task is {name}. Leave one of them out.")
    return TASKS[subset]


def problem_set_name(task: str, *, data: str | None, subset: str | None) -> str:
    """The first part of a run's file names. A file called test.jsonl or like its task adds nothing.

    >>> problem_set_name("gsm8k", data=None, subset=None)
    'gsm8k'
    >>> problem_set_name("gsm8k", data="a/backward_test.jsonl", subset=None)
    'gsm8k_backward_test'
    >>> problem_set_name("gsm_symbolic", data="apple/GSM-Symbolic:p1:test", subset=None)
    'gsm_symbolic_apple_GSM-Symbolic_p1_test'
    """
    name = subset or task
    if data is None or (task in TASKS and data == TASKS[task].data.name):
        return name
    stem = Path(data).stem if data in BUILTIN or isinstance(find_source(data), Path) else data
    if stem in ("test", "gsm8k", "math", "math500", name):
        return name
    return f"{name}_{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)}"


def load_problems(
    task: str,
    *,
    data: str | None = None,
    subset: str | None = None,
    ids: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """All problems of a task, in their own order.

    Args:
        task: a key of TASKS.
        data: a file, a data set on the Hub (`eval.generate.sources`), a key of BUILTIN, or None for the task's own.
        subset: "math500" or None.
        ids: a file with a JSON list of the ids to take from `data`.
        limit: how many problems must be generated at least. The limit itself is applied by `choose`.
    """
    found = find_task(task, subset)
    # 1. rows
    if data is not None and _is_builtin(data):
        if found.name != "gsm8k":
            raise EvalError(
                f"--data {data} makes grade-school problems, so it cannot stand in for {found.title}. "
                "Use eval/gsm8k.py."
            )
        return _builtin(data, limit)
    source = find_source(data) if data is not None and data != found.data.name else found.data
    rows = read_source(source)
    # 2. problems
    if not rows:
        raise EvalError(f"{source} holds no rows, so there is nothing to measure.")
    stem = source.stem if isinstance(source, Path) else "test"
    prefix = "math" if found.name == "math500" else found.name  # MATH-500's problems are MATH's
    problems = [
        found.read(row, Place(str(source), number, f"{prefix}/{stem}/{number - 1}"))
        for number, row in enumerate(rows, 1)
    ]
    if ids is not None:
        problems = _pick(problems, Path(ids), str(source))
    elif subset == "math500" and isinstance(source, Path) and len(problems) > 500:
        raise EvalError(
            f"--subset math500: {data} holds {len(problems)} problems, and which 500 are meant is not in it. "
            "Give their ids with --ids FILE (a JSON list), or no --data to take HuggingFaceH4/MATH-500 from the Hub."
        )
    # 3. generations are stored by id
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            hint = " Rows with an 'instance' are GSM-Symbolic's: --task gsm_symbolic." if "instance" in rows[0] else ""
            raise EvalError(
                f"{source}: the id {problem.id!r} occurs twice, so its generations could not be told apart. "
                f"Make ids unique.{hint}"
            )
        seen.add(problem.id)
    return problems


def choose(problems: Sequence[Problem], *, limit: int | None, shuffle_seed: int | None) -> list[Problem]:
    """The first `limit`, after a shuffle if a seed is given; returned in the order of `problems`."""
    order = list(range(len(problems)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    return [problems[index] for index in sorted(order[:limit])]


def _is_builtin(data: str) -> bool:
    """Whether --data asks for generated problems.

    Raises:
        EvalError: it nearly does.
    """
    if data in BUILTIN:
        return True
    if data.startswith("builtin") and "/" not in data and not Path(data).exists():
        from matrix_llm.base.values import nearest  # here: it needs numpy, and --help does not

        raise EvalError(f"--data {data}: generated problems are {' and '.join(BUILTIN)}.{nearest(data, BUILTIN)}")
    return False


def _pick(problems: Sequence[Problem], path: Path, source: str) -> list[Problem]:
    """The problems whose ids are listed in `path`, in the order of the list."""
    try:
        wanted = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"--ids {path} cannot be read as a JSON list of ids: {first_line(error)}.") from None
    if not isinstance(wanted, list) or not wanted or not all(type(name) in (str, int) for name in wanted):
        raise EvalError(f"--ids {path} must hold a JSON list of at least one id, each a text or a whole number.")
    wanted = [str(name) for name in wanted]
    repeated = next((name for name, count in Counter(wanted).items() if count > 1), None)
    if repeated is not None:
        raise EvalError(f"--ids {path} lists the id {repeated!r} twice. List each problem once.")
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
