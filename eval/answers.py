r"""Was the answer right? Strings in, verdicts out; no model, no torch.

    extract_answer(r"... so \boxed{18}.", convention="verified")        -> "18"
    is_correct("... The answer is: 18", "18", convention="metamath")   -> True
    answers_equal(r"\frac{1}{2}", "0.5")                               -> True

Six conventions: the five of `eval.conventions`, and "verified", the default, which asks whether a reader would call the
answer right. Its extraction: the last of \boxed{...}, "#### ...", "The answer is ..." and their kin; only without any of them
the last number or formula. Its equality is a ladder: same string; exact rationals; cleaned LaTeX; values and structures
(`eval.latex`); math-verify in a process that can be killed (`eval.symbolic`).

Everything is bounded: WINDOW characters of a response are read, an answer longer than ANSWER characters only equals itself,
and the last rung has 3 seconds and 2 GiB. A verdict it could not reach is None in `grade` and False in `is_correct`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from eval import conventions, equality, latex, symbolic

CONVENTIONS = ("metamath", "llemma", "minerva", "strict", "flexible", "verified")
BENCHMARKS = ("gsm8k", "math")
WINDOW = 40_000
ANSWER = 2_000


@dataclass(frozen=True)
class Verdict:
    """`correct` is None when a limit was hit before a decision: ungraded, counted as wrong and shown."""

    correct: bool | None
    extracted: str | None


def _check(convention: str, benchmark: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}.")
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark={benchmark!r} is not one of {', '.join(BENCHMARKS)}.")


# --- extraction --------------------------------------------------------------------------------------------------------

MARKER = re.compile(
    r"answers?(?: to (?:the|this) (?:question|problem))? ?"
    r"(?:is|are|would be|should be|will be|must be)(?: therefore| thus| then| simply| just)?(?: given by| equal to| that| as follows)?"
    r"[ \t]*[:=]*\s*"
    r"|answer[\"'*]{0,3}[ \t]*[:=\uff1a][ \t]*\*{0,2}\s*"
    r"|(?:^|\n)# ?answer\s*\n\s*"
    r"|final result\*{0,2}[ \t]*(?:is|[:=])[ \t]*\*{0,2}\s*"
    r"|(?<!#)####(?!#)[ \t]*",
    re.I,
)
# A base model that goes on with a problem of its own: what follows is not an answer to ours.
NEXT_PROBLEM = re.compile(
    r"\n[ \t]*(?:Q:|Question ?\d*:|Problem ?\d*:|Exercise ?\d*:|### ?(?:Instruction|Question|Problem)|Human:|User:|USER:"
    r"|<\|im_start\|>|<\|user\|>"
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


def extract_answer(response: str, *, convention: str, benchmark: str = "gsm8k") -> str | None:
    r"""The final answer of a response under a convention; None if it gives none.

    `benchmark` matters where a convention has one rule for GSM8K and one for MATH.

    >>> extract_answer(r"Thus $x = \boxed{\frac{1}{2}}$.", convention="verified", benchmark="math")
    '\\frac{1}{2}'
    >>> extract_answer("She has 3 + 4 = 7 left. The answer is: 7", convention="metamath")
    '7'
    >>> extract_answer("no conclusion", convention="strict") is None
    True

    Raises:
        ValueError: an unknown convention or benchmark.
    """
    _check(convention, benchmark)
    response = response[-WINDOW:]
    if convention != "verified":
        return conventions.extract(response, convention, benchmark)
    response = TAGS.sub(" ", response)
    return _extract_gsm8k(response) if benchmark == "gsm8k" else _extract_math(response)


def _first_problem(response: str) -> str:
    """The response up to where the model starts a new problem, unless nothing would be left."""
    for found in NEXT_PROBLEM.finditer(response):
        before = response[: found.start()]
        if before.strip() and (MARKER.search(before) or r"\boxed" in before or len(before) > 40):
            return before
    return response


def _loops(text: str) -> bool:
    """Whether the text ends in eight or more repeats of one piece: then its last number is a stray one."""
    text = re.sub(r"\s+", " ", text[-4000:])
    for period in range(1, min(200, len(text) // 8) + 1):
        length = period
        while length < len(text) and text[-length - 1] == text[-length - 1 + period]:
            length += 1
        if length >= max(8 * period, 120) and re.search(r"[A-Za-z]", text[-period:]):
            return True
    return False


def _after_markers(text: str) -> list[tuple[int, str]]:
    """(place, rest of the line) behind every answer marker; markers inside \\boxed belong to it."""
    found = []
    for match in list(MARKER.finditer(text))[-20:]:
        rest = text[match.end() : match.end() + 1500]
        if rest.strip():
            found.append((match.start(), rest))
    return found


def _extract_gsm8k(response: str) -> str | None:
    text = _first_problem(response)
    boxed = conventions.last_boxed(text, skip_empty=True)
    place = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    candidates: list[tuple[int, str]] = [(start, rest) for start, rest in _after_markers(text)]
    for start, rest in reversed(candidates):
        if boxed is not None and start < place:
            break
        number = _number_of(rest, text[:start])
        if number is not None:
            return number
    if boxed is not None:
        return _number_of(boxed) or boxed
    if place >= 0 or _loops(text):  # an empty box, or a loop: the last number is nobody's answer
        return None
    return _conclusion(text[-2000:], text)


STARTS_WITH_NUMBER = re.compile(
    r"^[\s*:=~\"'(]*(?:approximately |about |exactly |only |x ?= ?|\\\(|\\\[|\$)*\\?-?\$?-?[\d.]|^[\s*]*[$\\]"
)


BOLD_NUMBER = re.compile(r"\*\*[^*\n\d$-]{0,40}(" + NUMBER.pattern + r")[^*\n]{0,40}\*\*")
RESULT = re.compile(r"= ?(-?\$?-?[\d,]*\.?\d+)")


def _conclusion(text: str, whole: str) -> str | None:
    """The number a closing remark states. "So 10 pizzas feed 20 friends" behind "80 / 8 = 10" says 10: the last result that
    the calculation reached, where the last sentence repeats it; else the last number."""
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
        result = conventions.rational(results[-1])
        for number in stated:
            if conventions.rational(number) == result:
                return number
    return numbers[-1]


def _number_of(text: str, before: str = "") -> str | None:
    """The number an answer phrase gives: the first where it starts with one (behind its last "="), the last where it is prose."""
    text = text.replace("\\$", "$").replace("\\!", "").replace("{,}", ",").replace("\\,", "")
    marked, text = text, text.replace("**", "")
    line = text.lstrip().split("\n", 1)[0]
    sentence = re.split(r"(?<=[^\d])\.(?:\s|$)|(?<=\d)\.\s+(?=[A-Z])", line, maxsplit=1)[0]
    fraction = re.search(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", sentence)
    if fraction and "=" not in sentence[fraction.end() :]:
        return f"{fraction.group(1)}{fraction.group(2)}/{fraction.group(3)}"
    if not STARTS_WITH_NUMBER.match(text):
        return _conclusion(marked, before + text)
    if "=" in sentence and NUMBER.search(sentence.rsplit("=", 1)[1]):
        sentence = sentence.rsplit("=", 1)[1]
    found = NUMBER.search(sentence)
    return _tidy(found.group()) if found else None


def _tidy(number: str) -> str:
    return re.sub(r"[$,\s]", "", number).replace("--", "-")


def _extract_math(response: str) -> str | None:
    text = _first_problem(response)
    boxed = conventions.last_boxed(text, skip_empty=True)
    place = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    for start, rest in reversed(_after_markers(text)):
        if boxed is not None and start < place:
            break
        answer = _phrase(rest)
        # behind a box only what is an answer itself: not "the answer is correct", not a further explanation
        if answer and (
            boxed is None or (re.search(r"[\d\\]", answer) and not re.search(r"(?<![\\a-zA-Z])[a-z]{3,}", answer))
        ):
            return answer
    if boxed is not None:
        return boxed
    if place >= 0 or _loops(text) or ENDS_IN_CODE.search(text[-500:]):
        return None
    formulas = [next(group for group in match if group) for match in MATHS.findall(text[-3000:]) if any(match)]
    if formulas:
        return _right_side(formulas[-1])
    numbers = PLAIN_NUMBER.findall(text[-2000:])
    return numbers[-1] if numbers else None


BETWEEN = re.compile(r"^[\s$,;]*(?:(?:\\text ?\{)?\s*(?:and|or)\s*\}?)?[\s$,;]*(?:\\quad|\\\(|\\\))*[\s$,;]*$")


def _boxes(text: str) -> str | None:
    r"""`\boxed{1} and \boxed{2}` on end: one answer in several boxes."""
    end = len(text)
    answers: list[str] = []
    for _ in range(12):
        place = max(text.rfind(r"\boxed{", 0, end), text.rfind(r"\fbox{", 0, end))
        content = conventions.last_boxed(text[place:end]) if place >= 0 else None
        if content is None:
            break
        after = text[place + text[place:end].index("{") + len(content) + 2 : end]
        if answers and not BETWEEN.match(after):
            break
        answers.append(content)
        end = place
    return ", ".join(reversed(answers)) if len(answers) > 1 and all(answer.strip() for answer in answers) else None


def _right_side(formula: str) -> str:
    return formula.rsplit("=", 1)[1].strip() if "=" in formula and r"\begin" not in formula else formula.strip()


def _phrase(text: str) -> str | None:
    r"""The answer at the head of what follows a marker: a box, a formula, or words up to the end of the sentence."""
    text = text.lstrip(" \t\n*:").lstrip()
    quoted = re.match(r"\"([^\"\n]{1,300})\"", text)
    if quoted:  # "answer": "..." of a JSON object
        return quoted.group(1)
    box = re.match(r"[^\n]{0,80}?\\(?:boxed|fbox) ?\{", text)
    if box:
        return conventions.last_boxed(
            text[: 600 if "\n" not in text else max(text.find("\n"), box.end() + 200)], skip_empty=True
        )
    if re.match(r"(?:\$+|\\\[|\\\()?\s*\\begin", text):
        text = text.replace("\n", " ")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and not re.match(r"\$\d[\d,.]*(?![^\n]{0,200}\$)", text):
            closer = re.compile(r"(?<!\\)" + re.escape(closing)).search(text, len(opening))
            if closer:
                end = closer.start()
                first, after = text[len(opening) : end].strip(), text[end + len(closing) :]
                more = re.match(r"(?:,? and |,? or |, )\$([^$\n]{1,100})\$", after)
                while more:
                    first += f", {more.group(1)}"
                    after = after[more.end() :]
                    more = re.match(r"(?:,? and |,? or |, )\$([^$\n]{1,100})\$", after)
                return first or None
    sentence = re.split(r"\.(?:\s|$)|\n", text, maxsplit=1)[0].strip(" *")
    inside = [next(group for group in match if group) for match in MATHS.findall(sentence) if any(match)]
    if len(inside) == 1 and len(sentence) - len(inside[0]) > 4 and not re.match(r"^[-+\d(\\]", sentence):
        return inside[0].strip()
    return sentence or None


# --- equality ----------------------------------------------------------------------------------------------------------


def answers_equal(pred: str, gold: str) -> bool:
    r"""Mathematical equality of two answers, the "verified" rule. Undecided within the limits counts as unequal.

    >>> answers_equal(r"\frac{1}{2}", "0.5"), answers_equal(r"\{2, 1\}", "1, 2"), answers_equal("(1, 2)", "(2, 1)")
    (True, True, False)
    """
    return _equal(pred, gold) is True


LEAD = re.compile(r"^(?:the |my )?(?:final |correct )?(?:answer|result|value)(?: is|:)?\s+", re.I)
BASE = re.compile(r"(?<=[0-9A-F])_(?:\d|\{ ?\d+ ?\})$")
COUNT_WORDS = {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
CHOICE = re.compile(r"^(?:\(([A-Za-z])\)(?: [^()]*)?|([A-Za-z])[).:](?: [^()]*)?|([A-Za-z]))$")
COUNTED = re.compile(r"^(-?[\d.,/]+) ([a-zA-Z][a-zA-Z ]*)$")


@lru_cache(maxsize=20_000)
def _equal(pred: str, gold: str) -> bool | None:
    pred, gold = pred.strip(), gold.strip()
    if pred == gold:
        return bool(gold)
    if not pred or not gold or len(pred) > ANSWER or len(gold) > ANSWER:
        return False
    a, b = conventions.rational(pred), conventions.rational(gold)
    if a is not None and b is not None:
        return a == b
    given, wanted = latex.clean(LEAD.sub("", pred)), latex.clean(gold)
    if not given or not wanted:
        return False
    if _close_up(given) == _close_up(wanted) or _same_text(given, wanted):
        return True
    given, wanted = (COUNT_WORDS.get(text.lower(), text) for text in (given, wanted))
    if re.fullmatch(r"\(?[A-Z]\)?", wanted):
        choice = CHOICE.match(given)
        if choice:
            return next(letter for letter in choice.groups() if letter).upper() == wanted.strip("()")
    if BASE.search(given) is None or BASE.search(wanted) is None:  # the base is the question's: 664 for 664_7
        given, wanted = BASE.sub("", given), BASE.sub("", wanted)
        if given == wanted:
            return True
    percent = r"\%" in given or r"\%" in wanted
    if percent and _same(given.replace(r"\%", ""), wanted.replace(r"\%", "")):
        return True
    verdict = _same(given, wanted)
    if verdict is not None:
        return verdict
    counted = COUNTED.match(given)
    if (
        counted and conventions.rational(wanted) is not None and not latex.NO_UNIT.search(counted.group(2))
    ):  # 18 eggs per day
        return conventions.rational(counted.group(1)) == conventions.rational(wanted)
    if _prose(given) or _prose(wanted):
        return False
    if BASE.search(given) or BASE.search(wanted):
        return False
    if max(len(given), len(wanted)) > latex.LENGTH // 2:
        return None
    return symbolic.equal(pred, gold)


def _same(given: str, wanted: str) -> bool | None:
    try:
        return equality.same(equality.structure(given), equality.structure(wanted))
    except latex.UndecidedError:
        return None


def _close_up(text: str) -> str:
    """Without spaces, but "1 2" stays two numbers."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _same_text(given: str, wanted: str) -> bool:
    """Words alike up to case, quotes and dots of abbreviations. Nothing that counts in mathematics is dropped."""
    if not re.search(r"[A-Za-z]{2}", wanted) or "\\" in given + wanted:
        return False
    a, b = (re.sub(r"(?<=[a-z])\.|[\"'`]", "", _close_up(text.lower())) for text in (given, wanted))
    return a == b


