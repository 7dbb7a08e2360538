"""Sets of real numbers as pieces of the line, so that a union, a complement and an inequality can be one set.

real_set(read_structure(r"x \\ne 3"))  ==  real_set(read_structure(r"(-\\infty,3)\\cup(3,\\infty)"))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .kinds import Bracket, Difference, Formula, Infinity, Intersection, Members, Structure, Union
from .values import is_close, real_value

PIECES = 60


@dataclass(frozen=True)
class Cut:
    """A place between real numbers: just below or just above `at`."""

    at: Any
    """A real number, or plus or minus infinity as a float."""
    above: bool
    """Whether `at` itself lies below the cut."""

    def is_before(self, other: Cut) -> bool:
        if _same_number(self.at, other.at):
            return not self.above and other.above
        return bool(self.at < other.at)

    def is_same(self, other: Cut) -> bool:
        return self.above == other.above and _same_number(self.at, other.at)


@dataclass(frozen=True)
class Piece:
    """All numbers between two cuts."""

    start: Cut
    """The lower cut."""
    end: Cut
    """The upper one."""


RealSet = list[Piece]
"""In order, with a gap between neighbours."""
LOWEST, HIGHEST = Cut(float("-inf"), True), Cut(float("inf"), False)


def _same_number(a: Any, b: Any) -> bool:
    return bool(a == b) or (abs(a) != float("inf") and abs(b) != float("inf") and is_close(a, b))


def real_set(structure: Structure) -> RealSet | None:
    """The set as pieces; None for what is no set of numbers that can be put in order."""
    match structure:
        case Bracket(opening, closing, (low, high)):
            start, end = _cut(low, above=opening == "("), _cut(high, above=closing == "]")
            return _joined([Piece(start, end)]) if start and end else None
        case Members(items):
            cuts = [(_cut(item, above=False), _cut(item, above=True)) for item in items]
            pieces = [Piece(start, end) for start, end in cuts if start and end]
            return _joined(pieces) if len(pieces) == len(items) else None
        case Union(parts):
            sets = [real_set(part) for part in parts]
            if any(each is None for each in sets):
                return None
            return _joined([piece for each in sets if each for piece in each])
        case Intersection(parts):
            return _common([real_set(part) for part in parts])
        case Difference(whole, without):
            left, right = real_set(whole), real_set(without)
            return None if left is None or right is None else _common([left, _complement(right)])
    return None


def is_same_set(left: RealSet, right: RealSet) -> bool:
    return len(left) == len(right) and all(
        a.start.is_same(b.start) and a.end.is_same(b.end) for a, b in zip(left, right, strict=True)
    )


def _cut(bound: Structure, *, above: bool) -> Cut | None:
    match bound:
        case Infinity("-"):
            return LOWEST
        case Infinity():
            return HIGHEST
        case Formula(expression):
            value = real_value(expression)
            return None if value is None else Cut(value, above)
    return None


def _joined(pieces: RealSet) -> RealSet | None:
    """The pieces in order, empty ones left out, touching ones made one."""
    if len(pieces) > PIECES:
        return None
    done: RealSet = []
    for piece in sorted((each for each in pieces if each.start.is_before(each.end)), key=_place):
        if done and not done[-1].end.is_before(piece.start):
            if done[-1].end.is_before(piece.end):
                done[-1] = Piece(done[-1].start, piece.end)
        else:
            done.append(piece)
    return done


def _place(piece: Piece) -> tuple[Any, bool]:
    return piece.start.at, piece.start.above


def _complement(pieces: RealSet) -> RealSet:
    cuts = [LOWEST, *(cut for piece in pieces for cut in (piece.start, piece.end)), HIGHEST]
    gaps = [Piece(start, end) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
    return [gap for gap in gaps if gap.start.is_before(gap.end)]


def _common(sets: list[RealSet | None]) -> RealSet | None:
    """What all sets share: the complement of all that one of them lacks."""
    if any(each is None for each in sets):
        return None
    missing = _joined([gap for each in sets if each is not None for gap in _complement(each)])
    return None if missing is None else _complement(missing)
