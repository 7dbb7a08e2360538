r"""LaTeX answers in one spelling: `clean` makes `$\dfrac{270}7\text{ degrees}$.` into `\frac{270}7`.

Rules in a fixed order, since each relies on what those before it have tidied up. Nothing is parsed here: see
`eval.grader.structures` and `eval.grader.expressions`.
"""

from __future__ import annotations

import re
import unicodedata

UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "°": r"\degree ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∈": r"\in ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "∅": r"\emptyset ", "⁄": "/", "∕": "/", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⁰": "^{0}", "¹": "^{1}", "²": "^{2}", "³": "^{3}", "⁴": "^{4}",
    "⁵": "^{5}", "⁶": "^{6}", "⁷": "^{7}", "⁸": "^{8}", "⁹": "^{9}", "⁻¹": "^{-1}", "，": ",", "：": ":", "\u00a0": " ",
    "’": "'", "“": '"', "”": '"', "€": "", "£": "", "¥": "",
}  # fmt: skip
UNICODE_RULE = re.compile("|".join(map(re.escape, sorted(UNICODE, key=len, reverse=True))))

UNITS = (
    r"units?|degrees?|radians?|dollars?|cents?|inch(?:es)?|in|feet|foot|ft|yards?|yd|miles?|mi|mph|km/h|m/s"
    r"|kilometers?|km|centimeters?|cm|millimeters?|mm|meters?|metres?|kg|kilograms?|grams?|lbs?|pounds?|ounces?|oz"
    r"|liters?|ml|gallons?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|percentage|percent|pct"
)
UNIT_AT_END = re.compile(
    rf"(?:(?<=[0-9}})\]])|(?<=\\pi)) ?(?:(?:square|cubic|sq)\.? ?)?(?:{UNITS})\.?(?:\^\{{?[23]\}}?)?$"
)
NOT_A_UNIT = re.compile(  # words after a number that change its value, or make it part of a longer statement
    r"\b(?:tens?|hundreds?|thousands?|millions?|billions?|trillions?|dozens?|score|hal(?:f|ves)|thirds?|quarters?"
    r"|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|st|nd|rd|th|squared|cubed"
    r"|factorial|choose|times|plus|minus|divided|power|root|to|of|or|and|if|when|where|mod|modulo|less|more|than|over"
    r"|not|at|least|most|per ?cent|noon|midnight)\b",
    re.I,
)
LONGEST = 4_000  # characters; compatibility forms of one character can be eighteen

SPACED_COMMA = re.compile(r"(\d)\s*(?:\\!|\{,\}|,\\!)+\s*(?=\d{3})")  # 10,\!080 and 10{,}080
COMMANDS: tuple[tuple[re.Pattern[str], str], ...] = (  # what to look for, what to write
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:dbinom|tbinom)(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant|le)(?![a-zA-Z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|ge)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|ne)(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"(?<=\d)[eE]([-+]?)0*(\d{1,3})(?![\d.a-zA-Z])"), r" \\times 10^{\1\2}"),  # 6.02e23
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\wedge(?![a-zA-Z])"), r"\\land "),
    (re.compile(r"\\vee(?![a-zA-Z])"), r"\\lor "),
    (re.compile(r"\^ ?(?:\{ ?\\(?:circ|degree) ?\}|\\(?:circ|degree)(?![a-zA-Z]))"), r"\\degree "),
    (re.compile(r"\\degree ?[CF]$"), ""),
    (re.compile(r"\\[pb]?mod(?![a-zA-Z])"), r"\\mod "),
    (re.compile(r"\\(?:dots|cdots)(?![a-zA-Z])|\.\.\.|\u2026"), r"\\ldots "),
)
SPACING = re.compile(
    r"\\[,;:!> ]|~|&nbsp;"
    r"|\\(?:quad|qquad|thinspace|displaystyle|textstyle|limits|hfill|nobreakspace|left|right"
    r"|[bB]igg?[lrm]?)(?![a-zA-Z])"
)
MATH_DELIMITERS = (r"\(", r"\)", r"\[", r"\]", r"\$", "$")
LINE_BREAK = re.compile(r"\\\\(?:\[[0-9a-z. ]*\])?")
BOLD = re.compile(r"\*\*[^*]+\*\*")
RECURRING = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20}?)(\d{1,12}?)\3+(\d{0,12}) ?\\ldots ?$")  # 0.333...
EUROPEAN = re.compile(r"(-?\d{1,3}(?:\.\d{3})+),(\d{1,2}|\d{4,9})")  # 1.234,56
REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot) ?\{(\d{1,20})\}")
MIXED_NUMBER = re.compile(r"(?<![\d/.}])(\d+) (\d+)/(\d+)(?![\d/])")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.,])")
THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
TEXT_COMMANDS = (
    "text|mbox|textbf|textit|textrm|textnormal|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol"
    "|operatorname|rm|bf|hbox|emph"
)
TEXT = re.compile(rf"\\(?:{TEXT_COMMANDS}) ?\{{([^{{}}]*)\}}")
CONDITION = re.compile(r"[<>]|\\(?:le|ge|ne|in)(?![a-zA-Z])")
WRAPPERS = re.compile(r"\\(?:boxed|fbox|ensuremath|mathcal|vec|overrightarrow) ?\{([^{}]*)\}")


