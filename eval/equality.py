r"""Whether two LaTeX answers mean the same: exact rationals first, then values to 25 digits at fixed points.

The tree of an answer is compared piece by piece, and its leaves, which are expressions, by value. Two expressions with variables
are equal when they agree at two fixed points: identity testing, so nothing is expanded or simplified and no input can make it
slow. What cannot be evaluated raises `UndecidedError`.
"""

from __future__ import annotations

import math
import re
import zlib
from fractions import Fraction
from functools import lru_cache

from eval.latex import EXPONENT, LENGTH, Node, Parser, UndecidedError, tokens

DIGITS = 40


def has(node: Node, kinds: tuple[str, ...]) -> bool:
    return node[0] in kinds or any(isinstance(child, tuple) and has(child, kinds) for child in node[1:])


def _signs(node: Node, sign: str) -> Node:
    if node[0] == r"\pm":
        return (sign, _signs(node[1], sign), _signs(node[2], sign))
    return tuple(_signs(child, sign) if isinstance(child, tuple) else child for child in node)


def _rational(node: Node) -> Fraction | None:
    """The exact value of an expression of whole powers of rationals; None if it is not one or grows too big."""
    kind = node[0]
    if kind == "n":
        return node[1]
    if kind in ("+", "-", "*", "/"):
        left, right = _rational(node[1]), _rational(node[2])
        if left is None or right is None or (kind == "/" and right == 0):
            return None
        value = (
            left + right
            if kind == "+"
            else left - right
            if kind == "-"
            else left * right
            if kind == "*"
            else left / right
        )
        return value if value.numerator.bit_length() + value.denominator.bit_length() < 40_000 else None
    if kind == "^":
        base, exponent = _rational(node[1]), _rational(node[2])
        if (
            base is None
            or exponent is None
            or exponent.denominator != 1
            or abs(exponent) > EXPONENT
            or (base == 0 and exponent <= 0)
        ):
            return None
        if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(int(exponent)) > 40_000:
            return None
        return base ** int(exponent)
    if kind == "!":
        inside = _rational(node[1])
        if inside is None or inside.denominator != 1 or not 0 <= inside <= 200:
            return None
        value = Fraction(1)
        for factor in range(2, int(inside) + 1):
            value *= factor
        return value
    if kind == "binom":
        top, bottom = _rational(node[1]), _rational(node[2])
        if (
            top is None
            or bottom is None
            or top.denominator != 1
            or bottom.denominator != 1
            or not 0 <= bottom <= top <= 500
        ):
            return None
        return Fraction(math.comb(int(top), int(bottom)))
    return None


@lru_cache(maxsize=1)
def _context():  # type: ignore[no-untyped-def]
    import mpmath

    context = mpmath.mp.clone()
    context.dps = DIGITS
    return context


def _value(node: Node, trial: int):  # type: ignore[no-untyped-def]
    mp = _context()
    kind = node[0]
    if kind == "n":
        return mp.mpf(node[1].numerator) / node[1].denominator
    if kind == "v":
        return mp.mpf(zlib.crc32(f"{trial}{node[1]}".encode()) % 1_000_003) / 700_001 + mp.mpf(1) / 7
    if kind == "pi":
        return +mp.pi
    if kind == "e":
        return mp.e + 0
    if kind == "i":
        return mp.mpc(0, 1)
    if kind in ("+", "-", "*", "/"):
        left, right = _value(node[1], trial), _value(node[2], trial)
        if kind == "/" and right == 0:
            raise UndecidedError("division by zero")
        return (
            left + right
            if kind == "+"
            else left - right
            if kind == "-"
            else left * right
            if kind == "*"
            else left / right
        )
    if kind == "^":
        base, exponent = _value(node[1], trial), _value(node[2], trial)
        if abs(exponent) > EXPONENT or (base != 0 and abs(mp.log(abs(base))) > 5000):
            raise UndecidedError("a power too large")
        if base == 0 and mp.re(exponent) <= 0:
            raise UndecidedError("a power of zero")
        if mp.im(base) == 0 and mp.re(base) < 0 and node[2] == ("/", ("n", Fraction(1)), ("n", Fraction(3))):
            return -((-base) ** exponent)  # the real cube root
        return base**exponent
    if kind == "f":
        name, inside = node[1], _value(node[2], trial)
        if abs(inside) > 1e4:
            raise UndecidedError("an argument too large")
        if name in ("log", "ln"):
            if inside == 0:
                raise UndecidedError("log of zero")
            return mp.log(inside) / (mp.log(10) if name == "log" else 1)
        if name == "abs":
            return abs(inside)
        if name in ("floor", "ceil"):
            return mp.floor(inside) if name == "floor" else mp.ceil(inside)
        name = name.replace("arc", "a", 1)
        return getattr(mp, name)(inside)
    exact = _rational(node)
    if exact is None:
        raise UndecidedError(kind)
    return mp.mpf(exact.numerator) / exact.denominator


