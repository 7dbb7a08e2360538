r"""What an answer is: a formula, a tuple or interval, a set, a matrix, an equation, ... read from cleaned LaTeX.

    read_structure("[2,3)")        ->  Bracket("[", ")", (Formula(2), Formula(3)))
    read_structure(r"2 \le x < 3") ->  the same: an inequality in one variable is its interval
    read_structure(r"1 \pm y")     ->  Members((Formula(1 + y), Formula(1 - y)))

`eval.grader.equality` compares structures piece by piece, and the formulas in them by value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .expressions import (
    LENGTH,
    Binary,
    Constant,
    Expression,
    Factorial,
    Number,
    UndecidedError,
    choose_sign,
    has_plus_minus,
    parse,
    walk,
)

BRACKETS = 60  # opening brackets of an answer
MATRIX = re.compile(r"\\begin ?\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end ?\{\1\}", re.S)
RELATION = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|[<>]")
MEMBERSHIP = re.compile(r"^[a-zA-Z](?:_\{?\w\}?)? ?\\in(?![a-zA-Z]) ?(?=[\[(\\])")  # the "x \in" before a set
TIME_OF_DAY = re.compile(r"[ap]\.? ?m\b", re.I)
ALL_REALS = (r"\mathbb{R}", "all real numbers", r"\mathbb R")
EMPTY_SETS = (r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}", "no solution", "no solutions")
INFINITIES = (r"\infty", "infty", "infinity", "oo")


class Structure:
    """Base class of the kinds of answer below."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Formula(Structure):
    """A single expression, compared by value."""

    expression: Expression
    """The tree of the expression."""


@dataclass(frozen=True, slots=True)
class Infinity(Structure):
    sign: str
    """"+" or "-"."""


@dataclass(frozen=True, slots=True)
class Bracket(Structure):
    """A point, a tuple or an interval: its items in order between two brackets, round or square."""

    opening: str
    """"(" or "["."""
    closing: str
    """")" or "]"."""
    items: tuple[Structure, ...]
    """From left to right."""


@dataclass(frozen=True, slots=True)
class Ratio(Structure):
    """3 : 1, or 1 : 2 : 3."""

    parts: tuple[Structure, ...]
    """From left to right."""


@dataclass(frozen=True, slots=True)
class Members(Structure):
    """A set, or a list without brackets: the order does not count."""

    items: tuple[Structure, ...]
    """In the order written."""


@dataclass(frozen=True, slots=True)
class Union(Structure):
    """Sets joined by the union sign."""

    parts: tuple[Structure, ...]
    """In the order written."""


@dataclass(frozen=True, slots=True)
class Matrix(Structure):
    rows: tuple[tuple[Structure, ...], ...]
    """The cells, row by row."""
    is_determinant: bool
    """Between vertical bars."""


@dataclass(frozen=True, slots=True)
class Equation(Structure):
    left: Structure
    """The left side."""
    right: Structure
    """The right side."""


@dataclass(frozen=True, slots=True)
class Relation(Structure):
    """Sides with the relations between them, where these do not describe an interval."""

    relations: tuple[str, ...]
    """The signs between the sides, one fewer than there are sides."""
    sides: tuple[Structure, ...]
    """From left to right."""


def names_a_quantity(side: Structure) -> bool:
    """Whether the left side of an equation only names what is asked for: x, f(x), AB, (x, y)."""
    if isinstance(side, Bracket):
        return all(map(names_a_quantity, side.items))
    if isinstance(side, Ratio):
        return all(map(names_a_quantity, side.parts))
    return isinstance(side, Formula) and not any(map(_calculates, walk(side.expression)))


def _calculates(part: Expression) -> bool:
    return (
        isinstance(part, Number | Factorial)
        or (isinstance(part, Binary) and part.operator in ("+", "-"))
        or (isinstance(part, Constant) and part.name in ("pi", "i"))
    )


def _is_variable(side: Structure) -> bool:
    return isinstance(side, Formula) and names_a_quantity(side)


