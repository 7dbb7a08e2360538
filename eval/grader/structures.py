r"""What an answer is: a formula, a tuple or interval, a set, a matrix, an equation, ... read from cleaned LaTeX.

    read_structure("[2,3)")        ->  Bracket("[", ")", (Formula(2), Formula(3)))
    read_structure(r"2 \le x < 3") ->  the same: an inequality in one variable is its interval
    read_structure(r"1 \pm y")     ->  Members((Formula(1 + y), Formula(1 - y)))

The kinds are in `eval.grader.kinds`. `eval.grader.equality` compares them piece by piece, and the formulas in them by
value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from .errors import TooLargeError, UndecidedError
from .expressions import LENGTH, Binary, Expression, Variable, parse, read_signs, variables
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
from .values import affine, exact_value, real_value

BRACKETS = 60  # opening brackets of an answer
MATRIX = re.compile(r"\\begin ?\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end ?\{\1\}", re.S)
RELATION = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|[<>]")
MEMBERSHIP = re.compile(r"^[a-zA-Z](?:_\{?\w\}?)? ?\\in(?![a-zA-Z]) ?(?=[\[(\\])")  # the "x \in" before a set
BUILDER = re.compile(r"^\\\{ ?([a-zA-Z])(?: ?\\in ?\\(?:mathbb ?\{R\}|mathbb R|R))? ?(?:\\mid|[|:]) ?(.*)\\\}$")
CLOCK = re.compile(r"^([01]?\d|2[0-4]):([0-5]\d) ?([ap]\.? ?m\.?|noon|midnight|)$", re.I)
CONGRUENCE = re.compile(r"^(.*?) ?\(? ?\\mod ?\{?(\d{1,40})\}? ?\)?$")
NAME = re.compile(  # Area, \angle ABC, \gcd(a, b), \overline{AB}: neither digits nor arithmetic, and no other relation
    r"^(?!.*\\(?:not|approx|sim|propto|in|subset|equiv)(?![a-zA-Z]))(?=.*[a-zA-Z])[^0-9+\-*/<>=;!]{1,80}"
    r"(?:_ ?\{?[0-9]{1,6}\}?)?$"
)
FUNCTION_NAME = re.compile(r"^[fghpqrsuvwFGHPQRSTVNDE]\'{0,2}(?:\^\{-1\})?\(.{1,40}\)$")  # f(2), f'(x), g^{-1}(3)
REALS = (r"\mathbb{R}", r"\mathbb R", r"\R", r"\Re", "all real numbers", "all reals", "all real", "all real values")
EMPTY_SETS = (r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}", "no solution", "no solutions", "empty set")
INFINITIES = (r"\infty", "infty", "infinity", "oo")


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
        raise TooLargeError("too long or too deep to read")

    # 1. matrices, before anything is split: their cells are separated by the same signs
    if r"\begin" in text:
        return _read_matrix(text)

    # 2. sets and lists, from the outside in
    text = MEMBERSHIP.sub("", text).strip()
    if text in REALS or text.lower() in REALS:
        text = r"(-\infty,\infty)"
    if text.lower() in EMPTY_SETS:
        return Members((), has_braces=True)
    builder = BUILDER.match(text)
    if builder:
        return read_structure(builder.group(2))
    structure = _read_set(text) or _read_list(text)
    if structure is not None:
        return structure

    # 3. tuples and intervals; a bracket around an equation or inequality adds nothing
    if text[0] in "([" and text[-1] in ")]" and _closes_at_the_end(text):
        parts = split_outside_brackets(text[1:-1], ",")
        if len(parts) > 1:
            return Bracket(text[0], text[-1], tuple(map(read_structure, parts)))
        if "=" in text or RELATION.search(text):
            return read_structure(text[1:-1])

    # 4. residues, inequalities and equations
    congruence = CONGRUENCE.match(text)
    if congruence:
        return Congruence(read_structure(congruence.group(1).rpartition(r"\equiv")[2]), int(congruence.group(2)))
    sides = RELATION.split(text)
    if len(sides) in (2, 3):
        return _read_inequality(sides, RELATION.findall(text))
    sides = split_outside_brackets(text, "=")
    if len(sides) > 1 and all(side.strip() for side in sides):
        return _read_equation(sides)

    # 5. a time of day or a ratio
    structure = _read_clock(text)
    if structure is not None:
        return structure
    sides = text.split(":") if ":" in text else re.split(r"(?<=\d) to (?=\d)", text)
    if len(sides) in (2, 3) and "(" not in text:
        return Ratio(tuple(map(read_structure, sides)))

    # 6. infinity, or an expression; a \pm means both signs
    if text.lstrip("+-").strip() in INFINITIES:
        return Infinity("-" if text.startswith("-") else "+")
    expressions = [Formula(each) for each in read_signs(parse(text))]
    return expressions[0] if len(expressions) == 1 else Members(tuple(expressions))


def _read_set(text: str) -> Structure | None:
    """Sets joined by a sign, or conditions joined by "and" and "or"; None without one."""
    for sign, kind in ((r"\lor", Union), (r"\land", Intersection), (r"\cup", Union), (r"\cap", Intersection)):
        parts = split_outside_brackets(text, sign)
        if len(parts) > 1:
            return kind(tuple(map(read_structure, parts)))
    for sign in (r"\setminus", r"\backslash"):
        parts = split_outside_brackets(text, sign)
        if len(parts) == 2:
            return Difference(read_structure(parts[0]), read_structure(parts[1]))
    if text.startswith(REALS) and text.endswith(r"\}") and "-" in text:  # \mathbb{R} - \{3\}
        whole, _, without = text.partition("-")
        return Difference(read_structure(whole), read_structure(without))
    return None


def _read_list(text: str) -> Structure | None:
    """Items between commas, or between braces; None for anything else."""
    parts = split_outside_brackets(text, ",")
    if len(parts) > 1:
        return _conditions(Members(_flat(parts)))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return Members(_flat(split_outside_brackets(text[2:-2], ",")), has_braces=True)
    return None


def _conditions(items: Members) -> Structure:
    """The comma between two rays means "and" where they overlap, as in x > 2, x < 5, and "or" where they do not."""
    match items.items:
        case (Bracket(_, _, (low, Infinity("+"))), Bracket(_, _, (Infinity("-"), high))) | (
            Bracket(_, _, (Infinity("-"), high)),
            Bracket(_, _, (low, Infinity("+"))),
        ) if isinstance(low, Formula) and isinstance(high, Formula):
            bottom, top = real_value(low.expression), real_value(high.expression)
            overlap = bottom is not None and top is not None and bottom < top
            return Intersection(items.items) if overlap else Union(items.items)
    return items


def _read_clock(text: str) -> Clock | None:
    found = CLOCK.match(text)
    if not found:
        return None
    half = re.sub(r"[^a-z]", "", found.group(3).lower())
    return Clock(int(found.group(1)), found.group(2), half)


def _read_equation(sides: list[str]) -> Structure:
    """Of a = b = c the ends count. The name of what is found stands on the left: 12 = x is x = 12."""
    left, right = _read_side(sides[0]), _read_side(sides[-1])
    if names_a_quantity(right) and not names_a_quantity(left):
        left, right = right, left
    return Equation(left, right)


def _read_side(text: str) -> Structure:
    """A side of an equation, which may be a name that is not mathematics: Area, f'(2)."""
    text = text.strip()
    if FUNCTION_NAME.match(text):
        return Words(text.replace(" ", ""))
    try:
        return read_structure(text)
    except UndecidedError:
        if NAME.match(text):
            return Words(text)
        raise


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
    r"""A matrix, perhaps with its name and an equals sign, or with a factor in front: M = \frac{1}{2} (...)."""
    found = MATRIX.search(text)
    if not found or r"\begin" in found[2]:
        raise UndecidedError("an environment")
    before, after = text[: found.start()].strip(), text[found.end() :].strip()
    if before[-1:] + after[:1] in ("[]", "()", "||"):  # brackets around an array
        before, after = before[:-1].strip(), after[1:].strip()
    if after:
        raise UndecidedError("something after a matrix")
    rows = [row for row in found[2].split(r"\\") if row.strip()]
    cells = tuple(tuple(map(read_structure, row.split("&"))) for row in rows)
    matrix = Matrix(cells, is_determinant=found[1] in ("vmatrix", "Vmatrix"))
    name, equals, factor = before.rpartition("=")
    if factor.strip():
        matrix = _times(parse(factor), matrix)
    return Equation(_read_side(name), matrix) if equals else matrix