def _prose(text: str) -> bool:
    """Words or a time of day rather than a formula: sympy has nothing to add."""
    if re.search(r"\b[ap]\.? ?m\b", text, re.I):
        return True
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", text)) or not re.search(r"[\d\\=^]", text)


# --- verdicts ----------------------------------------------------------------------------------------------------------


def grade(response: str, gold: str, *, benchmark: str = "gsm8k", convention: str = "verified") -> Verdict:
    """The extracted answer and whether it is right: `is_correct` with its reasons."""
    extracted = extract_answer(response, convention=convention, benchmark=benchmark)
    if extracted is None:
        return Verdict(False, None)
    if convention == "verified":
        correct = _equal(extracted, gold)
        if correct is not True and benchmark == "math" and "," in gold:
            boxes = _boxes(_first_problem(TAGS.sub(" ", response[-WINDOW:])))
            if boxes is not None and _equal(boxes, gold):
                return Verdict(True, boxes)
        return Verdict(correct, extracted)
    return Verdict(conventions.equal(extracted, gold, convention, benchmark), extracted)


def is_correct(response: str, gold: str, *, benchmark: str = "gsm8k", convention: str = "verified") -> bool:
    r"""Whether a response answers a problem rightly under a convention.

    Args:
        response: the model's text.
        gold: "18" for GSM8K, the content of the solution's last \boxed for MATH.
        benchmark: "gsm8k" or "math".
        convention: one of CONVENTIONS.

    >>> is_correct("That makes 9 * 2 = $18 a day.", "18")
    True
    """
    return grade(response, gold, benchmark=benchmark, convention=convention).correct is True


def accuracy_reward(completions, answer, *, benchmark: str = "math", **_) -> list[float]:
    """A reward function in TRL's form (GRPOTrainer's `reward_funcs`): 1.0 where the completion is right, 0.0 elsewhere.

    Args:
        completions: texts, or conversations whose last message holds the text.
        answer: the data set's `answer` column, one gold for each completion.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_correct(text, gold, benchmark=benchmark)) for text, gold in zip(texts, answer, strict=True)]
