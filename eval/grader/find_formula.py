r"""The answer that a reader would take from a response to a MATH problem: a formula, or words.

    find_math(r"... so \boxed{\frac{1}{2}}.").answer       -> r"\frac{1}{2}"
    find_math("The value of $x$ is 2.").answer             -> "2"

The last box or stated answer counts. Without any of them, a concluding last sentence counts; a response that was cut
off, gives up, or ends in a loop has none.
"""

from __future__ import annotations

import re

from .statements import (
    APPROXIMATES,
    ENDS_IN_CODE,
    MATHS,
    PLAIN_NUMBER,
    REFUSAL,
    Found,
    ends_in_a_loop,
    formulas_in,
    own_words,
    statements,
)
from .text import answer_in_last_box, last_boxed

WORD = re.compile(r"(?<![\\a-zA-Z])[a-z]{3,}")
BETWEEN_BOXES = re.compile(
    r"^[\s$,;]*(?:\\\)|\\\]|\\quad|[\s$,;])*(?:\\\(|\\\[)?\s*(?:(?:\\text ?\{)?\s*(?:and|or)\s*\}?)?"
    r"(?:\\quad|\\\(|\\\[|[\s$,;])*$"
)
BOXES = 12
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
NEXT_FORMULA = re.compile(r"(?:,? and |,? or |, )\$([^$\n]{1,100})\$")
CONDITIONAL = re.compile(r"\s*,? (?:if|when|for)\b.{0,200}\b(?:otherwise|and \$|or \$|if)", re.S)
COPULA = re.compile(r"\s(?:is|are|equals?|be)(?: equal to| given by| thus| therefore)?\s*:?\s+")
CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|we (?:get|find|have|obtain|conclude|see)|gives?|yields?|is|are|equals?|answer|total"
    r"|must be|giving|which)\b|=",
    re.I,
)
SUPPOSES = re.compile(r"^\W*(?:let|suppose|consider|assume|now consider|if|for|when|first|step \d+)\b", re.I)
ENDED = re.compile(r"[.!?)\]}$*\"'|\d]$|\w$")
NEGATED = re.compile(r"not\b.{1,80}?(?:\bbut\b|\bit is\b|\brather\b|\binstead\b) ", re.I | re.S)


def find_math(response: str) -> Found:
    text = own_words(response)
    if text is None:
        return Found(None, "the reasoning was cut off")
    place, boxed = answer_in_last_box(text)
    for start, rest in statements(text, after=max(place, 0)):
        answer = _stated_answer(rest)
        if place < 0:
            if answer:
                return Found(answer)
        # after a box, accept only what is itself an answer: not "the answer is correct", nor further explanation,
        # nor the box again as a decimal
        elif answer and re.search(r"[\d\\]", answer) and not WORD.search(answer):
            around = text[max(place, start - 60) : start + 30]
            if not APPROXIMATES.search(around):
                return Found(answer)
    if boxed is not None:
        return Found(boxed)
    if place >= 0:
        return Found(None, "the last box is empty or never closes")
    return _concluding_answer(text)


# --- a stated answer --------------------------------------------------------------------------------------------------


def _stated_answer(text: str) -> str | None:
    r"""The answer at the start of what follows a marker: a box, a formula, or words up to the end of the sentence."""
    text = text.lstrip(" \t\n*:").lstrip()
    text = NEGATED.sub("", text, count=1) if text[:4].lower() == "not " else text
    # 1. "answer": "..." of a JSON object
    quoted = re.match(r"\"([^\"\n]{1,300})\"", text)
    if quoted:
        return quoted.group(1)
    # 2. a box on the same line
    box = re.match(r"[^\n]{0,80}?\\(?:boxed|fbox) ?\{", text)
    if box:
        end = max(text.find("\n"), box.end() + 200) if "\n" in text else 600
        return last_boxed(text[:end], skip_empty=True)
    # 3. a formula, and those that "and" or a comma add to it; one case of several is not the answer
    if re.match(r"(?:\$+|\\\[|\\\()?\s*\\begin", text):
        text = text.replace("\n", " ")
    for opening, closing in DELIMITERS:
        if text.startswith(opening) and not re.match(r"\$\d[\d,.]*(?![^\n]{0,200}\$)", text):  # $5 may be money
            closer = re.compile(r"(?<!\\)" + re.escape(closing)).search(text, len(opening))
            if closer:
                first, after = text[len(opening) : closer.start()].strip(), text[closer.start() + len(closing) :]
                if CONDITIONAL.match(after):
                    return text.split("\n", 1)[0]
                return _with_next_formulas(first, after) or None
    # 4. words
    return _conclusion(re.split(r"\.(?:\s|$)|\n", text, maxsplit=1)[0].strip(" *"))


