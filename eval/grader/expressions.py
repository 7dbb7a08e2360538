r"""Expressions as trees, and a small bounded parser that makes them from cleaned LaTeX.

    parse(r"\frac{1}{2}x")  ->  Binary("*", Binary("/", Number(1), Number(2)), Variable("x"))

Model output is untrusted, so everything is bounded: LENGTH characters, TOKENS tokens, DEPTH levels. What the parser
does not know, or what is past a bound, raises `UndecidedError`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from .errors import TooLargeError, UndecidedError

LENGTH = 600
TOKENS = 300
DEPTH = 40
SIGNS = 4  # plus-minus signs that are read independently of each other

PLUS_MINUS, MINUS_PLUS = r"\pm", r"\mp"


# --- the tree ---------------------------------------------------------------------------------------------------------


class Expression:
    """Base class of the nodes below."""

    __slots__ = ()

    def children(self) -> tuple[Expression, ...]:
        """The expressions directly below this one."""
        return ()


@dataclass(frozen=True, slots=True)
class Number(Expression):
    """A whole number or a decimal, exactly."""

    value: Fraction
    """The exact value."""
    places: int = 0
    """Decimal places as written if they are 6 or more, else 0: only so long a decimal may stand for what it rounds."""


@dataclass(frozen=True, slots=True)
class Numeral(Expression):
    """Digits with a base as subscript, `40_9`. It has no value here: it equals only the same digits in the same
    base.
    """

    digits: str
    """The digits as written."""
    base: Expression
    """The subscript."""

    def children(self) -> tuple[Expression, ...]:
        return (self.base,)


@dataclass(frozen=True, slots=True)
class Constant(Expression):
    r"""`\pi`, `e` or `i`."""

    name: str
    """"pi", "e" or "i"."""


@dataclass(frozen=True, slots=True)
class Variable(Expression):
    """A letter with its subscript, such as `x` or `a1`."""

    name: str
    """The letter with its subscript."""


@dataclass(frozen=True, slots=True)
class Binary(Expression):
    r"""`left operator right`, where the operator is one of + - * / ^ and \pm. A leading minus is 0 - x."""

    operator: str
    """The operator."""
    left: Expression
    """The left operand."""
    right: Expression
    """The right operand."""

    def children(self) -> tuple[Expression, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, slots=True)
class Factorial(Expression):
    argument: Expression
    """The expression before the exclamation mark."""

    def children(self) -> tuple[Expression, ...]:
        return (self.argument,)


@dataclass(frozen=True, slots=True)
class Binomial(Expression):
    top: Expression
    """n of n choose k."""
    bottom: Expression
    """k of n choose k."""

    def children(self) -> tuple[Expression, ...]:
        return (self.top, self.bottom)


@dataclass(frozen=True, slots=True)
class Function(Expression):
    """A function of one argument: sin, arctan, ln, abs, floor, ..."""

    name: str
    """Name of the function."""
    argument: Expression
    """Its argument."""

    def children(self) -> tuple[Expression, ...]:
        return (self.argument,)


ZERO, ONE = Number(Fraction(0)), Number(Fraction(1))
HALF, THIRD = Number(Fraction(1, 2)), Binary("/", ONE, Number(Fraction(3)))
PERCENT = Number(Fraction(1, 100))


def negative(expression: Expression) -> Expression:
    return Binary("-", ZERO, expression)


def walk(expression: Expression) -> Iterator[Expression]:
    """The expression and everything below it."""
    yield expression
    for child in expression.children():
        yield from walk(child)


def rebuild(expression: Expression, change: Callable[[Expression], Expression]) -> Expression:
    """The expression with `change` applied to each of its direct children."""
    values = {field.name: getattr(expression, field.name) for field in fields(expression)}  # type: ignore[arg-type]
    changed = {name: change(value) for name, value in values.items() if isinstance(value, Expression)}
    return replace(expression, **changed) if changed else expression  # type: ignore[type-var]


def substitute(expression: Expression, name: str, value: Expression) -> Expression:
    """The expression with `value` in the place of a variable."""
    if isinstance(expression, Variable):
        return value if expression.name == name else expression
    return rebuild(expression, lambda child: substitute(child, name, value))


def variables(expression: Expression) -> set[str]:
    return {part.name for part in walk(expression) if isinstance(part, Variable)}


def read_signs(expression: Expression) -> list[Expression]:
    r"""The expressions that one with \pm stands for: \pm 1 \pm 2 are four numbers, but \mp always opposes \pm."""
    signs = [part.operator for part in walk(expression) if isinstance(part, Binary)]
    signs = [sign for sign in signs if sign in (PLUS_MINUS, MINUS_PLUS)]
    if not signs:
        return [expression]
    if MINUS_PLUS in signs:
        return [_choose(expression, itertools.repeat(sign)) for sign in "+-"]
    if len(signs) > SIGNS:
        raise TooLargeError("too many plus-minus signs")
    return [_choose(expression, iter(choice)) for choice in itertools.product("+-", repeat=len(signs))]


def _choose(expression: Expression, signs: Iterator[str]) -> Expression:
    r"""The expression with each \pm, from the outside in, read as the next of `signs`."""
    if isinstance(expression, Binary) and expression.operator in (PLUS_MINUS, MINUS_PLUS):
        sign = next(signs)
        opposite = {"+": "-", "-": "+"}[sign] if expression.operator == MINUS_PLUS else sign
        return Binary(opposite, _choose(expression.left, signs), _choose(expression.right, signs))
    return rebuild(expression, lambda child: _choose(child, signs))


# --- tokens -----------------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"\s*([0-9]+\.[0-9]+|\.[0-9]+|[0-9]+\.?|\\[a-zA-Z]+|\\[{}|%\\]|[a-zA-Z]|.)")
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "lg",
    "ln", "exp", "cis",
}  # fmt: skip
OF_AN_ANGLE = {"sin", "cos", "tan", "cot", "sec", "csc", "cis"}
DEGREE = r"\degree"
GREEK = {
    "alpha", "beta", "gamma", "theta", "phi", "varphi", "lambda", "mu", "omega", "rho", "sigma", "delta", "epsilon",
    "ell", "tau",
}  # fmt: skip
LETTERS = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z]{2,})")
BARE_COMMAND = re.compile(
    r"(?<![a-zA-Z\\])(sqrt|pi|infty|infinity|sin|cos|tan|cot|sec|csc|log|lg|ln|exp|cis|arcsin|arccos|arctan)(?![a-zA-Z])"
)


def split_tokens(text: str) -> list[str]:
    r"""Numbers, commands, letters and signs, one by one; `sqrt` and `sin` without a backslash are read as commands.

    >>> split_tokens(r"2.5x + sin \pi")
    ['2.5', 'x', '+', '\\sin', '\\pi']
    """
    if len(text) > LENGTH:
        raise TooLargeError("too long to read")
    for run in LETTERS.findall(text):
        if len(run) > 3 and run not in FUNCTIONS and run not in ("sqrt", "frac", "infty", "infinity"):
            raise UndecidedError("words")
    text = BARE_COMMAND.sub(r"\\\1 ", text)
    found = [match.group(1) for match in TOKEN.finditer(text.strip())]
    if len(found) > TOKENS:
        raise TooLargeError("too many tokens")
    return found


# --- the parser -------------------------------------------------------------------------------------------------------

SUMS = ("+", "-", PLUS_MINUS, MINUS_PLUS)
TIMES = ("*", r"\cdot", r"\times", r"\ast")
DIVIDED_BY = ("/", r"\div")
ENDS_PRODUCT = {
    *SUMS, ")", "]", "}", r"\}", "|", ",", "=", "<", ">", "_", "^", "!", "&", r"\le", r"\ge", r"\ne", r"\rfloor",
    r"\rceil", r"\\", DEGREE,
}  # fmt: skip
DIGITS = frozenset("0123456789")  # not str.isdigit, which takes circled and superscript digits for numbers
CHOOSE = re.compile(r"\{\}_\{?(\d{1,4})\}?C_\{?(\d{1,4})\}?")
PLAIN_FRACTION = re.compile(r"\\frac(?:\{\d+\}|\d)(?:\{\d+\}|\d)")


def parse(text: str) -> Expression:
    r"""The tree of one expression.

    >>> parse("2x")
    Binary(operator='*', left=Number(value=Fraction(2, 1), places=0), right=Variable(name='x'))

    Raises:
        UndecidedError: a word, an unknown command, a bracket left open, or a bound passed.
    """
    return _Parser(split_tokens(text)).read_all()


class _Parser:
    """Recursive descent: a sum of products of powers of atoms, with implicit multiplication. One method for each
    level.
    """

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0
        self.bars = 0  # bars of absolute values that are open
        self.in_angle = False  # inside the argument of a trigonometric function, where a degree is pi / 180

    # the token stream

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise UndecidedError("ends early")
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise UndecidedError(f"expected {token}")

    def descend(self) -> None:
        """Counts one more level, so that deep nesting is refused long before Python's recursion limit."""
        self.depth += 1
        if self.depth > DEPTH:
            raise TooLargeError("too deep")

    # the grammar, from the loosest to the tightest binding

    def read_all(self) -> Expression:
        expression = self.sum()
        if self.peek():
            raise UndecidedError(f"left over: {self.peek()}")
        return expression

    def sum(self) -> Expression:
        self.descend()
        total = self.product()
        while self.peek() in SUMS:
            sign = self.take()
            total = Binary(sign, total, self.product())
        self.depth -= 1
        return total

    def product(self) -> Expression:
        # 1. a sign in front applies to the whole product
        if self.peek() in SUMS:
            sign = self.take()
            self.descend()
            inner = self.product()
            self.depth -= 1
            return inner if sign == "+" else Binary(sign, ZERO, inner)
        # 2. factors, written with a sign or side by side
        result = self.power()
        while (token := self.peek()) and (token not in ENDS_PRODUCT or (token == "|" and not self.bars)):
            if token in TIMES:
                self.take()
                result = Binary("*", result, self.signed_power())
            elif token in DIVIDED_BY:
                self.take()
                result = Binary("/", result, self.power())
            elif token == r"\%":
                self.take()
                result = Binary("*", result, PERCENT)
            elif token == r"\frac" and self.is_mixed_number(result):
                result = Binary("+", result, self.power())
            elif token[0] in DIGITS or token[0] == ".":
                raise UndecidedError("a number right after a factor")  # "12 13" is not 156
            else:
                result = Binary("*", result, self.power())
        return result

    def signed_power(self) -> Expression:
        """What follows a multiplication sign: `3 \\cdot -2` is common."""
        if self.peek() not in ("+", "-"):
            return self.power()
        sign = self.take()
        return self.power() if sign == "+" else negative(self.power())

    def is_mixed_number(self, before: Expression) -> bool:
        r"""Whether `before`, a whole number, and the `\frac` that comes next are read as one: 2\frac{1}{2} is 5/2."""
        rest = "".join(self.tokens[self.place : self.place + 9])
        return isinstance(before, Number) and before.value.denominator == 1 and bool(PLAIN_FRACTION.match(rest))

    def power(self) -> Expression:
        base = self.atom()
        while True:
            if self.peek() == "!":
                self.take()
                base = Factorial(base)
            elif self.peek() == "^":
                self.take()
                base = Binary("^", base, self.argument())
            elif self.peek() == DEGREE:
                self.take()
                base = Binary("*", base, Binary("/", Constant("pi"), Number(Fraction(180)))) if self.in_angle else base
            elif self.peek() == "'":
                raise UndecidedError("prime")
            else:
                return base

    def argument(self) -> Expression:
        r"""What follows `^`, `\frac` or `\sqrt`: a group, or one token (one digit of a number, as TeX reads it)."""
        token = self.peek()
        if token == "{":
            return self.group("{", "}")
        if token and token[0] in DIGITS and len(token) > 1:
            self.tokens[self.place] = token[1:]
            return Number(Fraction(token[0]))
        if token == "-":
            self.take()
            return negative(self.argument())
        return self.atom()

    def group(self, opening: str, closing: str) -> Expression:
        self.expect(opening)
        expression = self.sum()
        self.expect(closing)
        return expression

    def atom(self) -> Expression:
        token = self.take()
        if token[0] in DIGITS or (token[0] == "." and len(token) > 1):
            return self.number(token)
        if token in ("(", "["):
            expression = self.sum()
            if self.take() not in (")", "]"):
                raise UndecidedError("bracket")
            return expression
        if token == "{":
            self.place -= 1
            return self.choose_symbol() or self.group("{", "}")
        if token == "|":
            self.bars += 1
            expression = self.sum()
            self.expect("|")
            self.bars -= 1
            return Function("abs", expression)
        if token[0] == "\\":
            return self.command(token)
        if token.isalpha() and token.isascii():
            return Constant(token) if token in ("i", "e") else self.variable(token)
        raise UndecidedError(token)

    def choose_symbol(self) -> Expression | None:
        r"""`{}_5C_2`, the school's way to write a binomial coefficient; None if it is something else."""
        found = CHOOSE.match("".join(self.tokens[self.place : self.place + 14]))
        if not found:
            return None
        self.place += len(split_tokens(found.group()))
        top, bottom = (Number(Fraction(digits)) for digits in found.groups())
        return Binomial(top, bottom)

    def number(self, token: str) -> Expression:
        if len(token) > LENGTH:
            raise TooLargeError("too many digits")
        value = Fraction(token.rstrip("."))
        if self.peek() == "_":
            self.take()
            return Numeral(token, self.argument())
        places = len(token.partition(".")[2])
        return Number(value, places if places >= 6 else 0)

    def command(self, token: str) -> Expression:
        name = token[1:]
        if name == "frac":
            return Binary("/", self.argument(), self.argument())
        if name == "binom":
            return Binomial(self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in ("lfloor", "lceil"):
            expression = self.sum()
            self.expect(rf"\r{name[1:]}")
            return Function(name[1:], expression)
        if name in FUNCTIONS:
            return self.function(name)
        if name == "pi":
            return Constant("pi")
        if name in GREEK:
            return self.variable(name)
        raise UndecidedError(token)

    def root(self) -> Expression:
        if self.peek() == "[":
            degree = self.group("[", "]")
            return Binary("^", self.argument(), Binary("/", ONE, degree))
        if self.peek() == "(":
            return Binary("^", self.group("(", ")"), HALF)
        # models write both "sqrt 12" and "\sqrt12" for the root of 12, where TeX would take one digit
        if self.peek() and self.peek()[0] in DIGITS:
            return Binary("^", Number(Fraction(self.take().rstrip("."))), HALF)
        return Binary("^", self.argument(), HALF)

    def variable(self, name: str) -> Expression:
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                self.take()
                while self.peek() not in ("}", ""):
                    name += self.take()
                self.expect("}")
            else:
                name += self.take()
        return Variable(name)

    def function(self, name: str) -> Expression:
        # 1. a base and an exponent, in either order: \log_2 x, \sin^2 x
        base: Expression | None = None
        exponent: Expression | None = None
        for _ in range(2):
            if self.peek() == "_" and base is None:
                self.take()
                base = self.argument()
            elif self.peek() == "^" and exponent is None:
                self.take()
                exponent = self.argument()
        if exponent == negative(ONE):  # \sin^{-1} is the inverse function
            name, exponent = "arc" + name, None
        # 2. the argument: a bracket, or the factors up to the next sign
        self.descend()
        outside, self.in_angle = self.in_angle, name in OF_AN_ANGLE
        if self.peek() in ("(", "{", "["):
            argument = self.atom()
            if self.peek() == DEGREE:  # \sin(60)^\circ
                self.take()
                argument = Binary("*", argument, Binary("/", Constant("pi"), Number(Fraction(180))))
        else:
            argument = self.power()
            while self.peek() and (self.peek().isalpha() or self.peek() in (r"\pi", r"\theta")):
                argument = Binary("*", argument, self.power())
        self.in_angle = outside
        self.depth -= 1
        # 3. a logarithm with a base is a quotient of natural ones; a base of any other function is read so too
        result: Expression = Function("log" if name == "lg" else name, argument)
        if name == "cis":
            turn = Binary("*", Constant("i"), Function("sin", argument))
            result = Binary("+", Function("cos", argument), turn)
        if base is not None:
            result = Binary("/", Function("ln", argument), Function("ln", base))
        return result if exponent is None else Binary("^", result, exponent)
