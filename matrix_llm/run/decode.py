"""Greedy decoding and exact-match accuracy of a causal language model, with transformers' `generate` alone.

For quick figures before and after a training run; the benchmark scripts in eval/ use a faster engine.

1. Prompts are tokenised as in training: the prompt alone, with the tokenizer's special tokens, since the response's
   tokens were appended to it. A closing end-of-text token, which some tokenizers add, is dropped.
2. Longest first, so that a batch holds prompts of like length and running out of memory shows in the first batch.
3. Batches are padded on the LEFT with an explicit attention mask: every row then continues from its own last token.
4. Each row is cut at its first end-of-text token and decoded; texts return in the order of the prompts.

Shapes: B batch, T longest prompt of the batch, L longest continuation.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainerCallback

from matrix_llm.base.decoding import NEUTRAL_DECODING
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.base.statistics import wilson_interval
from matrix_llm.data.prompts import PROMPT_TEMPLATES

ANSWER_MARKER = "The answer is: "
ANSWER_WINDOW = 200  # characters read after the marker: a model that babbles digits cannot make scoring slow
NUMBER = re.compile(r"([-+]?)([0-9][0-9,]*)?(?:\.([0-9]+))?(?:/([0-9]+))?")


class Question(Protocol):
    """What `measure_accuracy` reads of a problem; `matrix_llm.data.wordproblems.Problem` is one."""

    @property
    def query(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Accuracy:
    """Exact-match accuracy of greedy responses, as extracted by `final_answer`."""

    correct: int
    total: int
    accuracy: float
    low: float
    """`low` to `high` is Wilson's 95 % interval."""
    high: float
    unanswered: int
    """Responses without a final answer; they count as wrong."""
    responses: tuple[str, ...]
    is_correct: tuple[bool, ...]
    """One per problem, for tables by style."""


def final_answer(text: str) -> str | None:
    """The first number after the last "The answer is: " (MetaMath's rule), in one spelling; None if there is none.

    Commas, a plus sign, leading zeros and a fraction of zeros go. The time does not depend on what follows the marker.

    >>> final_answer("So x = 1,200 / 2. The answer is: $1,200.00 a year"), final_answer("The answer is: -3/4")
    ('1200', '-3/4')
    >>> final_answer("The answer is 7") is None
    True
    """
    start = text.rfind(ANSWER_MARKER)
    if start < 0:
        return None
    start += len(ANSWER_MARKER)
    for match in NUMBER.finditer(text[start : start + ANSWER_WINDOW]):
        sign, whole, decimals, denominator = match.groups()
        if whole or decimals:  # the pattern also matches nothing, and a lone sign or "/2"
            break
    else:
        return None
    whole = (whole or "").replace(",", "").lstrip("0") or "0"
    decimals = (decimals or "").rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    if denominator and denominator.lstrip("0") not in ("", "1"):
        number += f"/{denominator.lstrip('0')}"
    return f"-{number}" if sign == "-" and number != "0" else number


def _stop_tokens(model: PreTrainedModel, tokenizer) -> list[int]:
    """The tokenizer's end-of-text token, and those of the model's generation config (chat models have several)."""
    extra = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = [tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])]
    return sorted({token for token in tokens if token is not None})


