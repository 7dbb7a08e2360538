r"""LaTeX answers in one spelling, and a small bounded parser for the expressions in them.

`clean` makes `$\dfrac{270}7\text{ degrees}$.` into `\frac{270}7`; `Parser` makes a tree of it, for `eval.equality`. What the parser
does not know raises `UndecidedError`. Bounds: LENGTH characters, TOKENS tokens, DEPTH levels, powers up to EXPONENT.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

LENGTH = 600
TOKENS = 300
DEPTH = 40
EXPONENT = 2000

Node = tuple[Any, ...]


class UndecidedError(Exception):
    """The text is outside what this parser knows, or past its bounds."""


UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "π": r"\pi ",
    "∞": r"\infty ", "√": r"\sqrt ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "±": r"\pm ", "∈": r"\in ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∅": r"\emptyset ", "⁄": "/", "∕": "/",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⁰": "^{0}", "¹": "^{1}",
    "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "⁵": "^{5}", "⁶": "^{6}", "⁷": "^{7}", "⁸": "^{8}", "⁹": "^{9}", "⁻¹": "^{-1}", "，": ",",
    "：": ":", "\u00a0": " ", "’": "'", "“": '"', "”": '"', "€": "", "£": "", "¥": "",
}  # fmt: skip
UNICODE_RULE = re.compile("|".join(map(re.escape, sorted(UNICODE, key=len, reverse=True))))

UNITS = (
    r"units?|degrees?|radians?|dollars?|cents?|inch(?:es)?|in|feet|foot|ft|yards?|yd|miles?|mi|mph|km/h|m/s|kilometers?|km|centimeters?|cm"
    r"|millimeters?|mm|meters?|metres?|kg|kilograms?|grams?|lbs?|pounds?|ounces?|oz|liters?|ml|gallons?|hours?|hrs?|minutes?|mins?"
    r"|seconds?|secs?|days?|weeks?|months?|years?|percentage|percent|pct"
)
WORD_UNIT = re.compile(
    rf"(?:(?<=[0-9}})\]])|(?<=\\pi)) ?(?:(?:square|cubic|sq)\.? ?)?(?:{UNITS})\.?(?:\^\{{?[23]\}}?)?$"
)
SPACING = re.compile(
    r"\\[,;:!> ]|\\(?:quad|qquad|thinspace|displaystyle|textstyle|limits|hfill|nobreakspace|left|right|[bB]igg?[lrm]?)(?![a-zA-Z])|~|&nbsp;"
)
TEXT_COMMANDS = "text|mbox|textbf|textit|textrm|textnormal|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|operatorname|rm|bf|hbox|emph"
TEXT = re.compile(rf"\\(?:{TEXT_COMMANDS}) ?\{{([^{{}}]*)\}}")
NO_UNIT = re.compile(
    r"\b(?:million|billion|trillion|thousand|hundred|dozens?|score|less|more|than|over|per ?cent)\b", re.I
)
REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot) ?\{(\d{1,20})\}")
WRAPPERS = re.compile(r"\\(?:boxed|fbox|ensuremath|mathbb|mathcal|vec|overrightarrow) ?\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")


def clean(text: str) -> str:
    r"""One spelling: Unicode to LaTeX, no spacing commands, no dollar signs, `\frac` alone, units and trailing dots gone.

    >>> clean(r"$\dfrac{270}7\text{ degrees}$."), clean(r"10,\!080"), clean(r"\$2.50")
    ('\\frac{270}7', '10080', '2.50')
    """
    text = UNICODE_RULE.sub(lambda found: UNICODE[found.group()], text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(
        " " if character in "\t\n\r\f\v" else character
        for character in text
        if character in "\t\n\r\f\v" or ord(character) >= 32
    )
    text = re.sub(r"(\d)\s*(?:\\!|\{,\}|,\\!)+\s*(?=\d{3})", r"\1,", text).replace(",,", ",")
    text = re.sub(r"\\\\(?:\[[0-9a-z. ]*\])?", " \x00 ", text)  # a line break of a matrix, or of a model's output
    if r"\begin" not in text:
        text = re.sub(r" \x00 (?=[a-zA-Z{}])", r"\\", text)  # doubled by an escape: \\frac for \frac
    text = SPACING.sub(" ", text)
    for delimiter in (r"\(", r"\)", r"\[", r"\]", r"\$", "$"):
        text = text.replace(delimiter, "")
    text = text.replace("\x00", "\\\\" if r"\begin" in text else " ")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:dbinom|tbinom)(?![a-zA-Z])", r"\\binom", text)
    text = re.sub(r"\\(?:leq|leqslant|le)(?![a-zA-Z])|<=|=<", r"\\le ", text)
    text = re.sub(r"\\(?:geq|geqslant|ge)(?![a-zA-Z])|>=", r"\\ge ", text)
    text = re.sub(r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\ne ", text)
    text = re.sub(r"(?<=\d)[eE]([-+]?)0*(\d{1,3})(?![\d.a-zA-Z])", r" \\times 10^{\1\2}", text)
    text = re.sub(r"\\lt(?![a-zA-Z])", "<", text)
    text = re.sub(r"\\gt(?![a-zA-Z])", ">", text)
    text = re.sub(r"\\lbrace(?![a-zA-Z])", r"\\{", text)
    text = re.sub(r"\\rbrace(?![a-zA-Z])", r"\\}", text)
    text = re.sub(r"\\(?:land|lor|wedge|vee)(?![a-zA-Z])", ",", text)
    text = re.sub(r"\^ ?(?:\{ ?\\(?:circ|degree) ?\}|\\(?:circ|degree)(?![a-zA-Z]))|\\degree(?![a-zA-Z])", "", text)
    text = text.replace("**", "^") if not re.search(r"\*\*[^*]+\*\*", text) else text.replace("**", "")
    text = re.sub(r"(?<=\d)\s*\\?%", " \\\\%", text)
    text = re.sub(r"\s+", " ", text.replace(";", ",")).strip()
    text = _texts(text)
    text = REPEATING.sub(_repeating, text)
    text = re.sub(r"(?<![\d/.}])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}", text)  # a mixed number
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.,])", lambda found: found.group().replace(" ", ""), text)
    if not text.startswith(("(", "[")):  # there a comma separates entries
        text = THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    text = text.strip().rstrip(".,;:? ").removesuffix("\\").strip()
    for _ in range(2):
        shorter = WORD_UNIT.sub("", text).strip()
        if shorter == text:
            break
        text = shorter
    return _unwrap(text)


def _repeating(found: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction: digits without and with the period, over 9...90...0."""
    whole, fixed, period = found.groups()
    top = int(whole + fixed + period or "0") - int(whole + fixed or "0")
    return rf"\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _texts(text: str) -> str:
    r"""`\text{...}`: "and"/"or" separate list items; a text behind a value is its unit; a text alone is the answer."""

    def replace(found: re.Match[str]) -> str:
        inside = found.group(1)
        word = inside.strip().strip(",").strip().lower()
        if word in ("and", "or"):
            return ", "
        if word in ("if", "for", "when", "where", "is"):
            return f" {word} "
        if NO_UNIT.search(inside):
            return f" {inside} "
        before = text[: found.start()].rstrip()
        if (
            re.search(r"[0-9})]$|\\pi$", before)
            and not before.endswith(("\\frac{", "^{", "_{"))
            and re.match(r"^[\s,.]*[A-Za-z. /'-]+\d?$", inside)
            and inside[:1] != "("
        ):
            if re.match(r"^\s*[ap]\.?\s*m\.?\s*$", inside, re.I):
                return inside
            return " \\unit "
        return inside

    for _ in range(3):
        after = TEXT.sub(replace, text)
        if after == text:
            break
        text = after
    text = re.sub(r"\\unit ?(?:\^ ?(?:\{ ?[23] ?\}|[23]))?", " ", text)
    text = re.sub(r"(?<=[0-9a-z)}]),? (?:and|or) (?=[-+0-9a-zA-Z\\(])", ", ", text)
    return re.sub(r", *,", ",", re.sub(r"\s+", " ", text)).strip()