# --- reading ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def read_structure(text: str) -> Structure:
    """The structure of a cleaned answer: the loosest separator decides first, and what it separates is read in turn.

    Raises:
        UndecidedError: nothing this module knows, or past a bound.
    """
    text = text.strip()
    if not text:
        raise UndecidedError("empty")
    if len(text) > LENGTH or text.count("(") + text.count("[") > BRACKETS:
        raise UndecidedError("too long or too deep")

    # 1. matrices, before anything is split: their cells are separated by the same signs
    if r"\begin" in text:
        return _read_matrix(text)

    # 2. sets and lists, from the outside in
    if text in ALL_REALS:
        text = r"(-\infty,\infty)"
    if text in EMPTY_SETS:
        return Members(())
    text = MEMBERSHIP.sub("", text).strip()
    parts = split_outside_brackets(text, r"\cup")
    if len(parts) > 1:
        return Union(tuple(map(read_structure, parts)))
    parts = split_outside_brackets(text, ",")
    if len(parts) > 1:
        return Members(_flat(parts))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return Members(_flat(split_outside_brackets(text[2:-2], ",")))

    # 3. tuples and intervals; a bracket around an equation or inequality adds nothing
    if text[0] in "([" and text[-1] in ")]" and _closes_at_the_end(text):
        parts = split_outside_brackets(text[1:-1], ",")
        if len(parts) > 1:
            return Bracket(text[0], text[-1], tuple(map(read_structure, parts)))
        if "=" in text or RELATION.search(text):
            return read_structure(text[1:-1])

    # 4. inequalities and equations; of a = b = c the ends count
    sides = RELATION.split(text)
    if len(sides) in (2, 3):
        return _read_inequality(sides, RELATION.findall(text))
    sides = split_outside_brackets(text, "=")
    if len(sides) > 1 and all(side.strip() for side in sides):
        return Equation(read_structure(sides[0]), read_structure(sides[-1]))

    # 5. a ratio, unless it is a time of day
    sides = text.split(":")
    if len(sides) in (2, 3) and not TIME_OF_DAY.search(text) and "(" not in text:
        return Ratio(tuple(map(read_structure, sides)))

    # 6. infinity, or an expression; a \pm means both signs
    if text.lstrip("+-").strip() in INFINITIES:
        return Infinity("-" if text.startswith("-") else "+")
    expression = parse(text)
    if has_plus_minus(expression):
        return Members(tuple(Formula(choose_sign(expression, sign)) for sign in "+-"))
    return Formula(expression)


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """The pieces between separators that are outside brackets. Half-open intervals mix the kinds, so all brackets
    count alike.

    >>> split_outside_brackets("[1,2),3", ",")
    ['[1,2)', '3']
    """
    pieces, depth, start, place = [], 0, 0, 0
    while place < len(text):
        character = text[place]
        if character == "\\" and place + 1 < len(text) and text[place + 1] in "{}":  # \{ and \}
            depth += 1 if text[place + 1] == "{" else -1
            place += 2
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and _stands_at(text, separator, place):
            pieces.append(text[start:place])
            place += len(separator)
            start = place
            continue
        place += 1
    pieces.append(text[start:])
    return pieces


def _stands_at(text: str, separator: str, place: int) -> bool:
    if not text.startswith(separator, place):
        return False
    end = place + len(separator)
    return not (separator[0] == "\\" and text[end : end + 1].isalpha())  # \cup is not the start of \cupcake


def _closes_at_the_end(text: str) -> bool:
    """Whether the bracket that opens `text` is the one that closes at its end: not so in (1,2)+(3,4)."""
    depth = 0
    for place, character in enumerate(text):
        if character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        if depth == 0:
            return place == len(text) - 1
    return False


def _flat(pieces: Iterable[str]) -> tuple[Structure, ...]:
    """The pieces' structures, with the members of a piece that is itself a list or set in its place."""
    items: list[Structure] = []
    for structure in (read_structure(piece) for piece in pieces if piece.strip()):
        items += structure.items if isinstance(structure, Members) else (structure,)
    return tuple(items)


def _read_matrix(text: str) -> Structure:
    whole = MATRIX.fullmatch(text)
    if whole and r"\begin" not in whole[2]:
        rows = [row for row in whole[2].split(r"\\") if row.strip()]
        cells = tuple(tuple(map(read_structure, row.split("&"))) for row in rows)
        return Matrix(cells, is_determinant=whole[1] in ("vmatrix", "Vmatrix"))
    if text[0] + text[-1] in ("[]", "()", "||"):  # brackets around an array
        return read_structure(text[1:-1])
    raise UndecidedError("an environment")


def _read_inequality(pieces: list[str], relations: list[str]) -> Structure:
    """x > 5, 2 <= x < 3 and their mirror images as intervals; anything else as a relation of its sides."""
    sides = tuple(map(read_structure, pieces))
    if r"\ne" in relations:
        return Relation(tuple(relations), sides)
    points_up = [relation in ("<", r"\le") for relation in relations]
    is_strict = [relation in ("<", ">") for relation in relations]

    # 1. one bound: a ray
    if len(sides) == 2 and (_is_variable(sides[0]) or _is_variable(sides[1])):
        variable_first = _is_variable(sides[0])
        bound = sides[1] if variable_first else sides[0]
        if points_up[0] == variable_first:  # x < 5 or 5 > x
            return Bracket("(", ")" if is_strict[0] else "]", (Infinity("-"), bound))
        return Bracket("(" if is_strict[0] else "[", ")", (bound, Infinity("+")))

    # 2. two bounds around a variable: an interval
    if len(sides) == 3 and _is_variable(sides[1]) and points_up[0] == points_up[1]:
        if not points_up[0]:  # 3 > x > 2 is 2 < x < 3
            sides, is_strict = sides[::-1], is_strict[::-1]
        return Bracket("(" if is_strict[0] else "[", ")" if is_strict[1] else "]", (sides[0], sides[2]))

    # 3. two other sides: the smaller one first
    if len(sides) == 2:
        return Relation(("<" if is_strict[0] else r"\le",), sides if points_up[0] else sides[::-1])
    return Relation(tuple(relations), sides)
