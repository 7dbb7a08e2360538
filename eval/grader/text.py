r"""What every convention reads: the content of the last \boxed, and plain numbers."""

from __future__ import annotations

import re
from fractions import Fraction

BOXES = 50  # of a response, from the end
REACH = 4000  # characters in which a box must close
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?!\d)")
RATIONAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?: ?/ ?\d+)?", re.ASCII)
RATIONAL_LENGTH = 400
BARE_BOX = re.compile(  # what a box without braces holds: a number, or a command with its arguments
    r"\$?-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\\[dt]?frac ?(?:\{[^{}]*\}|\d) ?(?:\{[^{}]*\}|\d)"
    r"|-?\d*\\sqrt ?(?:\{[^{}]*\}|\d+)|\\(?:text|mathrm|textbf) ?\{[^{}]*\}|-?\\(?:pi|infty)|[A-Za-z](?![A-Za-z])"
)


def last_box(text: str) -> int:
    r"""The place of the last \boxed or \fbox, complete or not; -1 if there is none."""
    return max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))


def last_boxed(text: str, *, skip_empty: bool = False) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...} with balanced braces, or of `\boxed 5`. None if there is none.

    Args:
        skip_empty: pass over boxes that hold nothing or never close, to one before them.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    place = len(text)
    for _ in range(BOXES):
        place = last_box(text[:place])
        if place < 0:
            return None
        start = place + (6 if text.startswith(r"\boxed", place) else 5)
        rest = text[start : start + REACH]
        if rest.lstrip().startswith("{"):
            content = _group(rest)
            if content is None and not skip_empty:
                return None
            if content is not None and (content.strip() or not skip_empty):
                return content
        elif rest[:1].isdecimal():  # \boxed5
            return rest[0]
        elif rest[:1] == " ":  # \boxed 5
            content = re.split(r"[$\n]", rest[1:], maxsplit=1)[0]
            if content.strip():
                return content
    return None


def answer_in_last_box(text: str) -> tuple[int, str | None]:
    r"""(place, content) of the last box; (place, None) if it is empty or never closes, (-1, None) without a box.

    Reads what people write: \boxed{...}, \boxed5, \boxed 12, \boxed\frac12.

    >>> answer_in_last_box(r"\boxed{3}, no: \boxed\frac12")
    (14, '\\frac12')
    >>> answer_in_last_box(r"\boxed{3} and \boxed{")
    (14, None)
    """
    place = last_box(text)
    if place < 0:
        return -1, None
    start = place + (6 if text.startswith(r"\boxed", place) else 5)
    rest = text[start : start + REACH].lstrip(" ")
    if rest.startswith("{"):
        content = _group(rest)
    else:
        bare = BARE_BOX.match(rest)
        content = bare.group() if bare else None
    return place, (content or "").strip() or None


def _group(text: str) -> str | None:
    """The content of the first pair of braces; None if they do not balance."""
    opening = text.index("{")
    depth = 0
    for place in range(opening, len(text)):
        # \{ is a brace to read, not one that groups; \\{ is a line break and a group
        if text[place] not in "{}" or (text[place - 1] == "\\" and text[place - 2] != "\\"):
            continue
        depth += 1 if text[place] == "{" else -1
        if depth == 0:
            return text[opening + 1 : place]
    return None


def read_rational(text: str) -> Fraction | None:
    """An integer, decimal or plain fraction, with thousands commas, a sign and a dollar sign allowed; None for
    anything else.

    >>> read_rational("$1,234.50"), read_rational("1 / 2"), read_rational("x")
    (Fraction(2469, 2), Fraction(1, 2), None)
    """
    text = text.strip().removeprefix("\\").removeprefix("$").strip()
    if THOUSANDS.match(text):
        text = text.replace(",", "")
    if len(text) > RATIONAL_LENGTH or not RATIONAL.fullmatch(text):
        return None
    top, _, bottom = text.replace(" ", "").partition("/")
    try:
        return Fraction(top.rstrip(".")) / (Fraction(bottom) if bottom else 1)
    except (ValueError, ZeroDivisionError):
        return None