def generate_greedy(
    model: PreTrainedModel, tokenizer, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """The model's greedy continuation of each prompt, without the prompt and without special tokens.

    Neither the tokenizer (its padding side) nor the model (modes, `use_cache`, generation config) is changed. In float32
    a text does not depend on the other prompts of its batch, up to exact ties of the logits.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if not prompts:
        return []
    stops = _stop_tokens(model, tokenizer)
    prompt_ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        prompt_ids = [ids[:-1] for ids in prompt_ids]
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {index} ({prompts[index]!r}) has no tokens, so there is nothing to continue.")
    pad = next(token for token in (tokenizer.pad_token_id, *stops, 0) if token is not None)  # masked: any token will do
    settings = GenerationConfig(
        **NEUTRAL_DECODING, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, eos_token_id=stops or None
    )
    device = next(model.parameters()).device
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    texts = [""] * len(prompts)
    with evaluation_mode(model), torch.no_grad():  # no inference_mode: its tensors could stay in a rotary cache
        for start in range(0, len(prompts), batch_size):
            chosen = longest_first[start : start + batch_size]
            length = len(prompt_ids[chosen[0]])
            padding = [length - len(prompt_ids[index]) for index in chosen]
            input_ids = torch.tensor(
                [[pad] * n + prompt_ids[i] for i, n in zip(chosen, padding, strict=True)]
            )  # (B, T)
            attention_mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding])  # (B, T)
            inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
            output = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
            for index, new_ids in zip(chosen, output[:, length:].tolist(), strict=True):  # (B, L)
                end = next((place for place, token in enumerate(new_ids) if token in stops), len(new_ids))
                texts[index] = tokenizer.decode(new_ids[:end], skip_special_tokens=True)
    return texts


def measure_accuracy(
    model: PreTrainedModel,
    tokenizer,
    problems: Sequence[Question],
    *,
    template: str = PROMPT_TEMPLATES["metamath"],
    max_new_tokens: int = 512,
    batch_size: int = 64,
    is_correct: Callable[[str, str], bool] | None = None,
) -> Accuracy:
    """Share of `problems` whose greedy response ends in the right answer.

    `is_correct(response, answer)` replaces the number that `final_answer` finds, for answers that are not numbers:
    `functools.partial(eval.answers.is_correct, benchmark="math")`.

    `template` is the prompt of training, with {instruction} where the query goes. It is replaced, not formatted, so
    that the braces of LaTeX survive. Answers are compared as `final_answer` spells them.
    """
    if not problems:
        raise ValueError("there are no problems to measure accuracy on.")
    if template.count("{instruction}") != 1:
        raise ValueError(f"template={template!r} must hold {{instruction}} once: that is where the query goes.")
    expected = [final_answer(ANSWER_MARKER + problem.answer) for problem in problems]
    for index, (problem, answer) in enumerate(zip(problems, expected, strict=True)):
        if answer is None and is_correct is None:
            raise ValueError(
                f"problem {index} has the answer {problem.answer!r}, which holds no number to compare with."
            )
    responses = generate_greedy(
        model,
        tokenizer,
        [template.replace("{instruction}", problem.query) for problem in problems],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    given = [final_answer(response) for response in responses]
    if is_correct is None:
        verdicts = tuple(a == b for a, b in zip(given, expected, strict=True))
    else:
        verdicts = tuple(
            is_correct(response, problem.answer) for response, problem in zip(responses, problems, strict=True)
        )
    correct, total = sum(verdicts), len(problems)
    low, high = wilson_interval(correct, total)
    return Accuracy(
        correct=correct,
        total=total,
        accuracy=correct / total,
        low=low,
        high=high,
        unanswered=given.count(None),
        responses=tuple(responses),
        is_correct=verdicts,
    )


class AccuracyCallback(TrainerCallback):
    """Logs greedy accuracy on a sample of problems every `every` steps: `accuracy`, and Wilson's 95 % interval around it as
    `accuracy_low` and `accuracy_high`. Training is not disturbed: greedy decoding draws no random number, and modes are restored.

    >>> trainer.add_callback(AccuracyCallback(trainer, problems, every=500))  # doctest: +SKIP

    `settings` are `measure_accuracy`'s.
    """

    def __init__(self, trainer: Trainer, problems: Sequence[Question], *, every: int, **settings: Any) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be 1 or more: accuracy is measured every so many optimizer steps.")
        self.trainer, self.problems, self.every, self.settings = trainer, problems, every, settings

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            found = measure_accuracy(self.trainer.model, self.trainer.processing_class, self.problems, **self.settings)  # type: ignore[arg-type]
            self.trainer.log({"accuracy": found.accuracy, "accuracy_low": found.low, "accuracy_high": found.high})
