r"""Golds that say more than one value: a tolerance, or that a question has no answer.

    "4.2 (to within 0.1)"   4.15 is right too: OlympiadBench gives such an `error` with some answers
    "None"                  what GSM-Plus writes where a question lacks a fact: a response is right if it says so

They are texts, so that they pass through files, `regrade` and rewards like any other gold.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from .errors import UndecidedError
from .find_number import find_gsm8k
from .kinds import Equation, Formula, names_a_quantity
from .latex import clean
from .statements import Found, own_words, statements
from .structures import read_structure
from .text import answer_in_last_box
from .values import exact_value, real_value

UNANSWERABLE = "None"
WITHIN = re.compile(r"(.*\S) \(to within (\d{1,20}(?:\.\d{1,20})?)\)\s*", re.S)
ROUNDING = Fraction(1, 10**30)  # of a value that is no rational

_TOLD = r"(?:provid|specif|mention|stat|giv|sa[iy]|t[eo]l[dl]|includ|indicat|list|kn[oe]wn?|clear|available|defined)"
_FACTS = r"(?:information|data|details)"
LACKS = re.compile(  # a fact is missing, or the question cannot be answered
    rf"(?:\bnot|n't|\bnever) (?:\w+ ){{0,2}}{_TOLD}|\b(?:unknown|unspecified|undetermined)\b"
    r"|(?:\bnot|n't) (?:\w+ ){0,2}(?:enough|sufficient|how (?:many|much|long|old|far|often))\b"
    rf"|\binsufficient (?:\w+ )?{_FACTS}|\black(?:s|ing)? (?:\w+ ){{0,2}}{_FACTS}|\bmissing (?:\w+ ){{0,2}}{_FACTS}"
    rf"|\b{_FACTS} (?:is|are) missing|\b(?:more|additional|further) {_FACTS}\b|\bwithout (?:knowing|more|further)\b"
    r"|\b(?:cannot|can't|can not|could not|couldn't|unable to|impossible to|not possible to) (?:be )?"
    r"(?:determine|calculate|compute|find|found|answer|know|solve|say|tell|give|provide)",
    re.I,
)
NOTHING = re.compile(r"[\s*$(\[{\"'\\]*(?:text\{)?(?:none|unknown|undetermined|n/a)\W*$", re.I)
AMOUNT = re.compile(r"[\s*$(\[{\"'\\]*-?\.?\d")
SENTENCES = 5  # of a response that states no answer, from the end


def with_tolerance(gold: str, tolerance: float) -> str:
    """
    >>> with_tolerance("4.2", 1e-1)
    '4.2 (to within 0.1)'
    """
    return f"{gold} (to within {Decimal(str(tolerance)):f})"


def split_tolerance(gold: str) -> tuple[str, Fraction | None]:
    """
    >>> split_tolerance("4.2 (to within 0.1)"), split_tolerance("4.2")
    (('4.2', Fraction(1, 10)), ('4.2', None))
    """
    found = WITHIN.fullmatch(gold[-200:]) if gold.endswith(")") else None
    return (gold[: -len(gold[-200:])] + found[1], Fraction(found[2])) if found else (gold, None)


def is_within(answer: str, gold: str, tolerance: Fraction) -> bool:
    r"""Whether two single values are at most `tolerance` apart. A percent sign is dropped, as in policy.

    >>> is_within("r = 4.17\\%", "4.2", Fraction(1, 10)), is_within("4.4", "4.2", Fraction(1, 10))
    (True, False)
    """
    a, b = _value(answer), _value(gold)
    return a is not None and b is not None and bool(abs(a - b) <= tolerance + ROUNDING)


def _value(text: str) -> Fraction | None:
    try:
        structure = read_structure(clean(text.replace("\\%", "").replace("%", "")))
    except UndecidedError:
        return None
    if isinstance(structure, Equation) and names_a_quantity(structure.left):
        structure = structure.right
    if not isinstance(structure, Formula):
        return None
    exact = exact_value(structure.expression)
    if exact is not None:
        return exact
    real = real_value(structure.expression)
    return None if real is None or abs(real) > 10**60 else Fraction(int(real * 10**40), 10**40)


def find_unanswerable(response: str) -> Found:
    """ "None" if a response says that its question cannot be answered; else what it gives instead.

    What it states as its answer counts; without a statement, how it ends. "The price is not given. Assuming 5 dollars
    it is 15. #### 15" gives an answer.

    >>> find_unanswerable("The problem does not say how much one costs, so the total cannot be determined.").answer
    'None'
    >>> find_unanswerable("The price is not given. Assuming 5 dollars, #### 15").answer
    '15'
    """
    text = own_words(response)
    if text is None:
        return Found(None, "the reasoning was cut off")
    place, boxed = answer_in_last_box(text)
    stated = statements(text, after=max(place, 0))
    final = stated[0][1].lstrip().split("\n", 1)[0] if stated else boxed
    lacks = _concludes_without(text[-2000:]) if final is None else _is_nothing(final)
    return Found(UNANSWERABLE) if lacks else find_gsm8k(response)


def _is_nothing(statement: str) -> bool:
    """Whether a stated answer is that there is none."""
    return AMOUNT.match(statement) is None and bool(NOTHING.match(statement) or LACKS.search(statement))


def _concludes_without(text: str) -> bool:
    """Whether the last sentence that holds a number or says that something is missing does the latter."""
    sentences = [part for part in re.split(r"(?<=[a-z)%\d])[.!?](?:\s|$)|\n", text) if part.strip()]
    for sentence in sentences[: -SENTENCES - 1 : -1]:
        if LACKS.search(sentence):
            return True
        if re.search(r"\d", sentence):
            return False
    return False
