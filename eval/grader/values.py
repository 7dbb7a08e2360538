r"""The value of an expression: an exact rational where it has one, else a number to DIGITS digits.

Two expressions with variables are taken as equal when they agree at every one of POINTS where both are real: small
and large, positive and negative, whole and broken numbers, so that |x|, floors, even roots and pieces with a corner
are told from what they equal on one interval. That is identity testing: nothing is expanded or simplified, so no
input can make it slow. Exact rationals are bounded by their size in bits.
"""

from __future__ import annotations

import math
import operator
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .errors import TooLargeError, UndecidedError
from .expressions import (
    ONE,
    THIRD,
    ZERO,
    Binary,
    Binomial,
    Constant,
    Expression,
    Factorial,
    Function,
    Number,
    Numeral,
    Variable,
    substitute,
    variables,
    walk,
)

DIGITS = 100
AGREEING_DIGITS = 70  # of them: as many as survive rounding in two expressions of one value
BITS = 60_000  # of an exact rational, numerator and denominator together
EXPONENT = 20_000  # the largest power, exact or not
FACTORIAL = 200_000  # the largest argument of a factorial
HUGE = 1e60  # a tangent past that is a pole

ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _is_integer(value: Fraction | None) -> bool:
    return value is not None and value.denominator == 1


# --- exact ------------------------------------------------------------------------------------------------------------


def exact_value(expression: Expression) -> Fraction | None:
    """The exact value, where the expression is made of rationals and whole powers of them; None if not, or if it
    grows too big.
    """
    match expression:
        case Number(value):
            return value
        case Binary("^", base, exponent):
            return _exact_power(exact_value(base), exact_value(exponent))
        case Binary(sign, left, right) if sign in ARITHMETIC:
            a, b = exact_value(left), exact_value(right)
            if a is None or b is None or (sign == "/" and b == 0):
                return None
            result = ARITHMETIC[sign](a, b)
            return result if _bits(result) < BITS else None
        case Factorial(argument):
            n = exact_value(argument)
            return Fraction(math.factorial(int(n))) if n is not None and _is_integer(n) and 0 <= n <= 200 else None
        case Binomial(top, bottom):
            n, k = exact_value(top), exact_value(bottom)
            if n is None or k is None or not (_is_integer(n) and _is_integer(k) and 0 <= k <= n <= 500):
                return None
            return Fraction(math.comb(int(n), int(k)))
    return None


def _exact_power(base: Fraction | None, exponent: Fraction | None) -> Fraction | None:
    if base is None or exponent is None or not _is_integer(exponent) or abs(exponent) > EXPONENT:
        return None
    if base == 0 and exponent <= 0:
        return None
    if _bits(base) * abs(int(exponent)) > BITS:  # known before it is computed
        return None
    return base ** int(exponent)


# --- points -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where variables stand: each at a number between `low` and `high` that its name and `salt` decide."""

    salt: int
    """Tells points of one kind apart."""
    low: float
    """The smallest size; in units of the expressions' largest constant if `scaled`."""
    high: float
    """The largest size, likewise."""
    sign: str = "+"
    """"+" or "-" for all; "+-" or "-+" for one variable after the other."""
    whole: bool = False
    """Whether only whole numbers are taken."""
    scaled: bool = False
    """Whether the sizes grow with the largest constant: past every corner of |x - 40|."""


POINTS = (
    Point(0, 0.14, 1.58), Point(1, 0.14, 1.58), Point(2, 1.6, 9), Point(3, 0.2, 5, "-"), Point(4, 0.2, 9, "+-"),
    Point(5, 1.1, 3, scaled=True), Point(6, 1.1, 3, "-", scaled=True), Point(7, 0.05, 1, "-+", scaled=True),
    Point(8, 2, 12, whole=True), Point(9, 2, 12, "+-", whole=True), Point(10, 0.3, 0.9, "-"),
)  # fmt: skip
LARGEST_REACH = 1000.0


@dataclass(frozen=True)
class Place:
    """A point for the variables of certain expressions."""

    point: Point
    """The kind of numbers."""
    names: tuple[str, ...] = ()
    """The variables, in order."""
    reach: float = 1.0
    """The largest constant of the expressions, and a little more."""

    def value(self, name: str) -> Fraction:
        """The number at which the variable `name` stands, exactly."""
        point = self.point
        share = zlib.crc32(f"{point.salt}{name}".encode()) % 1_000_003 / 1_000_003
        size = (point.low + (point.high - point.low) * share) * (self.reach if point.scaled else 1)
        number = Fraction(round(size)) if point.whole else Fraction(round(size * 7_000_001), 7_000_001)
        return -number if point.sign[self.names.index(name) % len(point.sign)] == "-" else number


def _places(*expressions: Expression) -> list[Place]:
    constants = [abs(part.value) for each in expressions for part in walk(each) if isinstance(part, Number)]
    reach = min(float(min(max(constants, default=Fraction(1)), Fraction(10**6))) + 2, LARGEST_REACH)
    names = tuple(sorted(set().union(*map(variables, expressions))))
    return [Place(point, names, reach) for point in POINTS]


