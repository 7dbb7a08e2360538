r"""Are two answers equal? A ladder from cheap to expensive checks, which is the equality of "verified".

1. the same string            5. percentages
2. equal rationals            6. structures and values (`eval.grader.equality`)
3. amounts with units         7. a number with what it counts: "18 eggs per day" for 18
4. the same cleaned LaTeX     8. math-verify in a process that can be killed (`eval.grader.symbolic`)

The first rung that can decide, decides.
"""

from __future__ import annotations

import re
from functools import lru_cache

from . import symbolic
from .equality import same
from .errors import TooLargeError, UndecidedError, UngradedError
from .expressions import LENGTH
from .latex import NOT_A_UNIT, clean
from .structures import read_structure
from .text import read_rational
from .units import read_amount
from .words import spell_out

ANSWER = 2_000  # characters; a longer answer only equals itself

LEAD = re.compile(r"^(?:the |my )?(?:final |correct )?(?:answer|result|value)(?: is|:)?\s+", re.I)
BASE = re.compile(r"^(-?(?=[^_]*[0-9])[0-9A-F]+)_(?:[0-9]|\{ ?[0-9]+ ?\})$")
CHOICE = re.compile(r"^(?:\(([A-Z])\)(?: [^()]*)?|([A-Z])[).:](?: [^()]*)?|([A-Z]))$")
COUNTED = re.compile(r"^(-?[\d.,/]+) ([a-zA-Z][a-zA-Z ]*)$")
LETTER_UNIT = re.compile(r"^(-?[\d.,/]+) [msghLNJWVKCA](?:\^\{?[23]\}?)?$")  # with a space: "12 m", not 12m
LISTED = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")
UNDEFINED = ("undefined", "does not exist", "dne", "not defined")


def compare(given: str, gold: str) -> bool:
    """Whether two answers are equal.

    Raises:
        UngradedError: a limit was reached before that was decided.
    """
    given, gold = given.strip(), gold.strip()
    if given == gold:
        return bool(gold)
    if not given or not gold or len(given) > ANSWER or len(gold) > ANSWER:
        return False
    return _compare(given, gold)


@lru_cache(maxsize=20_000)
def _compare(given: str, gold: str) -> bool:
    # 2. rationals
    a, b = read_rational(given), read_rational(gold)
    may_be_lists = bool(LISTED.search(given) or LISTED.search(gold))
    if a is not None and b is not None and (a == b or not may_be_lists):
        return a == b

    # 3. amounts
    verdict = _compare_amounts(given, gold)
    if verdict is not None:
        return verdict

    # 4. cleaned LaTeX, words for numbers, letters of a choice, bases
    answer, wanted = clean(LEAD.sub("", given)), clean(gold)
    if not answer or not wanted:
        return False
    if _close_up(answer) == _close_up(wanted) or _is_same_text(answer, wanted):
        return True
    answer, wanted = (spell_out(text) or text for text in (answer, wanted))
    choice = CHOICE.match(answer)
    if choice and re.fullmatch(r"\(?[A-Z]\)?", wanted):  # "(C) 12 apples" for C
        return next(filter(None, choice.groups())) == wanted.strip("()")
    if BASE.search(answer) is None or BASE.search(wanted) is None:  # the question gave the base: 664 for 664_7
        answer, wanted = BASE.sub(r"\1", answer), BASE.sub(r"\1", wanted)
        if answer == wanted:
            return True
    letter_unit = LETTER_UNIT.match(answer)
    if letter_unit and read_rational(wanted) is not None:
        answer = letter_unit.group(1)

    # 5. and 6. percentages, structures and values
    verdict = _compare_values(answer, wanted)
    if not verdict and may_be_lists:  # 100,200 may be two numbers
        lists = clean(LEAD.sub("", given), commas_separate=True), clean(gold, commas_separate=True)
        if "," in lists[0] and "," in lists[1] and _same_or_none(*lists):
            return True
    if verdict is not None:
        return verdict

    # 7. a number with what it counts
    counted, number = COUNTED.match(answer), read_rational(wanted)
    if counted and number is not None and not NOT_A_UNIT.search(counted.group(2)):
        return read_rational(counted.group(1)) == number

    # 8. sympy, which has nothing to add to words and bases; an approximation equals nothing
    if r"\approx" in answer or r"\approx" in wanted:
        return False
    if _is_prose(answer) or _is_prose(wanted) or BASE.search(answer) or BASE.search(wanted):
        return False
    if max(len(answer), len(wanted)) > LENGTH // 2:
        raise UngradedError("too long for math-verify")
    return symbolic.equal(given.replace("$", ""), gold.replace("$", ""))


def _compare_amounts(given: str, gold: str) -> bool | None:
    """A verdict where both sides give units, or one adds several units up; None otherwise."""
    amount, wanted = read_amount(given), read_amount(gold)
    if amount and wanted:
        return (amount.kind, amount.power, amount.size) == (wanted.kind, wanted.power, wanted.size)
    if not amount and not wanted:
        return None
    number = read_rational(gold if amount else given)
    one = amount or wanted
    if number is None or one is None:
        return None
    if len(one.readings) > 1:
        return number in one.readings
    if one.kind == "money":  # 25 cents is 25, and 0.25 of the dollars that a question may ask for
        return number in (*one.readings, one.size)
    return None


def _compare_values(answer: str, wanted: str) -> bool | None:
    r"""As structures and values; None if our algebra cannot tell.

    A percentage equals its value: 50\% is 0.5. Where the gold has the sign, the question asked for percents, and 50
    will do; where only the answer has it, the sign may be dropped from a number above 1, which is no probability.
    """
    sign = r"\%"
    if sign in wanted and sign not in answer and _same_or_none(answer, wanted.replace(sign, "")):
        return True
    if sign in answer and sign not in wanted and _same_or_none(answer.replace(sign, ""), wanted):
        number = read_rational(wanted)
        if number is not None and number > 1:
            return True
    return _same_or_none(answer, wanted)


def _same_or_none(answer: str, wanted: str) -> bool | None:
    try:
        return same(read_structure(answer), read_structure(wanted))
    except TooLargeError as limit:
        raise UngradedError(str(limit)) from None
    except UndecidedError:
        return None


def _close_up(text: str) -> str:
    """Without spaces, but "1 2" stays two numbers."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _is_same_text(answer: str, wanted: str) -> bool:
    """Words alike up to case, article, quotes and dots of abbreviations. Nothing that counts in mathematics is
    dropped.
    """
    if not re.search(r"[A-Za-z]{2}", wanted) or "\\" in answer + wanted:
        return False
    a, b = (re.sub(r"^(?:an?|the) (?=[a-z]{3})", "", text.lower()) for text in (answer, wanted))
    if a in UNDEFINED and b in UNDEFINED:
        return True
    a, b = (re.sub(r"(?<=[a-z])\.|[\"'`]", "", _close_up(text)) for text in (a, b))
    return a == b


def _is_prose(text: str) -> bool:
    """Words or a time of day rather than a formula."""
    if re.search(r"\b[ap]\.? ?m\b", text, re.I):
        return True
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", text)) or not re.search(r"[\d\\=^]", text)
