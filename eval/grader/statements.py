r"""What the two extractions of "verified" share: where a response states its answer, and where it stops being one.

The last explicit statement counts: \boxed{...}, "#### ...", "The answer is ..." and similar. Model text may be
hostile, so each search is over a window of bounded length.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

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
HEADINGS = 100  # places looked at where another problem might begin

# A base model goes on to invent another problem: what follows is not an answer to ours.
NEXT_PROBLEM = re.compile(
    r"\n[ \t]*(?:Q:|Question ?\d*:|Problem ?\d*:|Exercise ?\d*:|### ?(?:Instruction|Question|Problem)"
    r"|Human:|User:|USER:|<\|im_start\|>|<\|user\|>"
    r"|\[INST\]|Below is an instruction)"
    r"|I hope it is correct\.|</s>|<\|endoftext\|>|<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>"
)
# Or it asks one without any heading: "The answer is 20.\nIf $x^2 = 16$, what is the sum of all values of $x$?"
QUESTION = re.compile(
    r"\n[ \t]*(?!(?:But|Wait|However|So|Now|Is|Are|Was|Do|Does|Did|Can|Could|Should|Would|Therefore|Thus|Hmm|Hence|Note"
    r"|Check|Then|Why|Or|And|Since|Because|Let me|Let's|What if|What about|How about|Alternatively)\b)(?-i:[A-Z])"
    r"(?=[^\n?]{0,600}[\d$])(?=[^\n?]{0,600}\b(?:what|how (?:many|much|long|far|old)|which|find|compute|determine)\b)"
    r"(?![^\n?]{0,600}\b(?:question|problem|answer|asked|asks|original|this)\b)[^\n?]{40,600}\?",
    re.I,
)
CONCLUDES = re.compile(r"(?:^|\n)[ \t]*(?:So|Thus|Therefore|Hence)\b[^\n]*\d[^\n]*$", re.I)
ANSWERED = re.compile(r"\\boxed ?\{[^{}]|(?<!#)####(?!#) ?\$?-?\d|answer is:? *[$\\*(-]*\d", re.I)
CORRECTION = re.compile(r"apolog|mistake|correct(?:ion|ed)|wait|actually", re.I)
REFUSAL = re.compile(
    r"(?:can ?not|can't|unable to|could not|couldn't|am not able to) (?:be )?"
    r"(?:determine|solve|finish|answer|complete|find|conclude|compute)|not (?:\w+ )?enough information"
    r"|lacks? (?:the )?information|insufficient information|(?:do not|don't) know",
    re.I,
)
APPROXIMATES = re.compile(r"approx|numerical|decimal|roughly|about|\u2248|rounded", re.I)
CHECKS = re.compile(r"(?:check|verif|confirm|test)\w* (?:that )?(?:our|the|this|my) $", re.I)
TAGS = re.compile(r"</?(?:solution|answer|final_answer|result)>", re.I)
ENDS_IN_CODE = re.compile(r"(?:```|</execute>|\bprint\([^\n]*\))\s*$")
PLAIN_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?![\d/]))?|(?<![\w.])-?\.\d+")
NUMBER = re.compile(r"-?\$?-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[ \t]*/[ \t]*\d+)?|-?\$?\.\d+")
MATHS = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


@dataclass(frozen=True)
class Found:
    """What a response gives as its answer."""

    answer: str | None
    """As written; None if it gives none."""
    reason: str = "no answer found"
    """Why there is none."""


def own_words(response: str) -> str | None:
    """The response without its thinking, up to where the model invents another problem; None if the thinking was cut
    off.
    """
    _, closing, after = response.rpartition("</think>")
    if closing and after.strip():
        response = after
    elif not closing and "<think>" in response:
        return None
    return first_problem(response)


def first_problem(response: str) -> str:
    """The response up to where the model invents another problem.

    A heading that comes before any number, or before the only box, restates the model's own problem.
    """
    response = TAGS.sub(" ", response)
    first_answer, first_digit = ANSWERED.search(response), re.search(r"\d", response)
    answered = first_answer.end() if first_answer else len(response) + 1
    counted = first_digit.end() if first_digit else len(response) + 1
    boxed = response.rfind(r"\boxed")
    for found in itertools.islice(NEXT_PROBLEM.finditer(response), HEADINGS):
        place = found.start()
        is_restated = answered > place and (boxed >= place or counted > place)
        corrects = "hope" in found.group() and CORRECTION.search(response[found.end() : found.end() + 200])
        if not is_restated and not corrects and response[:place].strip():
            return response[:place]
    for found in itertools.islice(QUESTION.finditer(response), HEADINGS):
        before = response[: found.start()]
        concludes = answered <= found.start() or CONCLUDES.search(before.rstrip()[-600:])
        if concludes and not CORRECTION.search(found.group()):
            return before
    return response


def ends_in_a_loop(text: str) -> bool:
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


def statements(text: str, after: int) -> list[tuple[int, str]]:
    """(place, what follows) of each answer marker, the last one first, down to the box at `after`, which states
    more.
    """
    found = []
    for marker in list(MARKER.finditer(text))[-MARKERS:]:
        rest = text[marker.end() : marker.end() + REST]
        is_check = CHECKS.search(text[max(0, marker.start() - 30) : marker.start()])
        if rest.strip() and marker.start() >= after and not is_check:
            found.append((marker.start(), rest))
    return found[::-1]


def formulas_in(text: str) -> list[str]:
    """The texts between math delimiters of any kind."""
    return [next(filter(None, groups)) for groups in MATHS.findall(text) if any(groups)]