NOWHERE = Place(POINTS[0])  # for expressions without variables


# --- to so many digits ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _precise(digits: int) -> Any:
    """mpmath at so many digits, in a private context: the global precision belongs to the caller."""
    import mpmath

    context = mpmath.mp.clone()
    context.dps = digits
    return context


class _Evaluation:
    """One evaluation: a precision, and where the variables stand."""

    def __init__(self, digits: int, place: Place) -> None:
        self.mp, self.place = _precise(digits), place

    def rational(self, number: Fraction) -> Any:
        return self.mp.mpf(number.numerator) / number.denominator

    def value(self, expression: Expression) -> Any:
        """
        Raises:
            UndecidedError: no value there.
            TooLargeError: one too large to compute with.
        """
        mp = self.mp
        match expression:
            case Number(number):
                return self.rational(number)
            case Variable(name):
                return self.rational(self.place.value(name))
            case Constant("pi"):
                return +mp.pi
            case Constant("e"):
                return mp.e + 0
            case Constant():
                return mp.mpc(0, 1)
            case Binary("^", base, exponent):
                return self.power(self.value(base), self.value(exponent), is_cube_root=exponent == THIRD)
            case Binary(sign, left, right) if sign in ARITHMETIC:
                a, b = self.value(left), self.value(right)
                if sign == "/" and b == 0:
                    raise UndecidedError("division by zero")
                return ARITHMETIC[sign](a, b)
            case Function(name, argument):
                return self.function(name, self.value(argument))
            case Factorial(argument):
                return self.factorial(self.value(argument))
            case Binomial(top, bottom):
                return self.binomial(self.value(top), self.value(bottom))
        raise UndecidedError("no value")

    def power(self, base: Any, exponent: Any, *, is_cube_root: bool) -> Any:
        mp = self.mp
        if abs(exponent) > EXPONENT or (base != 0 and abs(mp.log(abs(base))) > 10 * EXPONENT):
            raise TooLargeError("a power too large to compute")
        if base == 0 and mp.re(exponent) <= 0:
            raise UndecidedError("a power of zero")
        if is_cube_root and mp.im(base) == 0 and mp.re(base) < 0:
            return -((-base) ** exponent)  # the real root, which is what a textbook means
        return base**exponent

    def function(self, name: str, argument: Any) -> Any:
        mp = self.mp
        if name == "abs":
            return abs(argument)
        if name in ("log", "ln"):
            if argument == 0:
                raise UndecidedError("log of zero")
            return mp.log(argument) / (mp.log(10) if name == "log" else 1)
        if name in ("floor", "ceil"):
            return getattr(mp, name)(mp.re(argument))
        if abs(argument) > 1e4:
            raise TooLargeError("an argument too large to compute with")
        result = getattr(mp, name.replace("arc", "a", 1))(argument)  # mpmath's names: asin, sinh, exp, ...
        if abs(result) > HUGE and name in ("tan", "cot", "sec", "csc"):
            raise UndecidedError("a pole")
        return result

    def factorial(self, n: Any) -> Any:
        if n != self.mp.floor(self.mp.re(n)) or n < 0:
            raise UndecidedError("a factorial of a broken or negative number")
        if n > FACTORIAL:
            raise TooLargeError("a factorial too large to compute")
        return self.mp.factorial(n)

    def binomial(self, n: Any, k: Any) -> Any:
        if max(abs(n), abs(k)) > FACTORIAL:
            raise TooLargeError("a binomial coefficient too large to compute")
        return self.mp.binomial(n, k)


def _value(expression: Expression, digits: int = DIGITS, place: Place = NOWHERE) -> Any:
    """The finite value at a place.

    Raises:
        UndecidedError, TooLargeError: there is none.
    """
    try:
        value = _Evaluation(digits, place).value(expression)
    except (ArithmeticError, ValueError, TypeError, AttributeError) as problem:
        raise UndecidedError(str(problem)) from None  # mpmath's words for "not defined there"
    if not _precise(digits).isfinite(value):
        raise UndecidedError("not finite")
    return value


def real_value(expression: Expression) -> Any:
    """The value of an expression without variables as a real number of mpmath; None if it has none."""
    if any(isinstance(part, Variable | Numeral) for part in walk(expression)):
        return None
    try:
        value = _value(expression)
    except UndecidedError:
        return None
    return _precise(DIGITS).mpf(value.real) if value.imag == 0 else None


def is_close(a: Any, b: Any) -> bool:
    """Whether two numbers agree in so many digits, however small they are."""
    return bool(abs(a - b) <= _precise(DIGITS).mpf(10) ** -AGREEING_DIGITS * max(abs(a), abs(b)))


# --- comparisons ------------------------------------------------------------------------------------------------------


