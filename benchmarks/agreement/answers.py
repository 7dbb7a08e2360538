"""What two programs answered, in one form: our NAME.jsonl, and the samples that lm-evaluation-harness logs.

Ours has one line per problem; the harness has one line per problem and filter, with the verdict it gave.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.answers import CONVENTIONS, grade
from eval.files import read_rows
from matrix_llm.base.errors import EvalError

NOTHING = "[invalid]"  # what the harness's regex filter returns when it finds no answer


@dataclass(frozen=True)
class Found:
    """The answer that one rule finds in a response."""

    answer: str | None
    """None if the rule finds none."""
    correct: bool
    """The rule's verdict."""


@dataclass
class Answer:
    """One response to one problem."""

    index: int
    """The problem's place in the test file, from 0."""
    gold: str
    """The right answer."""
    prompt_sha256: str
    """Of the exact prompt, so that two prompts can be compared without keeping them."""
    text: str
    """The response, up to its stop string."""
    cut: bool | None
    """Whether the limit of tokens ended it; None where the file does not say (the harness's)."""
    found: dict[str, Found] = field(default_factory=dict)
    """By rule: our conventions on every response, and the harness's own filters on its own."""
    prompt: str | None = None
    """The exact prompt, where the file holds it (the harness's)."""
    problem: str | None = None
    """The question, where the file holds it alone (ours)."""


Answers = dict[int, Answer]


def read_answers(path: Path) -> Answers:
    """{problem's place: answer} of a file of either program.

    Raises:
        EvalError: the file cannot be read, is neither program's, or answers a problem twice.
    """
    answers: Answers = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            answer = _of_harness(row) if "filtered_resps" in row else _of_ours(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvalError(
                f"{path}: row {number} has no readable {error}. Give a NAME.jsonl of eval/gsm8k.py, or a "
                "samples_*.jsonl that lm_eval wrote with --log_samples."
            ) from None
        before = answers.setdefault(answer.index, answer)
        if before is not answer:
            if before.text != answer.text or set(before.found) >= set(answer.found):
                raise EvalError(f"{path}: row {number} answers problem {answer.index} again. Give a file of one run.")
            before.found |= answer.found
    if not answers:
        raise EvalError(f"{path} holds no answers.")
    for answer in answers.values():
        answer.found |= _by_our_conventions(answer)
    return answers


def _of_ours(row: Mapping[str, Any]) -> Answer:
    place = re.search(r"/(\d+)$", row["id"])
    if not place:
        raise ValueError("place in the test file, such as gsm8k/test/12, in its id")
    if row["sample"] != 0:
        raise ValueError("single greedy answer: its sample is not 0")
    return Answer(
        int(place.group(1)),
        row["gold"],
        row["prompt_sha256"],
        row["response"],
        row["finish_reason"] == "length",
        problem=row["problem"],
    )


def _of_harness(row: Mapping[str, Any]) -> Answer:
    prompt = row["arguments"]["gen_args_0"]["arg_0"]
    if [len(responses) for responses in row["resps"]] != [1]:
        raise ValueError("single response: it was asked several times")
    answer, correct = row["filtered_resps"][0], bool(row["exact_match"])
    return Answer(
        int(row["doc_id"]),
        row["target"],
        hashlib.sha256(prompt.encode()).hexdigest(),
        row["resps"][0][0],
        None,
        {f"harness {row['filter']}": Found(None if answer == NOTHING else answer, correct)},
        prompt=prompt,
    )


def _by_our_conventions(answer: Answer) -> dict[str, Found]:
    verdicts = {name: grade(answer.text, answer.gold, convention=name) for name in CONVENTIONS}
    return {name: Found(verdict.extracted, verdict.correct is True) for name, verdict in verdicts.items()}
