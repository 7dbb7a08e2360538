"""The grader under its public name: `from eval.answers import is_correct`. The code is in `eval.grader`."""

from .grader.answers import (
    BENCHMARKS,
    CONVENTIONS,
    Verdict,
    accuracy_reward,
    answers_equal,
    extract_answer,
    grade,
    is_correct,
)

__all__ = [
    "BENCHMARKS",
    "CONVENTIONS",
    "Verdict",
    "accuracy_reward",
    "answers_equal",
    "extract_answer",
    "grade",
    "is_correct",
]