def _with_next_formulas(answer: str, after: str) -> str:
    """`answer` with the formulas that follow it in a list: "$1$, $2$ and $3$" is one answer."""
    while more := NEXT_FORMULA.match(after):
        answer += f", {more.group(1)}"
        after = after[more.end() :]
    return answer


def _conclusion(sentence: str) -> str | None:
    """What a sentence says of its subject: "2" of "the value of $x$ is 2"; the sentence, if it has no subject."""
    hidden = MATHS.sub(lambda found: re.sub(r"\S", "x", found.group()), sentence)  # no "is" inside a formula
    copulas = list(COPULA.finditer(hidden))
    if copulas and copulas[-1].end() < len(sentence) and not re.match(r"^[-+\d(\\]", sentence):
        sentence = sentence[copulas[-1].end() :].strip()
    inside = formulas_in(sentence)
    if len(inside) == 1 and len(sentence) - len(inside[0]) > 4 and not re.match(r"^[-+\d(\\]", sentence):
        return inside[0].strip()
    if len(inside) == 1 and sentence.strip(" .").startswith("$") and sentence.strip(" .").endswith("$"):
        return inside[0].strip()
    return sentence or None


# --- no stated answer -------------------------------------------------------------------------------------------------


def _concluding_answer(text: str) -> Found:
    """The answer of a last sentence that concludes."""
    if ends_in_a_loop(text):
        return Found(None, "the response ends in a loop")
    if ENDS_IN_CODE.search(text[-500:]):
        return Found(None, "the response ends in code")
    if REFUSAL.search(text[-400:]):
        return Found(None, "the response gives up")
    paragraph = text[-3000:].rstrip().rpartition("\n\n")[2]
    if _is_cut_off(paragraph):
        return Found(None, "the response was cut off")
    sentences = [part for part in re.split(r"(?<=[^\d\s])\.\s+|(?<=\d)\.\s+(?=[A-Z])", paragraph) if part.strip()]
    last = sentences[-1].strip() if sentences else ""
    is_all = len(sentences) == 1 and len(text.strip()) < 60
    if SUPPOSES.match(last) or not (is_all or CONCLUDES.search(last)):
        return Found(None, "no answer stated")
    formulas = formulas_in(last)
    tail = _conclusion(last.rstrip(" ."))
    if tail and tail != last.rstrip(" .") and PLAIN_NUMBER.fullmatch(tail.strip("*")):
        return Found(tail.strip("*"))
    if formulas:
        return Found(_right_side(formulas[-1]))
    numbers = PLAIN_NUMBER.findall(last)
    return Found(numbers[-1]) if numbers else Found(None, "no answer stated")


def _is_cut_off(paragraph: str) -> bool:
    """An open formula or environment, or an end in the middle of something."""
    dollars = len(re.findall(r"(?<!\\)\$", paragraph))
    opened = paragraph.count(r"\[") - paragraph.count(r"\]") + paragraph.count(r"\(") - paragraph.count(r"\)")
    is_money = bool(re.search(r"\$\d", paragraph)) and dollars == 1
    return (dollars % 2 == 1 and not is_money) or opened > 0 or not ENDED.search(paragraph.rstrip())


def _right_side(formula: str) -> str:
    if r"\begin" in formula:
        return formula.strip()
    return re.split(r"(?<![<>!])=", formula)[-1].strip()


# --- several boxes ----------------------------------------------------------------------------------------------------


def adjoining_boxes(response: str) -> list[str]:
    r"""The last boxes of a response where only "and" or "or" separates them, as in `\boxed{1} and \boxed{2}`; none if
    there is only one.
    """
    text = own_words(response) or ""
    end = len(text)
    answers: list[str] = []
    for _ in range(BOXES):
        place = max(text.rfind(r"\boxed{", 0, end), text.rfind(r"\fbox{", 0, end))
        content = last_boxed(text[place:end]) if place >= 0 else None
        if content is None or not content.strip():
            break
        after = text[place + text[place:end].index("{") + len(content) + 2 : end]
        if answers and not BETWEEN_BOXES.match(after[:100]):
            break
        answers.append(content)
        end = place
    return answers[::-1] if len(answers) > 1 else []