def _times(factor: Expression, matrix: Matrix) -> Matrix:
    def product(cell: Structure) -> Structure:
        if not isinstance(cell, Formula):
            raise UndecidedError("a cell that is no formula")
        return Formula(Binary("*", factor, cell.expression))

    return Matrix(tuple(tuple(map(product, row)) for row in matrix.rows), matrix.is_determinant)


def _read_inequality(pieces: list[str], relations: list[str]) -> Structure:
    """x > 5, 2 <= x < 3 and their mirror images as intervals; anything else as a relation of its sides."""
    sides = tuple(map(read_structure, pieces))
    if r"\ne" in relations:
        return _read_exclusion(sides, relations)
    points_up = [relation in ("<", r"\le") for relation in relations]
    is_strict = [relation in ("<", ">") for relation in relations]

    # 1. one bound: a ray; -2x < 4 is x > -2
    if len(sides) == 2:
        ray = _read_ray(sides, points_up=points_up[0], is_strict=is_strict[0])
        if ray is not None:
            return ray

    # 2. two bounds around a variable: an interval
    if len(sides) == 3 and _is_variable(sides[1]) and points_up[0] == points_up[1]:
        if not points_up[0]:  # 3 > x > 2 is 2 < x < 3
            sides, is_strict = sides[::-1], is_strict[::-1]
        return Bracket("(" if is_strict[0] else "[", ")" if is_strict[1] else "]", (sides[0], sides[2]))

    # 3. two other sides: the smaller one first
    if len(sides) == 2:
        return Relation(("<" if is_strict[0] else r"\le",), sides if points_up[0] else sides[::-1])
    return Relation(tuple(relations), sides)


