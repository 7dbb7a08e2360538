r"""The answer that a reader would take from a response: the extraction of the convention "verified".

    extract_gsm8k("... The answer is 3 + 4 = 7.")    -> "7"
    extract_math(r"... so \boxed{\frac{1}{2}}.")     -> r"\frac{1}{2}"

The last explicit statement counts: \boxed{...}, "#### ...", "The answer is ..." and similar. Only without any of
them does the last number or formula count, and not even that after an empty box or in a repetition loop: then no
answer was given.

Model text may be hostile, so each search is over a window of bounded length.
"""

from __future__ import annotations

import re

from .text import last_box, last_boxed, read_rational

MARKER = re.compile(
    r"answers?(?: to (?:the|this) (?:question|problem))? ?"
    r"(?:is|are|would be|should be|will be|must be)(?: therefore| thus| then| simply| just)?"
    r"(?: given by| equal to| that| as follows)?[ \t]*[:=]*\s*"
    r"|answer[\"'*]{0,3}[ \t]*[:=\uff1a][ \t]*\*{0,2}\s*"
    r"|(?:^|\n)# ?answer\s*\n\s*"
    r"|final result\*{0,2}[ \t]*(?:is|[:=])[ \t]*\*{0,2}\s*"
    r"|(?<!#)####(?!#)[ \t]*",
    re.I,
)
MARKERS = 20  # of a response, from the end
REST = 1500  # characters read after a marker

# A base model goes on to invent another problem: what follows is not an answer to ours.
NEXT_PROBLEM = re.compile(
    r"\n[ \t]*(?:Q:|Question ?\d*:|Problem ?\d*:|Exercise ?\d*:|### ?(?:Instruction|Question|Problem)"
    r"|Human:|User:|USER:|<\|im_start\|>|<\|user\|>"
    r"|\[INST\]|Below is an instruction)"
    r"|I hope it is correct\.|</s>|<\|endoftext\|>|<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>"
)
TAGS = re.compile(r"</?(?:solution|answer|final_answer|result)>", re.I)
ENDS_IN_CODE = re.compile(r"(?:```|</execute>|\bprint\([^\n]*\))\s*$")
PLAIN_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?![\d/]))?|(?<![\w.])-?\.\d+")
NUMBER = re.compile(
    r"-?\$?-?(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?![\d.])|\d+)(?:\.\d+)?(?:[ \t]*/[ \t]*\d+)?|-?\$?\.\d+"
)
MATHS = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


# --- what both benchmarks share ---------------------------------------------------------------------------------------


def first_problem(response: str) -> str:
    """The response up to where the model invents another problem, unless nothing would be left."""
    response = TAGS.sub(" ", response)
    for found in NEXT_PROBLEM.finditer(response):
        before = response[: found.start()]
        if before.strip() and (MARKER.search(before) or r"\boxed" in before or len(before) > 40):
            return before
    return response


