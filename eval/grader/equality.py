"""Whether two structures mean the same: the same kind and shape, and formulas of equal value in the same places.

Some kinds meet: x = 5 and 5, a tuple and a vector, 1:2 and 1/2, x < -2 or x > 2 and the union of its rays.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from .expressions import Binary, Expression, Variable, walk
from .structures import (
    Bracket,
    Equation,
    Formula,
    Infinity,
    Matrix,
    Members,
    Ratio,
    Relation,
    Structure,
    Union,
    names_a_quantity,
)
from .values import are_proportional, equal_values

MEMBERS = 60  # of a set: comparing two sets takes the square of that


def same(left: Structure, right: Structure) -> bool:
    """Whether two answers mean the same.

    Raises:
        UndecidedError: that depends on a piece that cannot be evaluated.
    """
    # 1. equations: with each other as equations, with anything else by the value they give the unknown
    if isinstance(left, Equation) and isinstance(right, Equation):
        return _same_equation(left, right)
    if isinstance(left, Equation) and (names_a_quantity(left.left) or _is_calculation(left)):
        return same(left.right, right)
    if isinstance(right, Equation) and (names_a_quantity(right.left) or _is_calculation(right)):
        return same(left, right.right)

    # 2. two kinds
    if type(left) is not type(right):
        return _same_across_kinds(left, right) or _same_across_kinds(right, left)

    # 3. one kind
    match left, right:
        case Formula(a), Formula(b):
            return equal_values(a, b)
        case Infinity(a), Infinity(b):
            return a == b
        case Matrix(), Matrix():
            return left.is_determinant == right.is_determinant and _same_rows(left, right)
        case Bracket(), Bracket():
            brackets_agree = (left.opening, left.closing) == (right.opening, right.closing)
            return brackets_agree and _all_same(left.items, right.items)
        case Ratio(a), Ratio(b):
            return _all_same(a, b)
        case (Members(a), Members(b)) | (Union(a), Union(b)):
            return _same_members(a, b)
        case Relation(), Relation():
            return _same_relation(left, right)
    return False


def _all_same(left: tuple[Structure, ...], right: tuple[Structure, ...]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def _same_members(left: tuple[Structure, ...], right: tuple[Structure, ...]) -> bool:
    """Whether the items of both sides can be matched one to one as equals."""
    if len(left) != len(right) or len(left) > MEMBERS:
        return False
    rest = list(right)
    for item in left:
        place = next((place for place, other in enumerate(rest) if same(item, other)), None)
        if place is None:
            return False
        del rest[place]
    return True


def _same_rows(left: Matrix, right: Matrix) -> bool:
    if [len(row) for row in left.rows] != [len(row) for row in right.rows]:
        return False
    return all(map(same, chain.from_iterable(left.rows), chain.from_iterable(right.rows)))


def _same_across_kinds(one: Structure, other: Structure) -> bool:
    """The pairs of different kinds that can mean the same, in one order."""
    match one, other:
        case Matrix(rows, is_determinant=False), Bracket("(", _, items):  # a column or row vector, written as a tuple
            is_vector = len(rows) == 1 or all(len(row) == 1 for row in rows)
            return is_vector and _all_same(tuple(chain.from_iterable(rows)), items)
        case Ratio((Formula(first), Formula(second))), Formula(Binary("/") as quotient):  # 1:2 and 1/2
            return equal_values(Binary("/", first, second), quotient)
        case Members(items), Union(parts):  # x < -2 or x > 2
            are_intervals = all(isinstance(each, Bracket) for each in (*items, *parts))
            return are_intervals and _same_members(items, parts)
        case Members((single,)), _:
            return same(single, other)
    return False


# --- equations and inequalities ---------------------------------------------------------------------------------------


def _formulas(sides: Iterable[Structure]) -> list[Expression]:
    """The expressions of the sides that are formulas."""
    return [side.expression for side in sides if isinstance(side, Formula)]


def _is_calculation(equation: Equation) -> bool:
    """3 + 4 = 7: no side holds an unknown and both are equal, so the right side is the answer."""
    sides = _formulas((equation.left, equation.right))
    if len(sides) < 2 or any(isinstance(part, Variable) for side in sides for part in walk(side)):
        return False
    return equal_values(*sides)


def _same_equation(left: Equation, right: Equation) -> bool:
    """Whether both hold for the same values: as formulas, if a - b and c - d are proportional; else side by side."""
    sides = _formulas((left.left, left.right, right.left, right.right))
    if len(sides) == 4:
        a, b, c, d = sides
        return are_proportional(Binary("-", a, b), Binary("-", c, d), positive=False)
    return (same(left.left, right.left) and same(left.right, right.right)) or (
        same(left.left, right.right) and same(left.right, right.left)
    )


def _same_relation(left: Relation, right: Relation) -> bool:
    if left.relations != right.relations or len(left.sides) != len(right.sides):
        return False
    if all(map(same, left.sides, right.sides)):
        return True
    if left.relations == (r"\ne",):
        return all(map(same, left.sides, right.sides[::-1]))
    sides = _formulas((*left.sides, *right.sides))
    if len(sides) != 4:
        return False
    a, b, c, d = sides  # a < b and c < d mean the same when b - a and d - c do, up to a positive factor
    return are_proportional(Binary("-", b, a), Binary("-", d, c), positive=True)
