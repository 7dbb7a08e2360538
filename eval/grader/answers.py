r"""Was the answer right? Strings in, verdicts out; no model, no torch.

    extract_answer(r"... so \boxed{18}.", convention="verified")        -> "18"
    is_correct("... The answer is: 18", "18", convention="metamath")   -> True
    answers_equal(r"\frac{1}{2}", "0.5")                               -> True

Six conventions: the five published ones of `eval.grader.conventions`, and our own, "verified", the default, which
asks whether a reader would call the answer right (`eval.grader.extraction`, then `eval.grader.ladder`).

Everything is bounded: WINDOW characters of a response are read, and each rung of the ladder has its limits. A verdict
that could not be reached is None in `grade` and False in `is_correct`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import conventions
from .extraction import adjoining_boxes, extract_gsm8k, extract_math
from .ladder import are_equal

VERIFIED = "verified"
CONVENTIONS = (*conventions.PUBLISHED, VERIFIED)
BENCHMARKS = ("gsm8k", "math")
WINDOW = 40_000  # characters of a response, from the end


@dataclass(frozen=True)
class Verdict:
    """The grader's result for one response."""

    correct: bool | None
    """None: a limit was reached before a decision. Such a response is ungraded: it counts as wrong, and is shown."""
    extracted: str | None
    """The answer found in the response; None if there is none."""


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
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}.")
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark={benchmark!r} is not one of {', '.join(BENCHMARKS)}.")
    response = response[-WINDOW:]
    if convention != VERIFIED:
        return conventions.extract(response, convention, benchmark)
    return extract_gsm8k(response) if benchmark == "gsm8k" else extract_math(response)


def answers_equal(pred: str, gold: str) -> bool:
    r"""Mathematical equality of two answers, by the "verified" rule. What cannot be decided within the limits counts as
    unequal.

    >>> answers_equal(r"\frac{1}{2}", "0.5"), answers_equal(r"\{2, 1\}", "1, 2"), answers_equal("(1, 2)", "(2, 1)")
    (True, True, False)
    """
    return are_equal(pred, gold) is True


def grade(response: str, gold: str, *, benchmark: str = "gsm8k", convention: str = VERIFIED) -> Verdict:
    """The answer found in a response, and whether it is right: `is_correct` with its reasons."""
    extracted = extract_answer(response, convention=convention, benchmark=benchmark)
    if extracted is None:
        return Verdict(False, None)
    if convention != VERIFIED:
        return Verdict(conventions.equal(extracted, gold, convention, benchmark), extracted)
    correct = are_equal(extracted, gold)
    if correct is not True and benchmark == "math" and "," in gold:  # a list, perhaps given in several boxes
        boxes = adjoining_boxes(response[-WINDOW:])
        if boxes is not None and are_equal(boxes, gold):
            return Verdict(True, boxes)
    return Verdict(correct, extracted)


def is_correct(response: str, gold: str, *, benchmark: str = "gsm8k", convention: str = VERIFIED) -> bool:
    r"""Whether a response answers a problem correctly under a convention.

    Args:
        response: the model's text.
        gold: "18" for GSM8K, the content of the solution's last \boxed for MATH.
        benchmark: "gsm8k" or "math".
        convention: one of CONVENTIONS.

    >>> is_correct("That makes 9 * 2 = $18 a day.", "18")
    True
    """
    return grade(response, gold, benchmark=benchmark, convention=convention).correct is True


def accuracy_reward(
    completions: Sequence[str | list[dict[str, str]]], answer: Sequence[str], *, benchmark: str = "math", **_: Any
) -> list[float]:
    """A reward function in TRL's form (GRPOTrainer's `reward_funcs`): 1.0 where the completion is right, 0.0 elsewhere.

    Args:
        completions: texts, or conversations whose last message holds the text.
        answer: the data set's `answer` column, one gold for each completion.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_correct(text, gold, benchmark=benchmark)) for text, gold in zip(texts, answer, strict=True)]
