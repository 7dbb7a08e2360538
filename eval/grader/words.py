"""Numbers in words: "twenty-five", "2 dozen", "3 halves", "5 squared", "10 choose 3", each as LaTeX.

A word after a number is its unit only where it changes nothing: 5 apples is 5, and 5 million is not.
"""

from __future__ import annotations

import re
from fractions import Fraction

from .latex import NOT_A_UNIT
from .text import read_rational

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
UNITS = {word: n for n, word in enumerate(DIGITS + TEENS)}
DECADES = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TENS = {word: 10 * n for n, word in enumerate(DECADES, 2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MULTIPLES = {"ten": 10, "dozen": 12, "score": 20, "hundred": 100, **SCALES}
PARTS = {
    word: Fraction(1, n)
    for n, words in enumerate(
        ("half halves", "third", "quarter fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), 2
    )
    for word in words.split()
} | {"hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000)}
POWERS = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}
SIGNS = {"times": r"\times", "plus": "+", "minus": "-", "divided by": r"\div", "over": r"\div"}

MIXED = re.compile(r"(-?\d{1,40})? ?\\frac\{(\d{1,40})\}\{(\d{1,40})\}")
NUMBER = re.compile(r"-?[\d.,]{1,60}(?:/\d{1,40})?|(?:-?\d{1,40} ?)?\\frac\{\d{1,40}\}\{\d{1,40}\}")
TWO_NUMBERS = re.compile(r"(-?[\d.]{1,40}) (choose|times|plus|minus|divided by|over) (-?[\d.]{1,40})")
LONGEST = 200


def spell_out(text: str) -> str | None:
    r"""The number that words spell, in LaTeX; None where no word takes part in the value.

    >>> spell_out("twenty-five"), spell_out("3 halves"), spell_out("2 dozen eggs"), spell_out("5 apples")
    ('25', '\\frac{3}{2}', '24', None)
    """
    text = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text.strip().lower()).removeprefix("a ")
    text = re.sub(r"(?<=hundred|million),(?= [a-z])|(?<=thousand),(?= [a-z])", " and", text)  # a list to `clean`
    if len(text) > LONGEST:
        return None
    between = TWO_NUMBERS.fullmatch(text)
    if between:
        first, sign, second = between.groups()
        return rf"\binom{{{first}}}{{{second}}}" if sign == "choose" else f"{first} {SIGNS[sign]} {second}"
    # 1. a number, in digits or in words
    digits = NUMBER.match(text)
    if digits:
        value, words = _read_digits(digits.group().strip()), text[digits.end() :].split()
        takes_part = False
    else:
        value, words = _read_cardinal(text.split())
        takes_part = value is not None
    if value is None:
        words, value = text.split(), Fraction(1)  # "half", "dozen eggs"
        if not words or _singular(words[0]) not in PARTS | MULTIPLES:
            return None
    # 2. what multiplies it, or a power
    power = ""
    while words and not power:
        word = _singular(words[0])
        if word not in PARTS and word not in MULTIPLES and words[0] not in POWERS:
            break
        value, power = value * PARTS.get(word, MULTIPLES.get(word, 1)), POWERS.get(words[0], "")
        words, takes_part = words[1:], True
        if words[:1] == ["a"] and words[1:] and _singular(words[1]) in MULTIPLES:  # half a dozen
            words = words[1:]
    # 3. what is counted
    rest = " ".join(words)
    is_unit = re.fullmatch(r"[a-z .]*", rest) and not NOT_A_UNIT.search(rest)
    if not takes_part or not is_unit or any(word in UNITS or word in TENS for word in words):
        return None
    number = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return f"({number}){power}" if power else number


def _singular(word: str) -> str:
    return word if word in PARTS or word in MULTIPLES else word.removesuffix("s")


def _read_digits(text: str) -> Fraction | None:
    mixed = MIXED.fullmatch(text)
    if not mixed:
        return read_rational(text)
    whole, top, bottom = mixed.groups()
    if int(bottom) == 0:
        return None
    part = Fraction(int(top), int(bottom))
    return part if whole is None else int(whole) + (-part if whole.startswith("-") else part)


def _read_cardinal(words: list[str]) -> tuple[Fraction | None, list[str]]:
    """(number, the words after it) of "two hundred and five apples"; (None, words) if it starts with no number."""
    total, group, taken = 0, 0, 0
    sign = -1 if words[:1] in (["minus"], ["negative"]) else 1
    start = 1 if sign < 0 else 0
    for place, word in enumerate(words[start:], start):
        value = UNITS.get(word, TENS.get(word))
        if value is not None and (group % 100 == 0 or (value < 10 and group % 100 >= 20 and group % 10 == 0)):
            group += value
        elif word == "hundred" and taken:
            group = max(group, 1) * 100
        elif word in SCALES and taken:
            total, group = total + max(group, 1) * SCALES[word], 0
        elif word == "and" and taken == place and words[place - 1] in MULTIPLES and words[place + 1 :]:
            continue
        else:
            break
        taken = place + 1
    return (Fraction(sign * (total + group)), words[taken:]) if taken else (None, words)
