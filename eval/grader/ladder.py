r"""Are two answers equal? A ladder from cheap to expensive checks, which is the equality of "verified".

1. the same string            4. structures and values (`eval.grader.equality`)
2. equal rationals            5. a number with what it counts: "18 eggs per day" for 18
3. the same cleaned LaTeX     6. math-verify in a process that can be killed (`eval.grader.symbolic`)
"""

from __future__ import annotations

import re
from functools import lru_cache

from . import symbolic
from .equality import same
from .expressions import LENGTH, UndecidedError
from .latex import NOT_A_UNIT, clean
from .structures import read_structure
from .text import read_rational

ANSWER = 2_000  # characters; a longer answer only equals itself

LEAD = re.compile(r"^(?:the |my )?(?:final |correct )?(?:answer|result|value)(?: is|:)?\s+", re.I)
BASE = re.compile(r"(?<=[0-9A-F])_(?:\d|\{ ?\d+ ?\})$")
COUNT_WORDS = {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
CHOICE = re.compile(r"^(?:\(([A-Za-z])\)(?: [^()]*)?|([A-Za-z])[).:](?: [^()]*)?|([A-Za-z]))$")
COUNTED = re.compile(r"^(-?[\d.,/]+) ([a-zA-Z][a-zA-Z ]*)$")


@lru_cache(maxsize=20_000)
def are_equal(given: str, gold: str) -> bool | None:
    """Whether two answers are equal; None if a limit was reached before that was decided."""
    # 1. strings
    given, gold = given.strip(), gold.strip()
    if given == gold:
        return bool(gold)
    if not given or not gold or len(given) > ANSWER or len(gold) > ANSWER:
        return False

    # 2. rationals
    a, b = read_rational(given), read_rational(gold)
    if a is not None and b is not None:
        return a == b

    # 3. cleaned LaTeX, words for numbers, letters of a choice, bases
    answer, wanted = clean(LEAD.sub("", given)), clean(gold)
    if not answer or not wanted:
        return False
    if _close_up(answer) == _close_up(wanted) or _is_same_text(answer, wanted):
        return True
    answer, wanted = (COUNT_WORDS.get(text.lower(), text) for text in (answer, wanted))
    choice = CHOICE.match(answer)
    if choice and re.fullmatch(r"\(?[A-Z]\)?", wanted):  # "(C) 12 apples" for C
        return next(filter(None, choice.groups())).upper() == wanted.strip("()")
    if BASE.search(answer) is None or BASE.search(wanted) is None:  # the question gave the base: 664 for 664_7
        answer, wanted = BASE.sub("", answer), BASE.sub("", wanted)
        if answer == wanted:
            return True

    # 4. structures and values; 50\% is both 50 and 0.5
    is_percentage = r"\%" in answer or r"\%" in wanted
    if is_percentage and _same_or_none(answer.replace(r"\%", ""), wanted.replace(r"\%", "")):
        return True
    verdict = _same_or_none(answer, wanted)
    if verdict is not None:
        return verdict

    # 5. a number with what it counts
    counted, number = COUNTED.match(answer), read_rational(wanted)
    if counted and number is not None and not NOT_A_UNIT.search(counted.group(2)):
        return read_rational(counted.group(1)) == number

    # 6. sympy, which has nothing to add to words and bases
    if _is_prose(answer) or _is_prose(wanted) or BASE.search(answer) or BASE.search(wanted):
        return False
    if max(len(answer), len(wanted)) > LENGTH // 2:
        return None
    return symbolic.equal(given, gold)


def _same_or_none(answer: str, wanted: str) -> bool | None:
    try:
        return same(read_structure(answer), read_structure(wanted))
    except UndecidedError:
        return None


def _close_up(text: str) -> str:
    """Without spaces, but "1 2" stays two numbers."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _is_same_text(answer: str, wanted: str) -> bool:
    """Words alike up to case, quotes and dots of abbreviations. Nothing that counts in mathematics is dropped."""
    if not re.search(r"[A-Za-z]{2}", wanted) or "\\" in answer + wanted:
        return False
    a, b = (re.sub(r"(?<=[a-z])\.|[\"'`]", "", _close_up(text.lower())) for text in (answer, wanted))
    return a == b


def _is_prose(text: str) -> bool:
    """Words or a time of day rather than a formula."""
    if re.search(r"\b[ap]\.? ?m\b", text, re.I):
        return True
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", text)) or not re.search(r"[\d\\=^]", text)
