"""Whether an answer means the same as the gold: one kind and shape, and formulas of equal value in the same places.

Some kinds meet: x = 5 and 5, a tuple and a vector, 1:2 and 1/2, x < -2 or x > 2 and the union of its rays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain

from .expressions import Binary, Expression, Variable, variables, walk
from .kinds import (
    Bracket,
    Clock,
    Congruence,
    Difference,
    Equation,
    Formula,
    Infinity,
    Intersection,
    Matrix,
    Members,
    Ratio,
    Relation,
    Structure,
    Union,
    Words,
    names_a_quantity,
)
from .sets import is_same_set, real_set
from .values import affine, are_proportional, equal_values, exact_value

MEMBERS = 60  # of a set: comparing two sets takes the square of that
SETS = (Union, Intersection, Difference)


def same(given: Structure, gold: Structure) -> bool:
    """Whether an answer means the same as the gold.

    Raises:
        UndecidedError: that depends on a piece that cannot be evaluated.
    """
    # 1. x = 1, y = 2: by name, or in the order of the names where the other side gives none
    named, wanted = _assignments(given), _assignments(gold)
    if named and wanted:
        return named.keys() == wanted.keys() and all(same(named[name], wanted[name]) for name in named)
    if named or wanted:
        values, items = (named, _in_order(gold)) if named else (wanted or {}, _in_order(given))
        return items is not None and _all_same(tuple(values[name] for name in sorted(values)), items)

    # 2. equations: with each other as equations, with anything else by the value they give
    if isinstance(given, Equation) and isinstance(gold, Equation):
        return _same_equation(given, gold)
    if isinstance(given, Equation):
        return _states_a_value(given) and same(given.right, gold)
    if isinstance(gold, Equation):
        return (names_a_quantity(gold.left) or _is_calculation(gold)) and same(given, gold.right)

    # 3. residues, and sets of numbers
    if isinstance(given, Congruence) or isinstance(gold, Congruence):
        return _same_residue(given, gold)
    if isinstance(given, SETS) or isinstance(gold, SETS):
        return _same_set(given, gold)

    # 4. two kinds
    if type(given) is not type(gold):
        return _same_across_kinds(given, gold) or _same_across_kinds(gold, given)

    # 5. one kind
    match given, gold:
        case Formula(a), Formula(b):
            return equal_values(a, b)
        case Infinity(), Infinity():
            return given == gold
        case Clock(), Clock():
            return _same_clock(given, gold)
        case Words(), Words():
            return given == gold
        case Matrix(), Matrix():
            return given.is_determinant == gold.is_determinant and _same_rows(given, gold)
        case Bracket(), Bracket():
            brackets_agree = (given.opening, given.closing) == (gold.opening, gold.closing)
            return brackets_agree and _all_same(given.items, gold.items)
        case Ratio(a), Ratio(b):
            return _all_same(a, b) or _same_ratio(a, b)
        case Members(a), Members(b):
            return _same_members(a, b)
        case Relation(), Relation():
            return _same_relation(given, gold)
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
        case Matrix(rows, is_determinant=False), Bracket("(", ")", items):  # a column or row, written as a tuple
            is_vector = len(rows) == 1 or all(len(row) == 1 for row in rows)
            return is_vector and _all_same(tuple(chain.from_iterable(rows)), items)
        case Ratio((Formula(first), Formula(second))), Formula(quotient):  # 1:2 and 1/2
            return equal_values(Binary("/", first, second), quotient)
        case Clock(half=""), Formula(quotient):  # 3:10 may be a ratio; 3:45 would be 1:15, so it is a time
            hour, minute = one.hour, int(one.minute)
            value = exact_value(quotient)
            is_ratio = one.minute[0] != "0" and math.gcd(hour, minute) == 1
            return is_ratio and value is not None and value * minute == hour
        case Clock(half=""), Ratio((Formula(first), Formula(second))):
            a, b = exact_value(first), exact_value(second)
            return one.minute[0] != "0" and a is not None and b is not None and a * int(one.minute) == b * one.hour
        case Bracket("(", ")", items), Members(others, has_braces=False):  # a tuple without its brackets
            return _all_same(items, others)
        case Members((single,)), _:
            return same(single, other)
    return False


def _in_order(structure: Structure) -> tuple[Structure, ...] | None:
    """The items of a tuple, with or without brackets; None for anything else."""
    match structure:
        case Bracket("(", ")", items) | Members(items, has_braces=False):
            return items
    return None


def _same_ratio(left: tuple[Structure, ...], right: tuple[Structure, ...]) -> bool:
    """4 : 6 is 2 : 3."""
    sides = _formulas((*left, *right))
    if len(left) != len(right) or len(sides) < 2 * len(left):
        return False
    a, b = sides[: len(left)], sides[len(left) :]
    return all(equal_values(Binary("*", a[0], y), Binary("*", x, b[0])) for x, y in zip(a, b, strict=True))


def _same_clock(left: Clock, right: Clock) -> bool:
    """12:00 is 12:00 noon where one of them leaves the half of the day open."""
    halves = {{"noon": "pm", "midnight": "am"}.get(clock.half, clock.half) for clock in (left, right)} - {""}
    return (left.hour, left.minute) == (right.hour, right.minute) and len(halves) < 2


# --- residues and sets ------------------------------------------------------------------------------------------------


def _same_residue(given: Structure, gold: Structure) -> bool:
    """5 mod 7 is 12 mod 7; where one side leaves the modulus out, the residue as written counts."""
    if isinstance(given, Congruence) and isinstance(gold, Congruence):
        values = [exact_value(side) for side in _formulas((given.residue, gold.residue))]
        if len(values) < 2 or values[0] is None or values[1] is None:
            return given.modulus == gold.modulus and same(given.residue, gold.residue)
        difference = values[0] - values[1]
        return given.modulus == gold.modulus != 0 and difference % gold.modulus == 0
    one, other = (given, gold) if isinstance(given, Congruence) else (gold, given)
    assert isinstance(one, Congruence)
    return same(one.residue, other)


def _same_set(given: Structure, gold: Structure) -> bool:
    """As sets of numbers; where an end has no place on the line, part by part."""
    left, right = real_set(given), real_set(gold)
    if left is not None and right is not None:
        return is_same_set(left, right)
    match given, gold:
        case Difference(), Difference():
            return same(given.whole, gold.whole) and same(given.without, gold.without)
    if type(given) is not type(gold) or not isinstance(given, Union | Intersection):
        return isinstance(given, Union) and isinstance(gold, Members) and _same_members(given.parts, gold.items)
    assert isinstance(gold, Union | Intersection)
    return _same_members(given.parts, gold.parts)


# --- equations and inequalities ---------------------------------------------------------------------------------------


def _formulas(sides: Iterable[Structure]) -> list[Expression]:
    """The expressions of the sides that are formulas."""
    return [side.expression for side in sides if isinstance(side, Formula)]


def _assignments(structure: Structure) -> dict[str, Structure] | None:
    """{name: value} of x = 1, y = 2 or of (x, y) = (1, 2); None for anything else."""
    match structure:
        case Members(items) if len(items) > 1 and all(isinstance(item, Equation) for item in items):
            pairs = [(item.left, item.right) for item in items if isinstance(item, Equation)]
        case Equation(Bracket("(", ")", names), Bracket("(", ")", values)) if len(names) == len(values):
            pairs = list(zip(names, values, strict=True))
        case _:
            return None
    found = {
        side.expression.name: value
        for side, value in pairs
        if isinstance(side, Formula) and isinstance(side.expression, Variable)
    }
    return found if len(found) == len(pairs) else None


def _states_a_value(equation: Equation) -> bool:
    """Whether the right side is what the equation says of a quantity: x = 5, f(2) = 5, a + b = 5, Area = 5.

    Not so where the unknown is still to be found: 2x = 5, x + 3 = 5.
    """
    left = equation.left
    if names_a_quantity(left) or _is_calculation(equation):
        return True
    if not isinstance(left, Formula):
        return False
    names = variables(left.expression)
    if len(names) != 1:
        return len(names) > 1
    return affine(left.expression, next(iter(names))) is None


def _is_calculation(equation: Equation) -> bool:
    """3 + 4 = 7: no side holds an unknown and both are equal, so the right side is the answer."""
    sides = _formulas((equation.left, equation.right))
    if len(sides) < 2 or any(isinstance(part, Variable) for side in sides for part in walk(side)):
        return False
    return equal_values(*sides)


def _same_equation(given: Equation, gold: Equation) -> bool:
    """Whether both hold for the same values: as formulas, if a - b and c - d are proportional; else side by side."""
    sides = _formulas((given.left, given.right, gold.left, gold.right))
    if len(sides) == 4:
        a, b, c, d = sides
        return are_proportional(Binary("-", a, b), Binary("-", c, d), positive=False)
    if _is_same_function(given.left, gold.left):
        return same(given.right, gold.right)
    if isinstance(gold.left, Words) != isinstance(given.left, Words):  # f(x) = 2x and y = 2x
        return names_a_quantity(given.left) and names_a_quantity(gold.left) and same(given.right, gold.right)
    return (same(given.left, gold.left) and same(given.right, gold.right)) or (
        same(given.left, gold.right) and same(given.right, gold.left)
    )


def _is_same_function(left: Structure, right: Structure) -> bool:
    """f(x) and g(x): the letter of a function is free, its argument is not."""
    return isinstance(left, Words) and isinstance(right, Words) and left.text[1:] == right.text[1:] != ""


def _same_relation(given: Relation, gold: Relation) -> bool:
    if given.relations != gold.relations or len(given.sides) != len(gold.sides):
        return False
    if all(map(same, given.sides, gold.sides)):
        return True
    if given.relations == (r"\ne",):
        return all(map(same, given.sides, gold.sides[::-1]))
    sides = _formulas((*given.sides, *gold.sides))
    if len(sides) != 4:
        return False
    a, b, c, d = sides  # a < b and c < d mean the same when b - a and d - c do, up to a positive factor
    return are_proportional(Binary("-", b, a), Binary("-", d, c), positive=True)
