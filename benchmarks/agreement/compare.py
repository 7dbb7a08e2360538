"""What differs between two runs over the same problems, and why: first the texts, then the verdicts on one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.agreement.answers import Answer, Answers, Found

HARNESS_RULES = (  # a filter of the harness, and the convention of ours that is read beside it
    ("harness flexible-extract", "flexible"),
    ("harness strict-match", "strict"),  # the task gsm8k: "#### 18"
    ("harness strict-match", "llemma"),  # the task gsm8k_cot: "The answer is 18."
    ("harness flexible-extract", "verified"),
)


@dataclass(frozen=True)
class TextDifference:
    """Two different texts that answer one problem."""

    index: int
    """The problem's place in the test file."""
    kind: str
    """See `kind_of_difference`."""
    shared: int
    """Characters before the first difference."""
    first: str
    """The first text from there, shortened."""
    second: str
    """The second text from there, shortened."""


def kind_of_difference(first: Answer, second: Answer) -> str | None:
    """Why two texts are not the same; None if they are.

    "another prompt"       the two runs did not ask the same
    "whitespace"           the same words
    "cut at the limit"     one is the beginning of the other, and its limit of tokens ended it
    "another end"          one is the beginning of the other: a stop string or the end-of-text token
    "another token"        they part in the middle: two tokens with nearly equal logits, see `tokens.py`

    >>> a = Answer(0, "2", "p", "1 + 1 = 2", cut=False)
    >>> kind_of_difference(a, Answer(0, "2", "p", "1 + 1 = 3", cut=False))
    'another token'
    """
    if first.prompt_sha256 != second.prompt_sha256:
        return "another prompt"
    if first.text == second.text:
        return None
    if first.text.split() == second.text.split():
        return "whitespace"
    shorter, longer = sorted((first, second), key=lambda answer: len(answer.text))
    if not longer.text.startswith(shorter.text):
        return "another token"
    return "cut at the limit" if shorter.cut else "another end"


def compare_texts(first: Answers, second: Answers, *, width: int = 48) -> list[TextDifference]:
    """The problems that both runs answered with different texts, each with what follows the shared part."""
    differences = []
    for index in sorted(first.keys() & second.keys()):
        kind = kind_of_difference(first[index], second[index])
        if kind is not None:
            a, b = first[index].text, second[index].text
            shared = shared_length(a, b)
            differences.append(
                TextDifference(index, kind, shared, a[shared : shared + width], b[shared : shared + width])
            )
    return differences


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading characters or tokens two texts share.

    >>> shared_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def kind_of_disagreement(theirs: Found, ours: Found) -> str | None:
    """Why two rules judge the same text differently; None if they do not.

    >>> kind_of_disagreement(Found("1", False), Found("18", True))
    'another number read'
    """
    if theirs.correct == ours.correct:
        return None
    if theirs.answer is None or ours.answer is None:
        return "no answer found by " + ("the harness" if theirs.answer is None else "ours")
    same = _number(theirs.answer) == _number(ours.answer)
    return "the same number, judged differently" if same else "another number read"


def _number(answer: str) -> str:
    return answer.replace(",", "").replace("$", "").rstrip(".")


@dataclass(frozen=True)
class RuleAgreement:
    """How often a filter of the harness and a convention of ours give the same verdict on the harness's own texts."""

    theirs: str
    """Name of the filter."""
    ours: str
    """Name of the convention."""
    same: int
    """Texts with the same verdict."""
    total: int
    """All texts."""
    disagreements: tuple[tuple[int, str], ...]
    """(the problem's place, why) of the others."""


def compare_rules(answers: Answers) -> list[RuleAgreement]:
    """One entry for each pair of rules that the answers hold; none for a run of ours, which has no harness verdicts."""
    agreements = []
    for theirs, ours in HARNESS_RULES:
        pairs = [(index, answer.found) for index, answer in sorted(answers.items()) if theirs in answer.found]
        if pairs:
            kinds = [(index, kind_of_disagreement(found[theirs], found[ours])) for index, found in pairs]
            different = tuple((index, kind) for index, kind in kinds if kind is not None)
            agreements.append(RuleAgreement(theirs, ours, len(pairs) - len(different), len(pairs), different))
    return agreements
