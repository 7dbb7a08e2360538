r"""Was the answer right? Strings in, verdicts out; no model, no torch.

    extract_answer(r"... so \boxed{18}.", convention="verified")        -> "18"
    is_correct("... The answer is: 18", "18", convention="metamath")   -> True
    answers_equal(r"\frac{1}{2}", "0.5")                               -> True

Six conventions: the five published ones of `eval.grader.conventions`, and our own, "verified", the default, which
asks whether a reader would call the answer right (`find_number`, `find_formula`, then `ladder`).

Grading is total: whatever the response and the gold are, `grade` returns right, wrong or ungraded, with the reason.
It is bounded too: WINDOW characters of a response are read, each rung of the ladder has its limits, and none of them
is a wall time, so that a busy machine gives the same verdicts as an idle one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import conventions
from .copying import copies_the_question, is_only_a_box, is_unfinished
from .errors import UngradedError
from .find_formula import adjoining_boxes, find_math
from .find_number import find_gsm8k
from .golds import UNANSWERABLE, find_unanswerable, is_within, split_tolerance
from .ladder import ANSWER, compare
from .statements import Found

VERIFIED = "verified"
CONVENTIONS = (*conventions.PUBLISHED, VERIFIED)
BENCHMARKS = ("gsm8k", "math")
WINDOW = 40_000  # characters of a response, from the end


@dataclass(frozen=True)
class Verdict:
    """The grader's result for one response."""

    correct: bool | None
    """None: ungraded, as `reason` says. Such a response counts as wrong, and is shown."""
    extracted: str | None
    """The answer found in the response; None if there is none."""
    reason: str = ""
    """Why: "equal", "unequal", why no answer was found, or what kept the grader from a decision."""


def extract_answer(response: str, *, convention: str, benchmark: str = "gsm8k") -> str | None:
    r"""The final answer of a response under a convention; None if it gives none.

    Args:
        response: the model's text.
        convention: one of CONVENTIONS.
        benchmark: "gsm8k" or "math". Most conventions have one rule for each.

    >>> extract_answer(r"Thus $x = \boxed{\frac{1}{2}}$.", convention="verified", benchmark="math")
    '\\frac{1}{2}'
    >>> extract_answer("She has 3 + 4 = 7 left. The answer is: 7", convention="metamath")
    '7'
    >>> extract_answer("no conclusion", convention="strict") is None
    True

    Raises:
        ValueError: an unknown convention or benchmark.
    """
    _check_names(convention, benchmark)
    try:
        return _find(_text(response, "response"), convention, benchmark).answer
    except Exception:  # see `grade`
        return None


def answers_equal(pred: str, gold: str) -> bool:
    r"""Mathematical equality of two answers, by the "verified" rule. What cannot be decided within the limits counts as
    unequal.

    >>> answers_equal(r"\frac{1}{2}", "0.5"), answers_equal(r"\{2, 1\}", "1, 2"), answers_equal("(1, 2)", "(2, 1)")
    (True, True, False)
    """
    try:
        return compare(_text(pred, "answer"), _text(gold, "gold"))
    except Exception:  # see `grade`
        return False


def looks_for(convention: str, benchmark: str) -> str:
    """What a response must hold for a convention to find an answer in it, in a few words.

    >>> looks_for("strict", "gsm8k")
    '"#### 7"'

    Raises:
        ValueError: an unknown convention or benchmark.
    """
    _check_names(convention, benchmark)
    if convention == VERIFIED:
        return "a marked answer or a concluding sentence"
    return conventions.LOOKS_FOR[convention][benchmark != "gsm8k"]


def grade(
    response: str, gold: str, *, benchmark: str = "gsm8k", convention: str = VERIFIED, problem: str | None = None
) -> Verdict:
    r"""The answer found in a response, and whether it is right: `is_correct` with its reasons.

    Args:
        problem: the question, where it is known. A formula of the question, handed back, is not its answer
            ("verified" only).

    >>> grade("The answer is 12.", "13")
    Verdict(correct=False, extracted='12', reason='unequal')
    >>> grade(r"\boxed{2^{10}}", "1024", benchmark="math", problem="Compute $2^{10}$.").reason
    'the question copied'

    Raises:
        ValueError: an unknown convention or benchmark; nothing else.
    """
    _check_names(convention, benchmark)
    try:
        return _grade(_text(response, "response"), _text(gold, "gold"), benchmark, convention, problem)
    except UngradedError as limit:
        return Verdict(None, None, str(limit))
    except Exception as fault:
        # The one guard of the grader. Texts are hostile, and one of them must not cost the scores of all the others.
        return Verdict(None, None, f"the grader failed: {type(fault).__name__}")