def _unwrap(text: str) -> str:
    for _ in range(3):
        after = WRAPPERS.sub(r"\1", text)
        if after.startswith("{") and after.endswith("}") and _closing(after, 0) == len(after) - 1:
            after = after[1:-1].strip()
        if after == text:
            return text
        text = after
    return text


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
    return -1


# --- expressions -------------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"\s*(\d+\.\d+|\.\d+|\d+\.?|\\[a-zA-Z]+|\\[{}|%\\]|[a-zA-Z]|.)")
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "exp",
}  # fmt: skip
LETTERS = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z]{2,})")


def tokens(text: str) -> list[str]:
    if len(text) > LENGTH:
        raise UndecidedError("too long")
    for run in LETTERS.findall(text):
        if len(run) > 3 and run not in FUNCTIONS and run not in ("sqrt", "frac", "infty", "infinity"):
            raise UndecidedError("words")
    text = re.sub(
        r"(?<![a-zA-Z\\])(sqrt|pi|infty|infinity|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan)(?![a-zA-Z])",
        r"\\\1 ",
        text,
    )
    found = [match.group(1) for match in TOKEN.finditer(text.strip())]
    if len(found) > TOKENS:
        raise UndecidedError("too many tokens")
    return found


class Parser:
    """Recursive descent over one expression: sum of products of powers, with implicit multiplication."""

    def __init__(self, source: list[str]) -> None:
        self.source, self.place, self.depth = source, 0, 0

    def peek(self) -> str:
        return self.source[self.place] if self.place < len(self.source) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise UndecidedError("ends early")
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise UndecidedError(f"expected {token}")

    def whole(self) -> Node:
        node = self.sum()
        if self.peek():
            raise UndecidedError(f"left over: {self.peek()}")
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEPTH:
            raise UndecidedError("too deep")
        node = self.product()
        while self.peek() in ("+", "-", r"\pm"):
            sign = self.take()
            right = self.product()
            node = (sign, node, right)
        self.depth -= 1
        return node

    def product(self) -> Node:
        if self.peek() in ("+", "-", r"\pm"):
            sign = self.take()
            self.depth += 1
            if self.depth > DEPTH:
                raise UndecidedError("too deep")
            inner = self.product()
            self.depth -= 1
            return (
                inner
                if sign == "+"
                else ("-", ("n", Fraction(0)), inner)
                if sign == "-"
                else (r"\pm", ("n", Fraction(0)), inner)
            )
        node = self.power()
        while True:
            token = self.peek()
            if token in ("*", r"\cdot", r"\times", r"\ast"):
                self.take()
                if self.peek() in ("+", "-"):
                    sign = self.take()
                    right = self.power()
                    node = ("*", node, right if sign == "+" else ("-", ("n", Fraction(0)), right))
                else:
                    node = ("*", node, self.power())
            elif token in ("/", r"\div"):
                self.take()
                node = ("/", node, self.power())
            elif token == r"\%":
                self.take()
                node = ("*", node, ("n", Fraction(1, 100)))
            elif token and token not in (
                "+",
                "-",
                r"\pm",
                ")",
                "]",
                "}",
                r"\}",
                "|",
                ",",
                "=",
                "<",
                ">",
                "_",
                "^",
                "!",
                "&",
                r"\le",
                r"\ge",
                r"\ne",
                r"\rfloor",
                r"\rceil",
                r"\\",
            ):
                if token == r"\frac" and node[0] == "n" and node[1].denominator == 1 and self._plain_fraction():
                    node = ("+", node, self.power())  # a mixed number
                elif token[0].isdigit() or token[0] == ".":
                    raise (
                        UndecidedError("two numbers side by side")
                        if node[0] == "n"
                        else UndecidedError("a number behind a factor")
                    )
                else:
                    node = ("*", node, self.power())
            else:
                return node

    def _plain_fraction(self) -> bool:
        rest = "".join(self.source[self.place : self.place + 9])
        return bool(re.match(r"\\frac(?:\{\d+\}|\d)(?:\{\d+\}|\d)", rest))

    def power(self) -> Node:
        node = self.atom()
        while True:
            if self.peek() == "!":
                self.take()
                node = ("!", node)
            elif self.peek() == "^":
                self.take()
                node = ("^", node, self.argument())
            elif self.peek() == "'":
                raise UndecidedError("prime")
            else:
                return node

    def argument(self) -> Node:
        r"""What follows `^`, `\frac` or `\sqrt`: a group, or one token (one digit of a number, as TeX reads it)."""
        token = self.peek()
        if token == "{":
            return self.group("{", "}")
        if token[:1].isdigit() and len(token) > 1:
            self.source[self.place] = token[1:]
            return ("n", Fraction(token[0]))
        if token == "-":
            self.take()
            return ("-", ("n", Fraction(0)), self.argument())
        return self.atom()

    def group(self, opening: str, closing: str) -> Node:
        self.expect(opening)
        node = self.sum()
        self.expect(closing)
        return node

    def atom(self) -> Node:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            value = Fraction(token.rstrip(".") if token != "." else "0")
            if self.peek() == "_":  # a numeral in another base
                self.take()
                base = self.argument()
                return ("base", token, base)
            places = len(token.partition(".")[2])
            return ("n", value, places) if places >= 6 else ("n", value)
        if token in ("(", "["):
            node = self.sum()
            if self.take() not in (")", "]"):
                raise UndecidedError("bracket")
            return node
        if token == "{":
            self.place -= 1
            return self.group("{", "}")
        if token == "|":
            node = self.sum()
            self.expect("|")
            return ("f", "abs", node)
        if token in (r"\frac", r"\binom"):
            top = self.argument()
            return ("/" if token == r"\frac" else "binom", top, self.argument())
        if token == r"\sqrt":
            if self.peek() == "[":
                degree = self.group("[", "]")
                return ("^", self.argument(), ("/", ("n", Fraction(1)), degree))
            return ("^", self.group("(", ")") if self.peek() == "(" else self._root(), ("n", Fraction(1, 2)))
        if token in (r"\lfloor", r"\lceil"):
            node = self.sum()
            self.expect(r"\rfloor" if token == r"\lfloor" else r"\rceil")
            return ("f", token[1:].lstrip("l"), node)
        if token[0] == "\\":
            name = token[1:]
            if name in FUNCTIONS:
                return self.function(name)
            if name == "pi":
                return ("pi",)
            if name in (
                "alpha",
                "beta",
                "gamma",
                "theta",
                "phi",
                "varphi",
                "lambda",
                "mu",
                "omega",
                "rho",
                "sigma",
                "delta",
                "epsilon",
                "ell",
                "tau",
            ):
                return self.variable(name)
            raise UndecidedError(token)
        if token.isalpha() and token.isascii():
            if token == "i":
                return ("i",)
            if token == "e":
                return ("e",)
            return self.variable(token)
        raise UndecidedError(token)

    def _root(self) -> Node:
        # "sqrt 12" and "\sqrt12" are both written for the root of 12 by models; TeX would take one digit
        if self.peek()[:1].isdigit():
            return ("n", Fraction(self.take().rstrip(".")))
        return self.argument()

    def variable(self, name: str) -> Node:
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                self.take()
                while self.peek() not in ("}", ""):
                    name += self.take()
                self.expect("}")
            else:
                name += self.take()
        return ("v", name)

    def function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        for _ in range(2):
            if self.peek() == "_" and base is None:
                self.take()
                base = self.argument()
            elif self.peek() == "^" and exponent is None:
                self.take()
                exponent = self.argument()
        if exponent is not None and exponent == ("-", ("n", Fraction(0)), ("n", Fraction(1))):
            name, exponent = "arc" + name, None
        self.depth += 1
        if self.depth > DEPTH:
            raise UndecidedError("too deep")
        if self.peek() in ("(", "{", "["):
            argument = self.atom()
        else:
            argument = self.power()
            while self.peek() and (self.peek().isalpha() or self.peek() == r"\pi" or self.peek() == r"\theta"):
                argument = ("*", argument, self.power())
        self.depth -= 1
        node: Node = ("f", name, argument) if base is None else ("/", ("f", "ln", argument), ("f", "ln", base))
        return node if exponent is None else ("^", node, exponent)
