r"""Five grading conventions in public use, so that a score can be compared with the one in a paper. Strings in, strings and verdicts out.

| name | source | GSM8K | MATH |
|---|---|---|---|
| metamath | MetaMath's eval scripts | number after the last "The answer is: ", rounded | text after it, Hendrycks' normalisation |
| llemma | Llemma's fork of lm-eval | first `The answer is (\d+)`, as a string | the minerva rule |
| minerva | Minerva appendix D, lm-eval's minerva_math | last number of the final-answer sentence | that sentence, Minerva's normalisation |
| strict | lm-eval's strict-match, hendrycks/math | `#### number` | last \boxed, Hendrycks' normalisation |
| flexible | lm-eval's flexible-extract, Qwen2.5-Math | last number | last \boxed, else "answer is", else last number; numbers to 1e-4 |

The rules are the sources' own, faults included: MetaMath reads "1,234,567" as 1234, Llemma's pattern cannot match a negative
number, Minerva keeps only what follows the last "=". One difference: where they call sympy, `eval.latex` decides, which is bounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

from eval import equality, latex

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+")
METAMATH_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
LLEMMA_GSM8K = re.compile(r"The answer is (\d+)")
MINERVA = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
STRICT_GSM8K = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE_GSM8K = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
ANSWER_IS = re.compile(r"(?:the|final) answer is:?(.{0,400})", re.I | re.S)


def last_boxed(text: str, *, skip_empty: bool = False, reach: int = 4000) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...} with balanced braces, or of `\boxed 5`. None if there is none.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    place = len(text)
    for _ in range(50):
        place = max(text.rfind(r"\boxed", 0, place), text.rfind(r"\fbox", 0, place))
        if place < 0:
            return None
        start = place + (6 if text.startswith(r"\boxed", place) else 5)
        rest = text[start : start + reach]
        if rest.lstrip().startswith("{"):
            opening = rest.index("{")
            depth = 0
            for index in range(opening, len(rest)):
                escaped = (
                    rest[index - 1] == "\\" and rest[index - 2] != "\\"
                )  # \{ is a brace to read, not one that groups
                if rest[index] == "{" and not escaped:
                    depth += 1
                elif rest[index] == "}" and not escaped:
                    depth -= 1
                    if depth == 0:
                        content = rest[opening + 1 : index]
                        if content.strip() or not skip_empty:
                            return content
                        break
            else:
                if not skip_empty:
                    return None
        elif rest[:1].isdigit():
            return rest[0]
        elif rest[:1] == " ":
            content = re.split(r"[$\n]", rest[1:], maxsplit=1)[0]
            if content.strip():
                return content
    return None


def metamath_gsm8k(response: str) -> str | None:
    parts = response.rsplit("The answer is: ", 1)
    found = METAMATH_NUMBER.search(parts[1].strip()[:1000]) if len(parts) > 1 else None
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


def metamath_math(response: str) -> str | None:
    parts = response.rsplit("The answer is: ", 1)
    if len(parts) == 1:
        return None
    answer = parts[1].split(".\n", 1)[0].strip()[:1000]
    return answer.removesuffix(".").strip()


def minerva(response: str) -> str | None:
    first = response.find("Final Answer: The final answer is")  # the source searches from the left, over one line
    if first < 0:
        return None
    found = MINERVA.match(response[first : first + 4000] + "I hope it is correct.")
    return found.group(1).strip() if found else None


def flexible_gsm8k(response: str) -> str | None:
    found = [match.group() for match in FLEXIBLE_GSM8K.finditer(response)]
    return found[-1] if found else None


def flexible_math(response: str) -> str | None:
    boxed = last_boxed(response, skip_empty=True)
    if boxed is not None:
        return boxed
    found = list(ANSWER_IS.finditer(response[-4000:]))
    if found:
        answer = re.split(r"\.\s|\n|\.$", found[-1].group(1).strip(), maxsplit=1)[0].strip()
        if answer:
            return answer
    numbers = NUMBER.findall(response[-4000:])
    return numbers[-1].replace(",", "") if numbers else None


def hendrycks_normalise(text: str) -> str:
    """hendrycks/math, math_equivalence.py, rule by rule and in its order."""
    for old, new in (
        ("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), (r"\left", ""), (r"\right", ""),
        (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""),
    ):  # fmt: skip
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
    text = _fractions(text)
    if text == "0.5":
        return r"\frac{1}{2}"
    slash = re.fullmatch(r"(-?\d{1,400})/(-?\d{1,400})", text)
    if slash and all(str(Fraction(part)) == part for part in slash.groups()):
        text = rf"\frac{{{slash.group(1)}}}{{{slash.group(2)}}}"
    return text


def _fractions(text: str) -> str:
    parts = text.split(r"\frac")
    done = [parts[0]]
    for part in parts[1:]:
        if part[:1] != "{" and len(part) < 2:
            return text
        if part[0] != "{":
            part = f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        done.append(part)
    return r"\frac".join(done)


def hendrycks_equal(given: str, gold: str) -> bool:
    try:
        return hendrycks_normalise(given) == hendrycks_normalise(gold)
    except (ValueError, IndexError):
        return given == gold


MINERVA_SUBSTITUTIONS = (
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (r",\text{and}", ","),
    (r"\text{and}", ","), (r"\text{m}", r"\text{}"),
)  # fmt: skip
MINERVA_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", r"\ldots", "sue", "points", "feet", "minutes",
    "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students", "childrentickets", "multiples", r"\text{s}",
    r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", r"\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!",
    "{,}", '"', r"\dots",
)  # fmt: skip


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


def symbolically_equal(given: str, gold: str) -> bool:
    try:
        return equality.same(equality.structure(latex.clean(given)), equality.structure(latex.clean(gold)))
    except latex.UndecidedError:
        return False


def rational(text: str) -> Fraction | None:
    """An integer, decimal or plain fraction, with thousands commas, a sign and a dollar sign allowed."""
    text = text.strip().lstrip("$").strip()
    if re.match(r"[-+]?\d{1,3}(?:,\d{3})+(?!\d)", text):
        text = text.replace(",", "")
    if len(text) > 400 or not re.fullmatch(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?: ?/ ?\d+)?", text, re.ASCII):
        return None
    top, _, bottom = text.replace(" ", "").partition("/")
    try:
        return Fraction(top.rstrip(".")) / (Fraction(bottom) if bottom else 1)
    except (ValueError, ZeroDivisionError):
        return None


def extract(response: str, convention: str, benchmark: str) -> str | None:
    gsm8k = benchmark == "gsm8k"
    if convention == "metamath":
        return metamath_gsm8k(response) if gsm8k else metamath_math(response)
    if convention == "llemma" and gsm8k:
        found = LLEMMA_GSM8K.search(response)
        return found.group(1) if found else None
    if convention in ("llemma", "minerva"):
        return minerva(response)
    if convention == "strict":
        if not gsm8k:
            return last_boxed(response)
        found = STRICT_GSM8K.search(response)
        return found.group(1).rstrip(".").replace(",", "") if found else None
    answer = flexible_gsm8k(response) if gsm8k else flexible_math(response)
    return answer.replace(",", "").replace("$", "").rstrip(".") if answer is not None and gsm8k else answer


def equal(given: str, gold: str, convention: str, benchmark: str) -> bool:
    if benchmark == "gsm8k":
        if convention == "metamath":
            wanted = rational(gold)
            return wanted is not None and rational(given) == wanted
        if convention == "minerva":
            return minerva_normalise(given) == minerva_normalise(gold)
        return given == gold.replace(",", "").strip()
    if convention in ("llemma", "minerva"):
        a, b = minerva_normalise(given), minerva_normalise(gold)
        return a == b or symbolically_equal(a, b)
    if hendrycks_equal(given, gold):
        return True
    if convention != "flexible":
        return False
    value, wanted = rational(given), rational(gold)
    if value is not None and wanted is not None:
        return abs(value - wanted) <= abs(wanted) / 10_000
    return symbolically_equal(given, gold)