def is_correct(
    response: str, gold: str, *, benchmark: str = "gsm8k", convention: str = VERIFIED, problem: str | None = None
) -> bool:
    r"""Whether a response answers a problem correctly under a convention.

    Args:
        response: the model's text.
        gold: "18" for GSM8K, the content of the solution's last \boxed for MATH.
        benchmark: "gsm8k" or "math".
        convention: one of CONVENTIONS.
        problem: the question, where it is known; see `grade`.

    >>> is_correct("That makes 9 * 2 = $18 a day.", "18")
    True
    """
    return grade(response, gold, benchmark=benchmark, convention=convention, problem=problem).correct is True


def accuracy_reward(
    completions: Sequence[str | list[dict[str, str]]],
    answer: Sequence[str],
    *,
    prompts: Sequence[str | list[dict[str, str]]] | None = None,
    benchmark: str = "math",
    **_: Any,
) -> list[float]:
    """A reward function in TRL's form (GRPOTrainer's `reward_funcs`): 1.0 where the completion is right, 0.0 elsewhere.

    Args:
        completions: texts, or conversations whose last message holds the text.
        answer: the data set's `answer` column, one gold for each completion.
        prompts: what TRL passes, texts or conversations: handing back a formula of the prompt earns nothing.
    """
    questions = [None] * len(completions) if prompts is None else [_last_text(prompt) for prompt in prompts]
    return [
        float(is_correct(_last_text(completion), gold, benchmark=benchmark, problem=question))
        for completion, gold, question in zip(completions, answer, questions, strict=True)
    ]


# --- steps ------------------------------------------------------------------------------------------------------------


def _check_names(convention: str, benchmark: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}.")
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark={benchmark!r} is not one of {', '.join(BENCHMARKS)}.")


def _text(value: Any, what: str) -> str:
    """A text as it is, without halves of surrogate pairs, which no file could hold; a number as its digits."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UngradedError(f"the {what} is a {type(value).__name__}, not a text")
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _find(response: str, convention: str, benchmark: str) -> Found:
    response = response[-WINDOW:]
    if convention == VERIFIED:
        return find_gsm8k(response) if benchmark == "gsm8k" else find_math(response)
    return Found(conventions.extract(response, convention, benchmark))


def _grade(response: str, gold: str, benchmark: str, convention: str, problem: str | None) -> Verdict:
    # 1. the answer in the response
    gold, tolerance = split_tolerance(gold)
    if benchmark == "gsm8k" and convention == VERIFIED and gold.strip() == UNANSWERABLE:
        found = find_unanswerable(response[-WINDOW:])
    else:
        found = _find(response, convention, benchmark)
    answer = found.answer
    if answer is None:
        return Verdict(False, None, found.reason)
    if convention != VERIFIED:
        if max(len(answer), len(gold)) > ANSWER:
            return _verdict(answer.strip() == gold.strip(), answer)
        return _verdict(conventions.equal(answer, gold, convention, benchmark), answer)

    # 2. is it the gold? Several boxes next to each other are a list; of 1 "or" 2, both must be the gold. After "and"
    # the last one will do: MATH's own golds are the last boxes of its solutions
    boxes = adjoining_boxes(response[-WINDOW:]) if benchmark == "math" else None
    try:
        if boxes and boxes.contents and boxes.contents[-1].strip() == answer:  # no later statement took their place
            if compare(", ".join(boxes.contents), gold):
                return _verdict(True, ", ".join(boxes.contents))
            if boxes.are_alternatives and not all(compare(box, gold) for box in boxes.contents):
                return _verdict(False, ", ".join(boxes.contents))
        correct = compare(answer, gold) or (tolerance is not None and is_within(answer, gold, tolerance))
    except UngradedError as limit:
        return Verdict(None, answer, str(limit))

    # 3. an equal formula may still be the question, or a calculation that was not done
    if correct and benchmark == "math":
        if isinstance(problem, str) and copies_the_question(answer, gold, problem):
            return Verdict(False, answer, "the question copied")
        if is_unfinished(answer, gold, is_only_a_box=problem is None and is_only_a_box(response)):
            return Verdict(False, answer, "a calculation that was not done")
    return _verdict(correct, answer)


def _verdict(correct: bool, answer: str) -> Verdict:
    return Verdict(correct, answer, "equal" if correct else "unequal")


def _last_text(message: Any) -> Any:
    """A text as it is; the text of a conversation's last message. Anything else reaches `grade`, which says so."""
    if isinstance(message, list) and message and isinstance(message[-1], dict):
        return message[-1].get("content")
    return message