def clean(text: str, *, commas_separate: bool = False) -> str:
    r"""One spelling: Unicode to LaTeX, no spacing commands, no dollar signs, `\frac` alone, units and trailing dots
    gone.

    Args:
        commas_separate: read 100,200 as two numbers and not as one.

    >>> clean(r"$\dfrac{270}7\text{ degrees}$."), clean(r"10,\!080"), clean(r"\$2.50")
    ('\\frac{270}7', '10080', '2.50')
    """
    # 1. characters: one for each meaning, no control characters
    text = UNICODE_RULE.sub(lambda found: UNICODE[found.group()], text)
    text = unicodedata.normalize("NFKC", text)[:LONGEST]
    text = "".join(_plain(character) for character in text)
    text = SPACED_COMMA.sub(r"\1,", text).replace(",,", ",")

    # 2. layout: line breaks, spacing, math delimiters. \x00 marks a line break until the end of the step
    text = LINE_BREAK.sub(" \x00 ", text)
    if r"\begin" not in text:
        text = re.sub(r" \x00 (?=[a-zA-Z{}])", r"\\", text)  # not a line break but an escaped backslash: \\frac
    text = SPACING.sub(" ", text)
    for delimiter in MATH_DELIMITERS:
        text = text.replace(delimiter, "")
    text = text.replace("\x00", "\\\\" if r"\begin" in text else " ")

    # 3. commands: one name for each
    for pattern, replacement in COMMANDS:
        text = pattern.sub(replacement, text)
    text = text.replace("**", "" if BOLD.search(text) else "^")
    text = re.sub(r"(?<=\d)\s*\\?%", " \\\\%", text)
    text = re.sub(r"\s+", " ", text.replace(";", ",")).strip()

    if text == r"\mathbf{R}":
        return r"\mathbb{R}"

    # 4. words: texts, list words, units after a value
    text = _clean_texts(text)

    # 5. numbers: what is exact before an approximation, repeating decimals, mixed numbers, thousands
    exact, approximates, _ = text.partition(r"\approx")
    if approximates and re.search(r"[\d\\]", exact):
        text = exact.strip()
    text = RECURRING.sub(_recurring_decimal, text)
    text = REPEATING.sub(_repeating_decimal, text)
    text = MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    text = SPACED_THOUSANDS.sub(lambda found: found.group().replace(" ", ""), text)
    if EUROPEAN.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    if not commas_separate and not text.startswith(("(", "[", r"\{")):  # there a comma separates entries
        text = THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)

    # 6. ends: punctuation, units ("5 square feet" has two), what only wraps the answer
    text = text.strip().rstrip(".,;:? ").removesuffix("\\").strip()
    for _ in range(2):
        text = UNIT_AT_END.sub("", text).strip()
    return _unwrap(text)


