r"""From one row of a data set to a checked `Problem`: one reader for each layout in which a benchmark is published.

    read_word_problem     {"question": ..., "answer": "... #### 18"}                        gold "18"
    read_competition      {"problem": ..., "solution": "... \\boxed{\\frac12}"}             gold "\\frac12", of the box
    read_whole_number     {"problem": ..., "answer": "033"}, or 27.0                        gold "33", "27"
    read_olympiad         {"question": ..., "final_answer": ["$1$, $2$"], "error": "1e-1"}  gold "1, 2", a tolerance
    read_perturbed        {"question": ..., "answer": "None", "seed_question": ...}         gold "None": unanswerable
    read_instance         {"id": 3, "instance": 7, "answer": "... #### 18", ...}            id "3/7", a template

A row that cannot be read raises; none is left out.
"""

import ast
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from matrix_llm.base.errors import EvalError

from ..grader.golds import UNANSWERABLE, with_tolerance
from ..grader.text import last_boxed

Row = Mapping[str, Any]

QUESTION = ("question", "problem", "query")
PROBLEM = ("problem", "question")
WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
DEGREES = re.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*$")


@dataclass(frozen=True)
class Problem:
    """One problem of a benchmark."""

    id: str
    """Unique in its data set."""
    problem: str
    """The question as it is asked."""
    gold: str
    """The right answer: a number for GSM8K and its like, LaTeX for MATH and its like."""
    subject: str | None = None
    """The group that it is scored with: a subject of MATH, a perturbation of GSM-Plus; None where there are none."""
    level: int | None = None
    """Level of a MATH problem, 1 to 5; None elsewhere."""
    template: str | None = None
    """What the problem was made from. Problems of one template are no independent draws; None where each is its own."""


@dataclass(frozen=True)
class Place:
    """Where a row was read, for its error message and for a row without an id."""

    source: str
    """The file, or the data set on the Hub."""
    number: int
    """Of the row, from 1."""
    fallback: str
    """The id of a row that has none."""

    def error(self, row: Row, fault: str, way_out: str) -> EvalError:
        columns = ", ".join(map(str, row)) or "none"
        return EvalError(f"{self.source}: row {self.number} {fault}; its columns are {columns}. {way_out}")


Reader = Callable[[Row, Place], Problem]


# --- one for each layout ----------------------------------------------------------------------------------------------


def read_word_problem(row: Row, place: Place) -> Problem:
    """GSM8K: the number after "####", or an answer that is the number."""
    text, answer = _question(row, place, QUESTION), _number(_cell(row, "answer"))
    gold = _text(answer, row, place).rsplit("####", 1)[-1].strip() if answer is not None else ""
    if not gold:
        raise place.error(row, "has no gold answer", "Needed is 'answer' with the number, alone or after '#### '.")
    return Problem(_id(row, place), text, gold, _subject(row, place), _level(row))


def read_competition(row: Row, place: Place) -> Problem:
    """MATH: the last box of the solution, else the answer."""
    text, solution, answer = _question(row, place, PROBLEM), _cell(row, "solution"), _number(_cell(row, "answer"))
    gold = last_boxed(solution) if isinstance(solution, str) else None
    if gold is None and answer is not None:
        gold = _text(answer, row, place)
    if not gold:
        raise place.error(row, "has no gold answer", "Needed is 'solution' with a \\boxed{...}, or 'answer'.")
    return Problem(_id(row, place), text, gold, _subject(row, place), _level(row))


def read_whole_number(row: Row, place: Place) -> Problem:
    """AIME and AMC 23: an integer, however it is written: 33, "033", 27.0 and "336^\\circ" are 33, 33, 27 and 336.

    The solution is looked at only where there is no answer: solutions copied from forums box other things as well.
    """
    text, answer = _question(row, place, PROBLEM), _number(_cell(row, "answer"))
    if answer is None or answer == "":
        answer = last_boxed(str(_cell(row, "solution") or ""))
    if answer is None:
        raise place.error(row, "has no gold answer", "Needed is 'answer' with the number, or a box in 'solution'.")
    found = WHOLE.fullmatch(DEGREES.sub("", str(answer).strip().strip("$").replace(",", "")))
    if found is None:
        raise place.error(row, f"has the answer {str(answer)[:40]!r}, where each is an integer", "Correct it.")
    gold = ("-" if found[1] == "-" and found[2] != "0" else "") + found[2]
    return Problem(_id(row, place), text, gold, _subject(row, place), _level(row))


