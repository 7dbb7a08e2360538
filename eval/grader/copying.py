r"""Answers that equal the gold and are still no answer: the question handed back, or a calculation that was not done.

"Compute $102^2 - 98^2$." asks for 800. A grader that compares values alone pays for \boxed{102^2 - 98^2}, which as a
reward teaches a model to copy. Where the problem is known, a formula of the problem is no answer. Where it is not,
the answer may hold a little more work than the gold, but not much; and a reply that is nothing but a box, so that
nothing shows that anything was done, must have the gold's form.
"""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import UndecidedError
from .expressions import Binary, Expression, Number
from .kinds import Bracket, Equation, Formula, Members, Structure, names_a_quantity
from .latex import clean
from .statements import formulas_in
from .structures import read_structure
from .text import answer_in_last_box, read_rational
from .values import exact_value, real_value

PROBLEM = 20_000  # characters of a problem
SLACK = 2  # operations more than twice the gold's that an answer may leave undone
LETTER = re.compile(r"[a-zA-Z]")
LARGEST = 10**12  # a value that is asked whether it is rational
COMMAND = re.compile(r"\\(?!text|mbox|math|operatorname)[a-z]")  # mathematics, and not words in LaTeX


def copies_the_question(answer: str, gold: str, problem: str) -> bool:
    r"""Whether the answer is a formula of the problem, and not the gold as written, a finished number or a letter: n is
    the answer to "find all functions f" where f(n) = n is.

    >>> copies_the_question("2^{10}", "1024", "What is $2^{10}$?"), copies_the_question("97", "97", "Is $97$ prime?")
    (True, False)
    """
    written = _close_up(answer)
    if written == _close_up(gold) or _is_finished_number(answer) or LETTER.fullmatch(written):
        return False
    return any(written == _close_up(formula) for formula in formulas_in(problem[:PROBLEM]))


def is_only_a_box(response: str) -> bool:
    """Whether a response is a box and nothing else."""
    place, content = answer_in_last_box(response)
    return content is not None and len(response.strip().strip("$")) <= len(content) + len(r"\boxed{}.$") and place < 3


def is_unfinished(answer: str, gold: str, *, is_only_a_box: bool) -> bool:
    r"""Whether an answer that equals the gold leaves a calculation to the reader.

    >>> is_unfinished("(34-10)+(20-9)+(55-10)", "80", is_only_a_box=False)
    True
    >>> is_unfinished(r"\binom{5}{2}", "10", is_only_a_box=False)
    False
    """
    left, right = _read(answer), _read(gold)
    given, wanted = _expressions(left), _expressions(right)
    if given is not None and wanted is not None:
        work, expected = sum(map(_undone, given)), sum(map(_undone, wanted))
        if work > 2 * expected + SLACK:
            return True
    # nothing but a box
    if not is_only_a_box or _close_up(answer) == _close_up(gold) or _is_finished_number(answer):
        return False
    if left is None:
        return COMMAND.search(answer) is not None
    if isinstance(left, Equation) and not names_a_quantity(left.left):
        return not isinstance(right, Equation)
    if given is None or wanted is None:
        return False
    return sorted(map(_form, given)) != sorted(map(_form, wanted))


def _close_up(text: str) -> str:
    text = re.sub(r"\\(?:displaystyle|textstyle|left|right|[,;!: ])|[\s${}]", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).replace(r"\dbinom", r"\binom").rstrip(".,;:?")


def _is_finished_number(answer: str) -> bool:
    """A whole number, a decimal or a fraction in lowest terms."""
    text = clean(answer)
    fraction = re.fullmatch(r"-?\\frac\{(\d{1,40})\}\{(\d{1,40})\}|-?(\d{1,40})/(\d{1,40})", text)
    if fraction and "overline" not in answer:
        top, bottom = (int(part) for part in fraction.groups() if part)
        return bottom != 0 and Fraction(top, bottom).denominator == bottom
    return read_rational(text) is not None and "/" not in text


def _read(text: str) -> Structure | None:
    try:
        return read_structure(clean(text))
    except UndecidedError:
        return None


def _expressions(structure: Structure | None) -> list[Expression] | None:
    """The formulas of an answer, without the names that equations give them; None for other kinds."""
    if structure is None:
        return None
    found: list[Expression] = []
    waiting: list[Structure] = [structure]
    while waiting:
        match waiting.pop():
            case Formula(expression):
                found.append(expression)
            case Equation(_, right):
                waiting.append(right)
            case Members(items) | Bracket(_, _, items):
                waiting += items
            case _:
                return None
    return found


def _undone(expression: Expression) -> int:
    """How many operations between rational numbers an expression holds. A sign, a fraction and the power of ten of
    scientific notation belong to a number, and what is no rational, such as a root of 5, cannot be worked out.
    """
    children = expression.children()
    undone = sum(map(_undone, children))
    match expression:
        case Binary("-", Number(value), _) if value == 0:
            return undone
        case Binary("/", Number(), Number()):
            return undone
        case Binary("*", Number(), Binary("^", Number(ten), _)) if ten == 10:
            return 0
    if not children or any(_rational(child) is None for child in children):
        return undone
    return undone + (_rational(expression) is not None)


def _rational(expression: Expression) -> Fraction | None:
    """The value, where it is a rational number: also of a root of 36, or the whole part of 6.7."""
    exact = exact_value(expression)
    if exact is not None or not expression.children():
        return exact
    value = real_value(expression)
    if value is None or abs(value) > LARGEST:
        return None
    nearest = Fraction(int(value * 5040 + (0.5 if value > 0 else -0.5)), 5040)  # with all denominators up to 10
    return nearest if abs(value * 5040 - nearest * 5040) < 1e-30 else None


def _form(expression: Expression) -> str:
    """The form of an expression: the same text for two that differ in the order of terms and factors alone."""
    match expression:
        case Binary("+" | "-", _, _):
            return "(" + " + ".join(sorted(_terms(expression, 1))) + ")"
        case Binary("*", _, _):
            return " * ".join(sorted(_factors(expression)))
        case Number(value):
            return str(value)
    children = ", ".join(map(_form, expression.children()))
    match expression:
        case Binary(operator, _, _):
            return f"{operator}({children})"
    return f"{type(expression).__name__}{getattr(expression, 'name', '')}({children})"


def _terms(expression: Expression, sign: int) -> list[str]:
    match expression:
        case Binary("+" | "-" as operator, left, right):
            return _terms(left, sign) + _terms(right, sign if operator == "+" else -sign)
        case Number(value) if value == 0:
            return []
    return [("-" if sign < 0 else "") + _form(expression)]


def _factors(expression: Expression) -> list[str]:
    match expression:
        case Binary("*", left, right):
            return _factors(left) + _factors(right)
    return [_form(expression)]
