r"""Five grading conventions in public use, so that a score can be compared with the one in a paper.

| name | source | GSM8K | MATH |
|---|---|---|---|
| metamath | MetaMath's scripts | number after the last "The answer is: ", rounded | text after it, Hendrycks' rules |
| llemma | Llemma's fork of lm-eval | first `The answer is (\d+)`, as a string | as minerva |
| minerva | Minerva, appendix D; lm-eval's minerva_math | the final-answer sentence | that sentence, Minerva's rules |
| strict | lm-eval's strict-match; hendrycks/math | `#### number` | last \boxed, Hendrycks' rules |
| flexible | lm-eval's flexible-extract; Qwen2.5-Math | last number | last \boxed, "answer is" or number; to 1e-4 |

The rules are the sources' own, faults included: MetaMath reads "1,234,567" as 1234, Llemma's pattern cannot match a
negative number, Minerva keeps only what follows the last "=". One difference: where they call sympy, our bounded
parser decides.
"""

from __future__ import annotations

import re
from fractions import Fraction

from .equality import same
from .errors import UndecidedError
from .latex import clean
from .structures import read_structure
from .text import last_boxed, read_rational

PUBLISHED = ("metamath", "llemma", "minerva", "strict", "flexible")
_SENTENCE = '"Final Answer: The final answer is"'
LOOKS_FOR = {  # (GSM8K, MATH): where a response has none of it, the convention finds no answer
    "metamath": ('a number after "The answer is: "', '"The answer is: "'),
    "llemma": ('digits right after "The answer is "', _SENTENCE),
    "minerva": (_SENTENCE, _SENTENCE),
    "strict": ('"#### 7"', r"\boxed"),
    "flexible": ("a number", r"\boxed, 'answer is' or a number"),
}


def extract(response: str, convention: str, benchmark: str) -> str | None:
    """The answer that a published convention finds in a response; None if it finds none."""
    is_gsm8k = benchmark == "gsm8k"
    match convention:
        case "metamath":
            return _metamath_gsm8k(response) if is_gsm8k else _metamath_math(response)
        case "llemma" if is_gsm8k:
            found = LLEMMA_GSM8K.search(response)
            return found.group(1) if found else None
        case "llemma" | "minerva":
            return _minerva(response)
        case "strict":
            return _strict_gsm8k(response) if is_gsm8k else last_boxed(response)
    return _flexible_gsm8k(response) if is_gsm8k else _flexible_math(response)


def equal(given: str, gold: str, convention: str, benchmark: str) -> bool:
    """Whether a published convention accepts the extracted answer `given`."""
    if benchmark == "gsm8k":
        match convention:
            case "metamath":
                wanted = read_rational(gold)
                return wanted is not None and read_rational(given) == wanted
            case "minerva":
                return minerva_normalise(given) == minerva_normalise(gold)
        return given == gold.replace(",", "").strip()
    if convention in ("llemma", "minerva"):
        given, gold = minerva_normalise(given), minerva_normalise(gold)
        return given == gold or _has_equal_value(given, gold)
    if _hendrycks_equal(given, gold):
        return True
    if convention != "flexible":
        return False
    value, wanted = read_rational(given), read_rational(gold)
    if value is not None and wanted is not None:
        return abs(value - wanted) <= abs(wanted) / 10_000
    return _has_equal_value(given, gold)


def _has_equal_value(given: str, gold: str) -> bool:
    try:
        return same(read_structure(clean(given)), read_structure(clean(gold)))
    except UndecidedError:
        return False


# --- MetaMath ---------------------------------------------------------------------------------------------------------

METAMATH_MARKER = "The answer is: "
METAMATH_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")


def _metamath_gsm8k(response: str) -> str | None:
    _, marker, answer = response.rpartition(METAMATH_MARKER)
    found = METAMATH_NUMBER.search(answer.strip()[:1000]) if marker else None
    if not found:
        return None
    text = found.group().replace(",", "")
    try:
        if "/" in text:
            numerator, denominator = text.split("/")
            value = float(numerator) if denominator == "0" else float(Fraction(int(numerator), int(denominator)))
        else:
            value = float(text)
        return str(round(value))
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def _metamath_math(response: str) -> str | None:
    _, marker, answer = response.rpartition(METAMATH_MARKER)
    return answer.split(".\n", 1)[0].strip()[:1000].removesuffix(".").strip() if marker else None


# --- Llemma and Minerva -----------------------------------------------------------------------------------------------

