r"""The value of an expression: an exact rational where it has one, else a number to 40 digits at fixed points.

Two expressions with variables are taken as equal when they agree at two fixed points. That is identity testing:
nothing is expanded or simplified, so no input can make it slow. Exact rationals are bounded by their size in bits.
"""

from __future__ import annotations

import math
import operator
import zlib
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .expressions import (
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
    UndecidedError,
    Variable,
)

DIGITS = 40
AGREEING_DIGITS = 25  # of the 40: as many as survive rounding in two expressions of one value
BITS = 40_000  # of an exact rational, numerator and denominator together
EXPONENT = 2000  # the largest power, exact or not

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


# --- to 40 digits -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _precise() -> Any:
    """mpmath at DIGITS digits, in a private context: the global precision belongs to the caller."""
    import mpmath

    context = mpmath.mp.clone()
    context.dps = DIGITS
    return context


def _is_close(a: Any, b: Any, scale: Any) -> bool:
    return bool(abs(a - b) <= _precise().mpf(10) ** -AGREEING_DIGITS * scale)


def _value(expression: Expression, point: int) -> Any:
    """The value with each variable at a fixed number between 0.14 and 1.58 that its name and `point` decide.

    Raises:
        UndecidedError: no value, or one too large to compute with.
    """
    mp = _precise()
    match expression:
        case Number(number):
            return mp.mpf(number.numerator) / number.denominator
        case Variable(name):
            return mp.mpf(zlib.crc32(f"{point}{name}".encode()) % 1_000_003) / 700_001 + mp.mpf(1) / 7
        case Constant("pi"):
            return +mp.pi
        case Constant("e"):
            return mp.e + 0
        case Constant():
            return mp.mpc(0, 1)
        case Binary("^", base, exponent):
            return _power(_value(base, point), _value(exponent, point), is_cube_root=exponent == THIRD)
        case Binary(sign, left, right) if sign in ARITHMETIC:
            a, b = _value(left, point), _value(right, point)
            if sign == "/" and b == 0:
                raise UndecidedError("division by zero")
            return ARITHMETIC[sign](a, b)
        case Function(name, argument):
            return _function(name, _value(argument, point))
    exact = exact_value(expression)  # a factorial or a binomial
    if exact is None:
        raise UndecidedError("no value")
    return mp.mpf(exact.numerator) / exact.denominator


def _power(base: Any, exponent: Any, *, is_cube_root: bool) -> Any:
    mp = _precise()
    if abs(exponent) > EXPONENT or (base != 0 and abs(mp.log(abs(base))) > 5000):
        raise UndecidedError("a power too large")
    if base == 0 and mp.re(exponent) <= 0:
        raise UndecidedError("a power of zero")
    if is_cube_root and mp.im(base) == 0 and mp.re(base) < 0:
        return -((-base) ** exponent)  # the real root, which is what a textbook means
    return base**exponent


def _function(name: str, argument: Any) -> Any:
    mp = _precise()
    if abs(argument) > 1e4:
        raise UndecidedError("an argument too large")
    if name in ("log", "ln"):
        if argument == 0:
            raise UndecidedError("log of zero")
        return mp.log(argument) / (mp.log(10) if name == "log" else 1)
    if name == "abs":
        return abs(argument)
    return getattr(mp, name.replace("arc", "a", 1))(argument)  # mpmath's names: asin, floor, ceil, ...


def _value_or_undecided(expression: Expression, point: int) -> Any:
    try:
        return _value(expression, point)
    except (ArithmeticError, ValueError, TypeError, AttributeError, OverflowError) as problem:
        raise UndecidedError(str(problem)) from None  # mpmath's words for "not defined there"


# --- comparisons ------------------------------------------------------------------------------------------------------


def equal_values(left: Expression, right: Expression) -> bool:
    """Whether two expressions have one value: exactly, or at two points, or one is a long decimal that the other
    rounds to.

    >>> from eval.grader.expressions import parse
    >>> equal_values(parse(r"\\sin^2 x + \\cos^2 x"), parse("1")), equal_values(parse("0.333333"), parse(r"\\frac13"))
    (True, True)
    """
    if isinstance(left, Numeral) or isinstance(right, Numeral):
        return left == right
    a, b = exact_value(left), exact_value(right)
    if a is not None and b is not None:
        return a == b or _rounds_to(b, left) or _rounds_to(a, right)
    for point in range(2):
        x, y = _value_or_undecided(left, point), _value_or_undecided(right, point)
        if not (_precise().isfinite(x) and _precise().isfinite(y)):
            raise UndecidedError("not finite")
        if not _is_close(x, y, max(1, abs(x), abs(y))):
            return _rounds_to(y, left) or _rounds_to(x, right)
    return True


def _rounds_to(value: Any, decimal: Expression) -> bool:
    """Whether `decimal` is a decimal of 6 places or more, and `value` rounded or cut there: 0.333333 for 1/3."""
    sign = 1
    while isinstance(decimal, Binary) and decimal.operator == "-" and decimal.left == ZERO:
        sign, decimal = -sign, decimal.right
    if not isinstance(decimal, Number) or not decimal.places:
        return False
    if isinstance(value, Fraction):
        return abs(sign * decimal.value - value) < Fraction(1, 10**decimal.places)
    mp = _precise()
    written = sign * mp.mpf(decimal.value.numerator) / decimal.value.denominator
    return bool(abs(written - value) < mp.mpf(10) ** -decimal.places)


def are_proportional(left: Expression, right: Expression, *, positive: bool) -> bool:
    """Whether left = c right with one constant c != 0 (c > 0 if `positive`) at four points: then both vanish
    together.
    """
    mp = _precise()
    ratios = []
    for point in range(4):
        x, y = _value_or_undecided(left, point), _value_or_undecided(right, point)
        if x == 0 or y == 0:
            return bool(x == y)
        ratios.append(x / y)
    first = ratios[0]
    if not all(_is_close(ratio, first, abs(first)) for ratio in ratios):
        return False
    return not positive or bool(mp.im(first) == 0 and mp.re(first) > 0)