def _plain(character: str) -> str:
    """Without control characters, and with the digits of all scripts as 0 to 9."""
    if character in "\t\n\r\f\v":
        return " "
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return character if ord(character) >= 32 else ""


def _recurring_decimal(found: re.Match[str]) -> str:
    r"""0.333\ldots as 0.\overline{3}, if three digits at least show the period, and the last ones go on with it."""
    whole, fixed, period, rest = found.groups()
    shown = found.group()[len(whole) + 1 + len(fixed) :].rstrip("\\ldots ")
    if len(shown) < 3 or not period.startswith(rest):
        return found.group()
    return rf"{whole}.{fixed}\overline{{{period}}}"


def _repeating_decimal(found: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction: digits with the period less digits without it, over 9...90...0."""
    whole, fixed, period = found.groups()
    top = int(whole + fixed + period or "0") - int(whole + fixed or "0")
    return rf"\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


# --- words ------------------------------------------------------------------------------------------------------------


def _clean_texts(text: str) -> str:
    r"""`\text{...}`: "and" and "or" separate list items, a text after a value is its unit, a text alone is the
    answer.
    """
    for _ in range(3):  # texts inside texts
        text = TEXT.sub(_replace_text, text)
    text = re.sub(r"\\unit ?(?:\^ ?(?:\{ ?[23] ?\}|[23]))?", " ", text)
    text = re.sub(r"(?<=[0-9a-z)}\]]),? (and|or) (?=[-+0-9a-zA-Z\\(\[])", _list_sign, text)
    text = re.sub(r"(?<!\\)\bmod(?:ulo)? (?=\d)", r"\\mod ", re.sub(r"\s+", " ", text))
    return re.sub(r", *,", ",", re.sub(r"\s+", " ", text)).strip()


def _replace_text(found: re.Match[str]) -> str:
    inside = found.group(1)
    word = inside.strip().strip(",").strip().lower()
    if word in ("and", "or"):
        return _list_sign(found, word)
    if word in ("if", "for", "when", "where", "is"):
        return f" {word} "
    if NOT_A_UNIT.search(inside):
        return f" {inside} "
    before = found.string[: found.start()].rstrip()
    if re.search(r"[0-9})]$|\\pi$", before) and not before.endswith(("\\frac{", "^{", "_{")):  # after a value
        looks_like_a_unit = re.match(r"^[\s,.]*[A-Za-z. /'-]+\d?$", inside) and inside[:1] != "("
        is_time_of_day = re.match(r"^\s*(?:[ap]\.?\s*m\.?|noon|midnight)\s*$", inside, re.I)
        if looks_like_a_unit and not is_time_of_day:
            return r" \unit "  # taken off by the caller, with the square of square meters
    return inside


def _list_sign(found: re.Match[str], word: str = "") -> str:
    """A comma, which lists values; between conditions, the word itself."""
    if not CONDITION.search(found.string):
        return ", "
    return r" \land " if (word or found.group(1)) == "and" else r" \lor "


# --- wrapping ---------------------------------------------------------------------------------------------------------


def _unwrap(text: str) -> str:
    r"""Remove boxes, fonts, arrows and braces around the entire answer: \boxed{{5}} is 5."""
    for _ in range(3):
        unwrapped = WRAPPERS.sub(r"\1", text)
        if unwrapped.startswith("{") and unwrapped.endswith("}") and _first_group_ends(unwrapped) == len(unwrapped) - 1:
            unwrapped = unwrapped[1:-1].strip()
        if unwrapped == text:
            break
        text = unwrapped
    return text


def _first_group_ends(text: str) -> int:
    """The place of the brace that closes the first group; -1 if none does."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return place
    return -1