def _rounds(decimal: Node, value) -> bool:  # type: ignore[no-untyped-def]
    """Whether a decimal written to 6 places or more is `value` rounded (or cut) there: 0.333333 for 1/3, 1.4142136 for the root of 2."""
    sign = 1
    while decimal[0] == "-" and decimal[1] == ("n", Fraction(0)):
        sign, decimal = -sign, decimal[2]
    if decimal[0] != "n" or len(decimal) < 3 or decimal[2] < 6:
        return False
    if isinstance(value, Fraction):
        return abs(sign * decimal[1] - value) < Fraction(1, 10 ** decimal[2])
    mp = _context()
    return bool(abs(sign * mp.mpf(decimal[1].numerator) / decimal[1].denominator - value) < mp.mpf(10) ** -decimal[2])


def _same_number(left: Node, right: Node) -> bool:
    if "base" in (left[0], right[0]):
        return left == right
    a, b = _rational(left), _rational(right)
    if a is not None and b is not None:
        return a == b or _rounds(left, b) or _rounds(right, a)
    mp = _context()
    for trial in range(2):
        try:
            x, y = _value(left, trial), _value(right, trial)
        except (ArithmeticError, ValueError, TypeError, AttributeError, OverflowError) as problem:
            raise UndecidedError(str(problem)) from None
        if not (mp.isfinite(x) and mp.isfinite(y)):
            raise UndecidedError("not finite")
        if abs(x - y) > mp.mpf(10) ** -25 * max(1, abs(x), abs(y)):
            return _rounds(left, y) or _rounds(right, x)
    return True


# --- structures --------------------------------------------------------------------------------------------------------

MATRIX = re.compile(r"\\begin ?\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end ?\{\1\}", re.S)
RELATION = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|[<>]")
CLOSERS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