def equal_values(left: Expression, right: Expression) -> bool:
    """Whether two expressions have one value: exactly, or at all points, or one is a long decimal that the other
    rounds to.

    >>> from eval.grader.expressions import parse
    >>> equal_values(parse(r"\\\\sin^2 x + \\\\cos^2 x"), parse("1")), equal_values(parse("|x|"), parse("x"))
    (True, False)
    >>> equal_values(parse("0.333333"), parse(r"\\\\frac13")), equal_values(parse("e^{-100}"), parse("0"))
    (True, False)

    Raises:
        UndecidedError: defined at fewer than two points, or not at all.
        TooLargeError: too large to compute.
    """
    if isinstance(left, Numeral) or isinstance(right, Numeral):
        return left == right
    # 1. exact rationals
    a, b = exact_value(left), exact_value(right)
    if a is not None and b is not None:
        return a == b or _rounds_to(b, left) or _rounds_to(a, right)
    # 2. numbers
    if not any(isinstance(part, Variable) for each in (left, right) for part in walk(each)):
        x, y = _value(left), _value(right)
        return _agree(left, right, x, y, NOWHERE) or _rounds_to(y, left) or _rounds_to(x, right)
    # 3. formulas
    return all(_agree(left, right, x, y, place) for place, x, y in _values_at_points(left, right))


def _agree(left: Expression, right: Expression, x: Any, y: Any, place: Place) -> bool:
    """Whether x and y, the values of two expressions at a place, are one number.

    Where they differ, both may still be zero, of which rounding left traces (as in the sine of pi): computed with
    twice the digits, those shrink, and a number does not.
    """
    if is_close(x, y):
        return True
    size = max(abs(x), abs(y))
    if min(abs(x), abs(y)) > 1e-30 * size and abs(x - y) > 1e-30 * size and size > 1e-60:
        return False
    x, y = _value(left, 2 * DIGITS, place), _value(right, 2 * DIGITS, place)
    return is_close(x, y) or bool(max(abs(x), abs(y)) <= _precise(DIGITS).mpf(10) ** (-DIGITS // 2) * size)


def _values_at_points(left: Expression, right: Expression) -> list[tuple[Place, Any, Any]]:
    """(place, value of left, value of right) at each point where both have a real value.

    Where neither mentions i, points outside the real domain are left out: \\\\ln x^2 is 2 \\\\ln x for x > 0.

    Raises:
        UndecidedError: there are fewer than two such points.
    """
    is_complex = any(isinstance(part, Constant) and part.name == "i" for each in (left, right) for part in walk(each))
    found = []
    limit: UndecidedError | None = None
    for place in _places(left, right):
        try:
            x, y = _value(left, DIGITS, place), _value(right, DIGITS, place)
        except UndecidedError as problem:
            limit = problem
            continue
        if is_complex or (x.imag == 0 and y.imag == 0):
            found.append((place, x, y))
    if len(found) < 2:
        raise limit or UndecidedError("not real anywhere")
    return found


def _rounds_to(value: Any, decimal: Expression) -> bool:
    """Whether `decimal` is a decimal of 6 places or more, and `value` rounded or cut there: 0.333333 for 1/3."""
    sign = 1
    while isinstance(decimal, Binary) and decimal.operator == "-" and decimal.left == ZERO:
        sign, decimal = -sign, decimal.right
    if not isinstance(decimal, Number) or not decimal.places or decimal.value * 10**decimal.places < 1000:
        return False  # 0.000000 shows nothing
    if isinstance(value, Fraction):
        return abs(sign * decimal.value - value) < Fraction(1, 10**decimal.places)
    mp = _precise(DIGITS)
    written = sign * mp.mpf(decimal.value.numerator) / decimal.value.denominator
    return bool(abs(written - value) < mp.mpf(10) ** -decimal.places)


def are_proportional(left: Expression, right: Expression, *, positive: bool) -> bool:
    """Whether left = c right with one constant c != 0 (c > 0 if `positive`) at all points: then both vanish
    together.
    """
    ratios = []
    for _, x, y in _values_at_points(left, right):
        if x == 0 or y == 0:
            if x != y:
                return False
        else:
            ratios.append(x / y)
    if not ratios or not all(is_close(ratio, ratios[0]) for ratio in ratios):
        return not ratios
    return not positive or bool(ratios[0].imag == 0 and ratios[0].real > 0)


def affine(expression: Expression, name: str) -> tuple[Expression, Expression] | None:
    """(a, b) if the expression is a x + b in its variable `name`; None if it is not.

    >>> from eval.grader.expressions import parse
    >>> slope, _ = affine(parse("3 - 2x"), "x")
    >>> exact_value(slope)
    Fraction(-2, 1)
    """

    at_zero, at_one = substitute(expression, name, ZERO), substitute(expression, name, ONE)
    slope = Binary("-", at_one, at_zero)
    line = Binary("+", Binary("*", slope, Variable(name)), at_zero)
    try:
        return (slope, at_zero) if equal_values(line, expression) else None
    except UndecidedError:
        return None