LLEMMA_GSM8K = re.compile(r"The answer is (\d+)")
MINERVA_START = "Final Answer: The final answer is"
MINERVA_END = "I hope it is correct."
MINERVA = re.compile(rf"{MINERVA_START}(.*?). {MINERVA_END}")  # its unescaped dots are the source's
MINERVA_SUBSTITUTIONS = (
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (r",\text{and}", ","),
    (r"\text{and}", ","), (r"\text{m}", r"\text{}"),
)  # fmt: skip
MINERVA_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", r"\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", r"\text{\n}",
    r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots",
)  # fmt: skip


def _minerva(response: str) -> str | None:
    first = response.find(MINERVA_START)  # the source searches from the left, over one line
    if first < 0:
        return None
    found = MINERVA.match(response[first : first + 4000] + MINERVA_END)
    return found.group(1).strip() if found else None


def minerva_normalise(text: str) -> str:
    """Lewkowycz et al. 2022, appendix D.1, as in lm-eval's minerva_math."""
    text = text[:2000].split("=")[-1]
    for old, new in MINERVA_SUBSTITUTIONS:
        text = text.replace(old, new)
    for old in MINERVA_REMOVED:
        text = text.replace(old, "")
    text = re.sub(r"^[^$\n]*\$([^$\n]*)\$.*$", r"$\1$", text)
    for command in ("text", "textbf", "overline"):
        text = re.sub(rf"\\{command}\{{([^}}\n]*)\}}", r"\1", text)
    boxed = re.search(r"\\boxed\{(.*)\}", text)
    if boxed:
        text = text[: boxed.start()] + boxed.group(1) + text[boxed.end() :]
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text).replace("$", "")
    return text.replace(",", "") if text.replace(",", "").isdigit() else text


# --- strict and flexible ----------------------------------------------------------------------------------------------

STRICT_GSM8K = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE_GSM8K = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
ANSWER_IS = re.compile(r"(?:the|final) answer is:?(.{0,400})", re.I | re.S)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+")


def _strict_gsm8k(response: str) -> str | None:
    found = STRICT_GSM8K.search(response)
    return found.group(1).replace(",", "").removesuffix(".") if found else None  # one full stop, as the source drops


def _flexible_gsm8k(response: str) -> str | None:
    found = [match.group() for match in FLEXIBLE_GSM8K.finditer(response)]
    return found[-1].replace(",", "").replace("$", "").removesuffix(".") if found else None


def _flexible_math(response: str) -> str | None:
    boxed = last_boxed(response, skip_empty=True)
    if boxed is not None:
        return boxed
    found = ANSWER_IS.findall(response[-4000:])
    if found:
        answer = re.split(r"\.\s|\n|\.$", found[-1].strip(), maxsplit=1)[0].strip()
        if answer:
            return answer
    numbers = NUMBER.findall(response[-4000:])
    return numbers[-1].replace(",", "") if numbers else None


# --- Hendrycks' normalisation -----------------------------------------------------------------------------------------

HENDRYCKS_SUBSTITUTIONS = (
    ("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", ""), (r"\right", ""),
    (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""),
)  # fmt: skip


def _hendrycks_equal(given: str, gold: str) -> bool:
    try:
        return hendrycks_normalise(given) == hendrycks_normalise(gold)
    except (ValueError, IndexError):
        return given == gold


def hendrycks_normalise(text: str) -> str:
    """hendrycks/math, math_equivalence.py, rule by rule and in its order."""
    for old, new in HENDRYCKS_SUBSTITUTIONS:
        text = text.replace(old, new)
    pieces = text.split(r"\text{ ")
    if len(pieces) > 2:
        raise ValueError("two units")
    text = pieces[0].replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _brace_fractions(text)
    if text == "0.5":
        return r"\frac{1}{2}"
    slash = re.fullmatch(r"(-?\d{1,400})/(-?\d{1,400})", text)
    if slash and all(str(Fraction(part)) == part for part in slash.groups()):
        text = rf"\frac{{{slash.group(1)}}}{{{slash.group(2)}}}"
    return text


def _brace_fractions(text: str) -> str:
    r"""\frac12 as \frac{1}{2}."""
    parts = text.split(r"\frac")
    done = [parts[0]]
    for part in parts[1:]:
        if part[:1] != "{" and len(part) < 2:
            return text
        if part[0] != "{":
            part = f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        done.append(part)
    return r"\frac".join(done)