def split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside all brackets. Half-open intervals mix the kinds, so round and square ones count alike."""
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        character = text[index]
        if character == "\\" and index + 1 < len(text) and text[index + 1] in "{}":
            depth += 1 if text[index + 1] == "{" else -1
            index += 2
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif (
            depth == 0
            and text.startswith(separator, index)
            and not (separator[0] == "\\" and text[index + len(separator) : index + len(separator) + 1].isalpha())
        ):
            parts.append(text[start:index])
            index += len(separator)
            start = index
            continue
        index += 1
    parts.append(text[start:])
    return parts


@lru_cache(maxsize=4096)
def structure(text: str) -> Node:
    r"""The tree of a cleaned answer.

    ("matrix", rows), ("bracket", "(", ")", items), ("set", items), ("union", parts), ("equation", left, right), ("x",
    expression) or ("infinity", sign).
    """
    text = text.strip()
    if not text:
        raise UndecidedError("empty")
    if len(text) > LENGTH or text.count("(") + text.count("[") > 60:
        raise UndecidedError("too long or too deep")
    if text in (r"\mathbb{R}", "all real numbers", r"\mathbb R"):
        text = r"(-\infty,\infty)"
    whole = MATRIX.fullmatch(text)
    if whole and r"\begin" not in whole.group(2):
        rows = [row for row in re.split(r"\\\\", whole.group(2)) if row.strip()]
        kind = "vmatrix" if whole.group(1) in ("vmatrix", "Vmatrix") else "matrix"
        return (kind, tuple(tuple(structure(cell) for cell in row.split("&")) for row in rows))
    if r"\begin" in text:
        if text[0] + text[-1] in ("[]", "()", "||"):
            return structure(text[1:-1])
        raise UndecidedError("an environment")
    if text in (r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}", "no solution", "no solutions"):
        return ("set", ())
    text = re.sub(r"^[a-zA-Z](?:_\{?\w\}?)? ?\\in(?![a-zA-Z]) ?(?=[\[(\\])", "", text).strip()
    parts = split(text, r"\cup")
    if len(parts) > 1:
        return ("union", tuple(structure(part) for part in parts))
    commas = split(text, ",")
    if len(commas) > 1:
        items = [structure(part) for part in commas if part.strip()]
        return ("set", tuple(_flat(items)))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
        return ("set", tuple(_flat([structure(part) for part in split(inner, ",") if part.strip()])))
    if text[0] in "([" and text[-1] in ")]" and _matching(text):
        parts = split(text[1:-1], ",")
        if len(parts) > 1:
            return ("bracket", text[0], text[-1], tuple(structure(part) for part in parts))
        if "=" in text or RELATION.search(text):
            return structure(text[1:-1])
    pieces = RELATION.split(text)
    if len(pieces) in (2, 3):
        return _interval(pieces, [match.group() for match in RELATION.finditer(text)])
    sides = split(text, "=")
    if len(sides) == 2 and all(side.strip() for side in sides):
        return ("equation", structure(sides[0]), structure(sides[1]))
    if len(sides) > 2 and all(side.strip() for side in sides):
        return ("equation", structure(sides[0]), structure(sides[-1]))
    ratio = text.split(":")
    if len(ratio) in (2, 3) and not re.search(r"[ap]\.? ?m\b", text, re.I) and "(" not in text:
        return ("bracket", ":", ":", tuple(structure(part) for part in ratio))
    bare = text.lstrip("+-").strip()
    if bare in (r"\infty", "infty", "infinity", "oo"):
        return ("infinity", "-" if text.startswith("-") else "+")
    node = Parser(tokens(text)).whole()
    if has(node, (r"\pm",)):
        return ("set", (("x", _signs(node, "+")), ("x", _signs(node, "-"))))
    return ("x", node)


def _flat(items: list[Node]) -> list[Node]:
    return [inner for item in items for inner in (item[1] if item[0] == "set" else (item,))]


def _matching(text: str) -> bool:
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return index == len(text) - 1
    return False


def _interval(pieces: list[str], relations: list[str]) -> Node:
    """x > 5, 2 <= x < 3 and their mirror images as intervals; anything else as a relation of its sides."""
    sides = [structure(piece) for piece in pieces]
    strict = [relation in "<>" for relation in relations]
    if r"\ne" in relations:
        return ("relation", tuple(relations), tuple(sides))
    up = [relation in ("<", r"\le") for relation in relations]
    if len(sides) == 2 and (_is_variable(sides[0]) or _is_variable(sides[1])):
        variable_first = _is_variable(sides[0])
        bound = sides[1] if variable_first else sides[0]
        if up[0] == variable_first:
            return ("bracket", "(", ")" if strict[0] else "]", (("infinity", "-"), bound))
        return ("bracket", "(" if strict[0] else "[", ")", (bound, ("infinity", "+")))
    if len(sides) == 3 and _is_variable(sides[1]) and up[0] == up[1]:
        low, high = (0, 1) if up[0] else (1, 0)
        ends = (sides[0], sides[2]) if up[0] else (sides[2], sides[0])
        return ("bracket", "(" if strict[low] else "[", ")" if strict[high] else "]", ends)
    if len(sides) == 2:
        left, right = (sides[0], sides[1]) if up[0] else (sides[1], sides[0])
        return ("relation", ("<" if strict[0] else r"\le",), (left, right))
    return ("relation", tuple(relations), tuple(sides))


def _is_variable(node: Node) -> bool:
    return node[0] == "x" and _named(("equation", node))


def same(left: Node, right: Node) -> bool:
    """Whether two trees mean the same. Raises `UndecidedError` when that hangs on a piece that cannot be evaluated."""
    if left[0] == "equation" and right[0] == "equation":
        return _same_equation(left, right)
    if left[0] == "equation" and (_named(left) or _calculates(left)):
        return same(left[2], right)
    if right[0] == "equation" and (_named(right) or _calculates(right)):
        return same(left, right[2])
    if left[0] != right[0]:
        if {left[0], right[0]} == {"matrix", "bracket"}:  # a column or row vector written as a tuple
            matrix, tuple_ = (left, right) if left[0] == "matrix" else (right, left)
            cells = tuple(cell for row in matrix[1] for cell in row)
            if (len(matrix[1]) == 1 or all(len(row) == 1 for row in matrix[1])) and tuple_[1] == "(":
                return len(cells) == len(tuple_[3]) and all(map(same, cells, tuple_[3]))
        if {left[0], right[0]} == {"bracket", "x"}:  # the ratio 1:2 and the number 1/2
            ratio, number = (left, right) if left[0] == "bracket" else (right, left)
            if (
                ratio[1] == ":"
                and len(ratio[3]) == 2
                and all(part[0] == "x" for part in ratio[3])
                and number[1][0] == "/"
            ):
                return _same_number(("/", ratio[3][0][1], ratio[3][1][1]), number[1])
        if {left[0], right[0]} == {"set", "union"}:  # x < -2 or x > 2
            return all(part[0] == "bracket" and part[1] != ":" for part in (*left[1], *right[1])) and _same_members(
                left[1], right[1]
            )
        if "set" in (left[0], right[0]):
            single, other = (left, right) if left[0] == "set" else (right, left)
            if len(single[1]) == 1:
                return same(single[1][0], other)
        return False
    kind = left[0]
    if kind == "x":
        return _same_number(left[1], right[1])
    if kind == "infinity":
        return left == right
    if kind in ("matrix", "vmatrix"):
        return (
            len(left[1]) == len(right[1])
            and all(len(a) == len(b) for a, b in zip(left[1], right[1], strict=True))
            and all(same(a, b) for x, y in zip(left[1], right[1], strict=True) for a, b in zip(x, y, strict=True))
        )
    if kind == "bracket":
        return left[1:3] == right[1:3] and len(left[3]) == len(right[3]) and all(map(same, left[3], right[3]))
    if kind in ("set", "union"):
        return _same_members(left[1], right[1])
    if kind == "relation":
        if left[1] != right[1] or len(left[2]) != len(right[2]):
            return False
        if all(map(same, left[2], right[2])):
            return True
        if left[1] == (r"\ne",):
            return all(map(same, left[2], right[2][::-1]))
        a = [side[1] for side in (*left[2], *right[2]) if side[0] == "x"]
        if len(a) == 4:  # l < r and l' < r' mean the same when r - l and r' - l' do, up to a positive factor
            return _proportional(("-", a[1], a[0]), ("-", a[3], a[2]), positive=True)
    return False


def _named(equation: Node) -> bool:
    """x = 5, f(x) = 5, AB = 5: the left side only names what is asked for."""
    left = equation[1]
    if left[0] == "bracket":
        return all(_named(("equation", item)) for item in left[3])
    return left[0] == "x" and not has(left[1], ("n", "+", "-", "pi", "i", "!"))


def _calculates(equation: Node) -> bool:
    """3 + 4 = 7: no side holds an unknown, so the right side is the answer."""
    return all(side[0] == "x" and not has(side[1], ("v",)) for side in equation[1:]) and _same_number(
        equation[1][1], equation[2][1]
    )


def _same_equation(left: Node, right: Node) -> bool:
    sides = (*left[1:], *right[1:])
    if all(side[0] == "x" for side in sides):
        a, b, c, d = (side[1] for side in sides)
        return _proportional(("-", a, b), ("-", c, d), positive=False)
    return (same(left[1], right[1]) and same(left[2], right[2])) or (
        same(left[1], right[2]) and same(left[2], right[1])
    )


def _proportional(left: Node, right: Node, positive: bool) -> bool:
    """Whether left = c right with one constant c != 0 (c > 0) at four points: then both vanish together."""
    mp = _context()
    ratios = []
    for trial in range(4):
        try:
            x, y = _value(left, trial), _value(right, trial)
        except (ArithmeticError, ValueError, TypeError, AttributeError, OverflowError) as problem:
            raise UndecidedError(str(problem)) from None
        if x == 0 or y == 0:
            return x == y
        ratios.append(x / y)
    first = ratios[0]
    if any(abs(ratio - first) > mp.mpf(10) ** -25 * abs(first) for ratio in ratios):
        return False
    return not positive or (mp.im(first) == 0 and mp.re(first) > 0)


def _same_members(left: tuple[Node, ...], right: tuple[Node, ...]) -> bool:
    if len(left) != len(right) or len(left) > 60:
        return False
    rest = list(right)
    for item in left:
        for index, other in enumerate(rest):
            if same(item, other):
                del rest[index]
                break
        else:
            return False
    return True