def _is_variable(side: Structure) -> bool:
    return isinstance(side, Formula) and names_a_quantity(side)


def _read_ray(sides: tuple[Structure, ...], *, points_up: bool, is_strict: bool) -> Structure | None:
    """The ray of a < b or a > b (`points_up` for <), if it is one in a variable alone on a side, or in a straight
    line of one variable with numbers.
    """
    left, right = sides
    for bound, side, is_left in ((right, left, True), (left, right, False)):
        if _is_variable(side) and not isinstance(bound, Bracket | Members):
            return _ray(bound, below=points_up == is_left, is_strict=is_strict)
    if not (isinstance(left, Formula) and isinstance(right, Formula)):
        return None
    difference = Binary("-", left.expression, right.expression)
    names = variables(difference)
    line = affine(difference, next(iter(names))) if len(names) == 1 else None
    slope = exact_value(line[0]) if line else None
    if line is None or not slope:
        return None
    bound = Formula(Binary("/", Binary("-", parse("0"), line[1]), line[0]))
    return _ray(bound, below=points_up == (slope > 0), is_strict=is_strict)


def _ray(bound: Structure, *, below: bool, is_strict: bool) -> Bracket:
    if below:
        return Bracket("(", ")" if is_strict else "]", (Infinity("-"), bound))
    return Bracket("(" if is_strict else "[", ")", (bound, Infinity("+")))


def _read_exclusion(sides: tuple[Structure, ...], relations: list[str]) -> Structure:
    r"""x \ne 3 as the reals without 3; another use of the sign as a relation."""
    match sides:
        case (Formula(Variable()), Formula() as point) if real_value(point.expression) is not None:
            reals = Bracket("(", ")", (Infinity("-"), Infinity("+")))
            return Difference(reals, Members((point,), has_braces=True))
    return Relation(tuple(relations), sides)