def read_olympiad(row: Row, place: Place) -> Problem:
    """OlympiadBench: a list of final answers, a tolerance for some, and perhaps a context before the question."""
    answers = _list(_cell(row, "final_answer"))
    if not answers:
        raise place.error(row, "has no gold answer", "Needed is 'final_answer', a list of texts.")
    texts = [_text(answer, row, place, "final_answer") for answer in answers]
    golds = [re.sub(r"(?<!\\)\$", "", text).strip().strip(",").strip() for text in texts]
    if not all(golds):
        raise place.error(row, f"has an empty text in 'final_answer': {answers}", "Remove it.")
    context, question = _none(_cell(row, "context")), _question(row, place, PROBLEM)
    text = f"{context}\n{question}" if context else question
    subject = _none(_cell(row, "subfield")) or _subject(row, place)
    gold, tolerance = ", ".join(golds), _tolerance(row, place)
    gold = gold if tolerance is None else with_tolerance(gold, tolerance)
    return Problem(_id(row, place), text, gold, subject, _level(row))


def read_perturbed(row: Row, place: Place) -> Problem:
    """GSM-Plus: as GSM8K, but a question may lack a fact; the eight variations of a question are one template."""
    if _none(_cell(row, "answer")) is None and "answer" in row:
        row = {**row, "answer": UNANSWERABLE}
    read = read_word_problem({**row, "type": _cell(row, "perturbation_type")}, place)
    seed = _cell(row, "seed_question")
    template = hashlib.sha256(seed.encode()).hexdigest()[:12] if isinstance(seed, str) and seed else None
    return Problem(read.id, read.problem, read.gold, read.subject, read.level, template)


def read_instance(row: Row, place: Place) -> Problem:
    """GSM-Symbolic: as GSM8K; `id` is that of the template, and `instance` tells its problems apart."""
    read = read_word_problem(row, place)
    template, instance = _cell(row, "id"), _cell(row, "instance")
    if template is None or instance is None:
        return read
    return Problem(f"{template}/{instance}", read.problem, read.gold, read.subject, read.level, str(template))


# --- columns ----------------------------------------------------------------------------------------------------------


def _cell(row: Row, name: str) -> Any:
    """The value of a column, whose name may be capitalised ("Problem"); None if there is none, or NaN, which is how
    pandas writes that.
    """
    value = row[name] if name in row else next((row[key] for key in row if str(key).lower() == name), None)
    return None if isinstance(value, float) and math.isnan(value) else value


def _question(row: Row, place: Place, names: tuple[str, ...]) -> str:
    text = next((found for name in names if isinstance(found := _cell(row, name), str)), None)
    if not text:
        raise place.error(row, f"has no text under {' or '.join(map(repr, names))}", "Rename the column.")
    if re.search("[\ud800-\udfff]", text):
        raise place.error(row, "has half of a surrogate pair in its question, which no tokenizer reads", "Remove it.")
    return text


def _id(row: Row, place: Place) -> str:
    given = next((cell for name in ("id", "unique_id") if (cell := _cell(row, name)) not in (None, "")), place.fallback)
    return str(given).removesuffix(".json")


def _level(row: Row) -> int | None:
    level = re.search(r"\d{1,4}", str(_cell(row, "level")))
    return int(level.group()) if level else None


def _subject(row: Row, place: Place) -> str | None:
    """The subject of a row as a text: scores are grouped and sorted by it."""
    name = "subject" if _cell(row, "subject") else "type"
    subject = _cell(row, name)
    if isinstance(subject, (dict, list)):
        raise place.error(
            row,
            f"has a {type(subject).__name__} as its {name!r}, where scores are grouped by a text",
            "Write a text, or rename the column.",
        )
    return None if subject is None or subject == "" else str(subject)


def _number(value: Any) -> Any:
    """A whole number without its ".0": pandas writes 27 as 27.0, and published conventions compare texts."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\.0\s*", value):
        return value.strip().removesuffix(".0")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(answer: Any, row: Row, place: Place, column: str = "answer") -> str:
    way_out = "An answer is a text or a number: write it so."
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal):
        raise place.error(row, f"has a {type(answer).__name__} as its {column!r}", way_out)
    if isinstance(answer, float) and not math.isfinite(answer):
        raise place.error(row, f"has the number {answer} as its {column!r}", way_out)
    return str(answer)


def _none(value: Any) -> str | None:
    """A text; None for null, "" and "None", which is how some copies of a data set write null."""
    return None if value is None or str(value).strip() in ("", "None", "null") else str(value)


def _list(value: Any) -> list[Any]:
    """The items of a list, or of its Python notation, which is how some copies of a data set hold it."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
    if isinstance(value, str) and value.strip():
        return [value]
    return list(value) if isinstance(value, (list, tuple)) else []


def _tolerance(row: Row, place: Place) -> float | None:
    """The `error` of a row. OlympiadBench's scorer gives each of several answers its own; one for all is read here."""
    given = _none(_cell(row, "error"))
    if given is None:
        return None
    try:
        tolerance = float(given)
    except ValueError:
        tolerance = float("nan")
    if not 0 <= tolerance < float("inf"):
        raise place.error(row, f"has the 'error' {given[:40]!r}", "Needed is one number, 0 or more.")
    return tolerance or None
