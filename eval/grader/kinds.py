"""The kinds of answer that `eval.grader.structures` reads and `eval.grader.equality` compares."""

from __future__ import annotations

from dataclasses import dataclass, field

from .expressions import Binary, Constant, Expression, Factorial, Number, walk


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
    has_braces: bool = field(default=False, compare=False)
    """Whether it is written as a set: a list without braces may be a tuple without its brackets."""


@dataclass(frozen=True, slots=True)
class Union(Structure):
    """Sets joined by the union sign."""

    parts: tuple[Structure, ...]
    """In the order written."""


@dataclass(frozen=True, slots=True)
class Intersection(Structure):
    """Sets joined by the intersection sign, or conditions by "and"."""

    parts: tuple[Structure, ...]
    """In the order written."""


@dataclass(frozen=True, slots=True)
class Difference(Structure):
    """A set without the members of another."""

    whole: Structure
    """The set."""
    without: Structure
    """What is taken away."""


@dataclass(frozen=True, slots=True)
class Congruence(Structure):
    """A residue, as in 5 mod 7."""

    residue: Structure
    """What stands before the modulus."""
    modulus: int
    """A whole number."""


@dataclass(frozen=True, slots=True)
class Clock(Structure):
    """A time of day, as in 3:45 p.m."""

    hour: int
    """As written, from 0 to 24."""
    minute: str
    """Two digits."""
    half: str
    """"am", "pm", "noon", "midnight" or nothing."""


@dataclass(frozen=True, slots=True)
class Words(Structure):
    """A name made of words, on the left side of an equation: "Area" of "Area = 12"."""

    text: str
    """As written."""


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
    if isinstance(side, Words):
        return True
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
