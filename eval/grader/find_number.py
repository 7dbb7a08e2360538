r"""The answer that a reader would take from a response to a GSM8K problem: an amount, as written.

    find_gsm8k("The answer is 2 dozen, i.e. 24 eggs.").answer     -> "24"
    find_gsm8k("#### 18\nWe started with 16 eggs.").answer        -> "18"

A statement that starts with an amount ("#### 18", "The answer is $3 thousand", a box) outranks later remarks. What
goes on after the number is part of it where it changes the value: "5 or 6", "7 1/2", "20 + 5", "3:45". Without any
statement, the last result counts.
"""

from __future__ import annotations

import re

from .latex import clean
from .statements import NUMBER, REFUSAL, Found, ends_in_a_loop, own_words, statements
from .text import answer_in_last_box, read_rational
from .units import read_amount
from .words import spell_out

VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
DASHES = str.maketrans(dict.fromkeys("\u2212\u2012\u2013\u2014\ufe63\uff0d", "-"))
LEAD = re.compile(
    r"^[\s*:=~\"'(\[]*(?:(?:approximately|about|exactly|only|simply|just|a total of|=) |[a-zA-Z] ?= ?"
    r"|\\\(|\\\[|\\text ?\{|\$(?=[^$\n]{1,80}\$))*[\s*]*"
)
ONE = (
    r"-?[$€£]?-?(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+(?!\d))(?:\.\d+)?|\d{1,3}(?:\.\d{3})+,\d{2}(?!\d)"
    r"|\d+(?:\.\d+)?|\.\d+)"
)
AMOUNT = re.compile(
    rf"(?P<number>{ONE}(?:[eE][-+]?\d+)?(?: ?\^ ?\{{?-?\d+\}}?| \d+ ?/ ?\d+| ?/ ?\d+)?%?)"
    r"(?P<scale> ?(?:dozens?|hundreds?|thousands?|millions?|billions?|trillions?|hal(?:f|ves)|thirds?|quarters?)\b)?"
)
FRACTION = re.compile(r"(-?)(\d* ?)\\[dt]?frac ?\{(-?\d+)\} ?\{(\d+)\}")
GOES_ON = re.compile(  # what makes a number part of something else
    rf"^(?::\d\d(?!\d)|-\d| ?(?:[-+*/\u00d7\u00f7^]|\\times|\\cdot) ?{ONE}"
    rf"| (?:or|to|times|plus|minus) {ONE}|,? (?:and )?[a-zA-Z]+,? and {ONE} [a-z]+|,? [a-zA-Z] ?= ?{ONE})"
)
CALCULATION = re.compile(r"^(?!.*\b(?:if|where|when|because|since|as)\b)[^,;:]{0,80}[-+*/\u00d7\u00f7x][^,;:]{0,80}$")
SO = re.compile(rf"(?:,? so|,? i\.e\.,?|,? which is|,? or|,? that is,?|=) ?({ONE})(?![\d:])")
NOT = re.compile(r"not\b.{1,60}?(?:\bbut\b|\bit is\b|\bit's\b|\binstead\b)[, ]*", re.I | re.S)
BOLD_NUMBER = re.compile(r"\*\*[^*\n\d$-]{0,40}(" + NUMBER.pattern + r")[^*\n]{0,40}\*\*")
RESULT = re.compile(r"= ?(-?\$?-?[\d,]*\.?\d+)")
LIST_ITEM = re.compile(r"(?:^|\n)[ \t]*\d+[.)][ \t]*$")
WORDS = re.compile(r"^[a-zA-Z][a-zA-Z -]{1,60}")


def find_gsm8k(response: str) -> Found:
    text = own_words(response)
    if text is None:
        return Found(None, "the reasoning was cut off")
    for character, fraction in VULGAR.items():
        text = text.replace(character, f" {fraction}")
    text = text.translate(DASHES)
    # 1. statements that start with an amount, the last one first; then the box
    place, boxed = answer_in_last_box(text)
    stated = statements(text, after=max(place, 0))
    for _, rest in stated:
        amount = _amount_at_start(_tidy(rest))
        if amount is not None:
            return Found(amount)
    if boxed is not None:
        return Found(_amount_in_box(boxed))
    # 2. statements in prose
    for start, rest in stated:
        number = _concluding_number(_first_sentence(rest), text[:start] + rest)
        if number is not None:
            return Found(number)
    # 3. no statement: the last result
    if place >= 0:
        return Found(None, "the last box is empty or never closes")
    if ends_in_a_loop(text):
        return Found(None, "the response ends in a loop")
    if REFUSAL.search(text[-400:]):
        return Found(None, "the response gives up")
    if LIST_ITEM.search(text.rstrip()[-200:]):
        return Found(None, "the response was cut off")
    number = _concluding_number(text[-2000:], text)
    return Found(number) if number is not None else Found(None)