def _ends_in_a_loop(text: str) -> bool:
    """Whether the text ends in eight or more repeats of one piece with a letter: then its last number is a stray
    one.
    """
    text = re.sub(r"\s+", " ", text[-4000:])
    for period in range(1, min(200, len(text) // 8) + 1):
        length = period
        while length < len(text) and text[-length - 1] == text[-length - 1 + period]:
            length += 1
        if length >= max(8 * period, 120) and re.search(r"[A-Za-z]", text[-period:]):
            return True
    return False


def _statements(text: str, after: int) -> list[tuple[int, str]]:
    """(place, what follows) of each answer marker, the last one first, down to the box at `after`, which states
    more.
    """
    found = []
    for marker in list(MARKER.finditer(text))[-MARKERS:]:
        rest = text[marker.end() : marker.end() + REST]
        if rest.strip() and marker.start() >= after:
            found.append((marker.start(), rest))
    return found[::-1]


def _formulas(text: str) -> list[str]:
    """The texts between math delimiters of any kind."""
    return [next(filter(None, groups)) for groups in MATHS.findall(text) if any(groups)]


# --- GSM8K: a number --------------------------------------------------------------------------------------------------

STARTS_WITH_NUMBER = re.compile(
    r"^[\s*:=~\"'(]*(?:approximately |about |exactly |only |x ?= ?|\\\(|\\\[|\$)*\\?-?\$?-?[\d.]|^[\s*]*[$\\]"
)
BOLD_NUMBER = re.compile(r"\*\*[^*\n\d$-]{0,40}(" + NUMBER.pattern + r")[^*\n]{0,40}\*\*")
RESULT = re.compile(r"= ?(-?\$?-?[\d,]*\.?\d+)")
NUMERIC_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")


def extract_gsm8k(response: str) -> str | None:
    text = first_problem(response)
    boxed = last_boxed(text, skip_empty=True)
    place = last_box(text)
    for start, rest in _statements(text, after=place if boxed is not None else 0):
        number = _stated_number(rest, text[:start])
        if number is not None:
            return number
    if boxed is not None:
        return _stated_number(boxed) or boxed
    if place >= 0 or _ends_in_a_loop(text):
        return None
    return _concluding_number(text[-2000:], text)


def _stated_number(text: str, before: str = "") -> str | None:
    """The number that an answer phrase gives: the first if it starts with one (after its last "="), the last if it is
    prose.
    """
    text = text.replace("\\$", "$").replace("\\!", "").replace("{,}", ",").replace("\\,", "")
    plain = text.replace("**", "")
    line = plain.lstrip().split("\n", 1)[0]
    sentence = re.split(r"(?<=[^\d])\.(?:\s|$)|(?<=\d)\.\s+(?=[A-Z])", line, maxsplit=1)[0]
    fraction = NUMERIC_FRACTION.search(sentence)
    if fraction and "=" not in sentence[fraction.end() :]:
        return f"{fraction.group(1)}{fraction.group(2)}/{fraction.group(3)}"
    if not STARTS_WITH_NUMBER.match(plain):
        return _concluding_number(text, before + plain)
    _, equals, right = sentence.rpartition("=")
    found = (NUMBER.search(right) if equals else None) or NUMBER.search(sentence)
    return _tidy(found.group()) if found else None


def _concluding_number(text: str, whole: str) -> str | None:
    """The number that a closing remark states: the last result of the calculation in `whole`, if the last sentence
    repeats it among others ("So 10 pizzas feed 20 friends" after "80 / 8 = 10" says 10), else the last number."""
    numbers = [_tidy(number) for number in NUMBER.findall(text)]
    if not numbers:
        return None
    bold = BOLD_NUMBER.findall(text)
    if bold:
        return _tidy(bold[-1])
    sentences = [part for part in re.split(r"(?<=[a-z)%])[.!]\s|\n", text) if NUMBER.search(part)]
    stated = [_tidy(number) for number in NUMBER.findall(sentences[-1])] if sentences else []
    results = RESULT.findall(whole[-1500:])
    if results and len(stated) > 1:
        result = read_rational(results[-1])
        repeated = next((number for number in stated if read_rational(number) == result), None)
        if repeated is not None:
            return repeated
    return numbers[-1]


def _tidy(number: str) -> str:
    return re.sub(r"[$,\s]", "", number).replace("--", "-")


# --- MATH: a formula or words -----------------------------------------------------------------------------------------

WORD = re.compile(r"(?<![\\a-zA-Z])[a-z]{3,}")
BETWEEN_BOXES = re.compile(r"^[\s$,;]*(?:(?:\\text ?\{)?\s*(?:and|or)\s*\}?)?[\s$,;]*(?:\\quad|\\\(|\\\))*[\s$,;]*$")
BOXES = 12
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
NEXT_FORMULA = re.compile(r"(?:,? and |,? or |, )\$([^$\n]{1,100})\$")


def extract_math(response: str) -> str | None:
    text = first_problem(response)
    boxed = last_boxed(text, skip_empty=True)
    place = last_box(text)
    for _, rest in _statements(text, after=place if boxed is not None else 0):
        answer = _stated_answer(rest)
        # after a box, accept only what is itself an answer: not "the answer is correct", nor further explanation
        if answer and (boxed is None or (re.search(r"[\d\\]", answer) and not WORD.search(answer))):
            return answer
    if boxed is not None:
        return boxed
    if place >= 0 or _ends_in_a_loop(text) or ENDS_IN_CODE.search(text[-500:]):
        return None
    formulas = _formulas(text[-3000:])
    if formulas:
        return _right_side(formulas[-1])
    numbers = PLAIN_NUMBER.findall(text[-2000:])
    return numbers[-1] if numbers else None


def _right_side(formula: str) -> str:
    return formula.strip() if r"\begin" in formula else formula.rpartition("=")[2].strip()


def _stated_answer(text: str) -> str | None:
    r"""The answer at the start of what follows a marker: a box, a formula, or words up to the end of the sentence."""
    text = text.lstrip(" \t\n*:").lstrip()
    # 1. "answer": "..." of a JSON object
    quoted = re.match(r"\"([^\"\n]{1,300})\"", text)
    if quoted:
        return quoted.group(1)
    # 2. a box on the same line
    box = re.match(r"[^\n]{0,80}?\\(?:boxed|fbox) ?\{", text)
    if box:
        end = max(text.find("\n"), box.end() + 200) if "\n" in text else 600
        return last_boxed(text[:end], skip_empty=True)
    # 3. a formula, and those that "and" or a comma add to it
    if re.match(r"(?:\$+|\\\[|\\\()?\s*\\begin", text):
        text = text.replace("\n", " ")
    for opening, closing in DELIMITERS:
        if text.startswith(opening) and not re.match(r"\$\d[\d,.]*(?![^\n]{0,200}\$)", text):  # $5 may be money
            closer = re.compile(r"(?<!\\)" + re.escape(closing)).search(text, len(opening))
            if closer:
                first = text[len(opening) : closer.start()].strip()
                return _with_next_formulas(first, text[closer.start() + len(closing) :]) or None
    # 4. words, or the one formula in them
    sentence = re.split(r"\.(?:\s|$)|\n", text, maxsplit=1)[0].strip(" *")
    inside = _formulas(sentence)
    if len(inside) == 1 and len(sentence) - len(inside[0]) > 4 and not re.match(r"^[-+\d(\\]", sentence):
        return inside[0].strip()
    return sentence or None


def _with_next_formulas(answer: str, after: str) -> str:
    """`answer` with the formulas that follow it in a list: "$1$, $2$ and $3$" is one answer."""
    while more := NEXT_FORMULA.match(after):
        answer += f", {more.group(1)}"
        after = after[more.end() :]
    return answer


def adjoining_boxes(response: str) -> str | None:
    r"""The last boxes of a response as one list, if only "and" separates them: `\boxed{1} and
    \boxed{2}`.
    """
    text = first_problem(response)
    end = len(text)
    answers: list[str] = []
    for _ in range(BOXES):
        place = max(text.rfind(r"\boxed{", 0, end), text.rfind(r"\fbox{", 0, end))
        content = last_boxed(text[place:end]) if place >= 0 else None
        if content is None:
            break
        after = text[place + text[place:end].index("{") + len(content) + 2 : end]
        if answers and not BETWEEN_BOXES.match(after):
            break
        answers.append(content)
        end = place
    return ", ".join(reversed(answers)) if len(answers) > 1 and all(answer.strip() for answer in answers) else None