def _tidy(text: str) -> str:
    for mark, plain in (("\\$", "$"), ("\\!", ""), ("{,}", ","), ("\\,", ""), ("**", ""), ("\\%", "%")):
        text = text.replace(mark, plain)
    return text


def _first_sentence(text: str) -> str:
    line = text.lstrip().split("\n", 1)[0]
    return re.split(r"(?<=[^\d])\.(?:\s|$)|(?<=\d)\.\s+(?=[A-Z])", line, maxsplit=1)[0]


def _amount_at_start(text: str) -> str | None:
    """The amount with which a statement starts, with all that belongs to its value; None if it starts otherwise."""
    text = LEAD.sub("", text, count=1)
    text = NOT.sub("", text, count=1) if text[:4].lower() == "not " else text
    sentence = _first_sentence(text)
    # 1. digits, in LaTeX or plain; or words
    fraction = FRACTION.match(sentence)
    if fraction:
        sign, whole, top, bottom = fraction.groups()
        return f"{sign}{whole.strip()} {top}/{bottom}".strip() if whole.strip() else f"{sign}{top}/{bottom}"
    found = AMOUNT.match(sentence)
    if not found:
        words = WORDS.match(sentence)
        spelled = spell_out(words.group().split(" and ")[0]) if words else None
        return spelled
    amount, after = found.group().strip(), sentence[found.end() :]
    # 2. a calculation and its result, on either side: 3 + 4 = 7, 12 = 3 * 4
    left, equals, right = sentence.partition("=")
    if equals and (read_rational(_plain(left)) is not None or CALCULATION.match(left)):
        if read_rational(_plain(left)) is not None and NUMBER.search(right):
            return _plain(left)
        result = AMOUNT.match(LEAD.sub("", sentence.rpartition("=")[2], count=1))
        if result:
            return _plain(result.group())
    # 3. what goes on: a range, a time, a second number
    goes_on = GOES_ON.match(after)
    if goes_on:
        conclusion = SO.search(after)
        if conclusion and not re.search(r"^ or|[a-zA-Z] ?=", goes_on.group()):
            return _plain(conclusion.group(1))
        return spell_out(sentence[: found.end()] + goes_on.group()) or sentence[: found.end()] + goes_on.group()
    return _plain(amount)


def _plain(amount: str) -> str:
    """Without what surrounds the value: currency signs, percent signs, commas in a number."""
    amount = re.sub(r"[$€£%]", "", amount).strip(" *(").replace("--", "-")
    is_grouped = re.fullmatch(r"-?\d{1,3}(?:,\d{3}| \d{3})+(?:\.\d+)?", amount)
    return re.sub(r"[, ]", "", amount) if is_grouped else amount


def _amount_in_box(content: str) -> str:
    """What the box holds, as it is where the ladder can read it; the number of a box with a sentence."""
    is_amount = read_amount(content) is not None or read_rational(clean(content)) is not None
    if is_amount or not re.search(r"[a-zA-Z]{4,} .*[a-zA-Z]{3,}", content):
        return content
    return _amount_at_start(_tidy(content)) or _concluding_number(content, content) or content


def _concluding_number(text: str, whole: str) -> str | None:
    """The number that a closing remark states: the last result of the calculation in `whole`, if the last sentence
    repeats it among others ("So 10 pizzas feed 20 friends" after "80 / 8 = 10" says 10), else the last number."""
    numbers = [_strip(number) for number in NUMBER.findall(text)]
    if not numbers:
        return None
    bold = BOLD_NUMBER.findall(text)
    if bold:
        return _strip(bold[-1])
    sentences = [part for part in re.split(r"(?<=[a-z)%])[.!]\s|\n", text) if NUMBER.search(part)]
    stated = [_strip(number) for number in NUMBER.findall(sentences[-1])] if sentences else []
    results = RESULT.findall(whole[-1500:])
    if results and len(stated) > 1:
        result = read_rational(results[-1])
        repeated = next((number for number in stated if read_rational(number) == result), None)
        if repeated is not None:
            return repeated
    return numbers[-1]


def _strip(number: str) -> str:
    return re.sub(r"[$,\s]", "", number).replace("--", "-")
