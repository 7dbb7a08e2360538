"""Greedy decoding and exact-match accuracy of a causal language model, with transformers' `generate` alone.

For quick figures before and after a training run; the benchmark scripts in eval/ use a faster engine.

Shapes: B prompts in a batch, T tokens in the longest of them, L tokens in the longest continuation.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainerCallback

from matrix_llm.base.decoding import NEUTRAL_DECODING, end_tokens
from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.base.modes import evaluation_mode, neutral_generation
from matrix_llm.base.statistics import wilson_interval
from matrix_llm.data.prompts import CHAT, PROMPT_TEMPLATES
from matrix_llm.data.tokens import Edges, chat_prompt_ids

ANSWER_MARKER = "The answer is: "
ANSWER_WINDOW = 200  # characters read after the marker, so that endless digits from a model cannot slow down scoring
NUMBER = re.compile(r"([-+]?)([0-9][0-9,]*)?(?:\.([0-9]+))?(?:/([0-9]+))?")


class Question(Protocol):
    """What `measure_accuracy` needs from a problem; `matrix_llm.data.wordproblems.Problem` provides it."""

    @property
    def query(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Accuracy:
    """Exact-match accuracy of greedy responses, as extracted by `final_answer`."""

    correct: int
    """Responses with the right final answer, 0 to `total`."""
    total: int
    """Problems asked, at least 1."""
    accuracy: float
    """`correct / total`, 0 to 1."""
    low: float
    """Lower end of Wilson's 95 % interval for `accuracy`."""
    high: float
    """Upper end of that interval."""
    unanswered: int
    """Responses without a final answer. They count as wrong."""
    responses: tuple[str, ...]
    """The text of each response, in the order of the problems."""
    is_correct: tuple[bool, ...]
    """The verdict on each response, for tables by style of problem."""


def final_answer(text: str) -> str | None:
    """The first number after the last "The answer is: " (MetaMath's rule), in a normal form; None if there is none.

    The normal form has no commas, plus sign, leading zeros, trailing decimal zeros or denominator 1. The time taken
    does not depend on what follows the marker.

    >>> final_answer("So x = 1,200 / 2. The answer is: $1,200.00 a year"), final_answer("The answer is: -3/4")
    ('1200', '-3/4')
    >>> final_answer("The answer is 7") is None
    True
    """
    # 1. the first match that is a number: the pattern also matches nothing, a lone sign and "/2"
    start = text.rfind(ANSWER_MARKER)
    if start < 0:
        return None
    start += len(ANSWER_MARKER)
    for match in NUMBER.finditer(text[start : start + ANSWER_WINDOW]):
        sign, whole, decimals, denominator = match.groups()
        if whole or decimals:
            break
    else:
        return None
    # 2. its normal form
    whole = (whole or "").replace(",", "").lstrip("0") or "0"
    decimals = (decimals or "").rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    if denominator and denominator.lstrip("0") not in ("", "1"):
        number += f"/{denominator.lstrip('0')}"
    return f"-{number}" if sign == "-" and number != "0" else number


def _stop_tokens(model: PreTrainedModel, tokenizer) -> list[int]:
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return end_tokens(said, tokenizer, model.config.get_text_config().vocab_size)


def generate_greedy(
    model: PreTrainedModel, tokenizer, prompts: Sequence[str | list[int]], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """The model's greedy continuation of each prompt (a text, or its ids), without it and without special tokens.

    Neither the tokenizer (its padding side) nor the model (modes, `use_cache`, generation config) is changed. In
    float32 a text does not depend on the other prompts of its batch, except where two logits are exactly equal.

    Raises:
        ValueError: `max_new_tokens` or `batch_size` is below 1.
        DataError: a prompt has no tokens.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if not prompts:
        return []
    # 1. Tokenise as in training, where the response's tokens follow the prompt's: a closing end-of-text token, which
    #    some tokenizers add, is removed.
    of_texts = iter(Edges(tokenizer).prompts([each for each in prompts if isinstance(each, str)]))
    prompt_ids = [next(of_texts)[0] if isinstance(each, str) else each for each in prompts]
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise DataError(f"prompt {index} ({prompts[index]!r}) has no tokens, so there is nothing to continue.")
    # 2. Greedy, whatever the checkpoint's generation config asks for.
    stops = _stop_tokens(model, tokenizer)
    pad = next(token for token in (tokenizer.pad_token_id, *stops, 0) if token is not None)  # masked: any token will do
    settings = GenerationConfig(
        **NEUTRAL_DECODING, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, eos_token_id=stops or None
    )
    # 3. Longest first: the prompts of a batch have similar lengths, and running out of memory shows in the first batch.
    device = next(model.parameters()).device
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    texts = [""] * len(prompts)
    # no_grad and not inference_mode, whose tensors could stay in a rotary cache
    with evaluation_mode(model), neutral_generation(model), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            chosen = longest_first[start : start + batch_size]
            # 4. Pad on the LEFT, with an explicit mask: each prompt is then continued from its own last token.
            length = len(prompt_ids[chosen[0]])  # T
            padding = [length - len(prompt_ids[index]) for index in chosen]
            padded = [[pad] * n + prompt_ids[index] for index, n in zip(chosen, padding, strict=True)]
            mask = [[0] * n + [1] * (length - n) for n in padding]
            inputs = {
                "input_ids": torch.tensor(padded, device=device),  # (B, T)
                "attention_mask": torch.tensor(mask, device=device),  # (B, T)
            }
            output = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]  # (B, T + L)
            # 5. Cut each continuation at its first end-of-text token, and put its text in the place of its prompt.
            for index, new_ids in zip(chosen, output[:, length:].tolist(), strict=True):
                end = next((place for place, token in enumerate(new_ids) if token in stops), len(new_ids))
                texts[index] = tokenizer.decode(new_ids[:end], skip_special_tokens=True)
    return texts


def prompts_of(tokenizer, template: str, problems: Sequence[Question]) -> list[str | list[int]]:
    """The prompt of each problem, as training lays it out: a text, or the ids of a chat template."""
    if template == CHAT:
        return [chat_prompt_ids(tokenizer, each.query) for each in problems]
    return [template.replace("{instruction}", each.query) for each in problems]


def measure_accuracy(
    model: PreTrainedModel,
    tokenizer,
    problems: Sequence[Question],
    *,
    template: str = PROMPT_TEMPLATES["metamath"],
    max_new_tokens: int = 512,
    batch_size: int = 64,
    is_correct: Callable[..., bool] | None = None,
) -> Accuracy:
    """The share of `problems` whose greedy response ends in the right answer.

    Args:
        template: the prompt of training, with {instruction} where the question goes. It is replaced, not formatted, so
            that the braces of LaTeX survive. "chat" lays the question out by the tokenizer's chat template.
        is_correct: (response, answer) -> verdict, for answers that are not numbers, such as
            `functools.partial(eval.answers.is_correct, benchmark="math")`. If it takes `problem`, it is given the
            question under that name, since a formula of the question is not its answer. By default the normal forms
            that `final_answer` gives to the response's answer and to the problem's must be equal.

    Raises:
        DataError: there are no problems, or one has no number to compare with.
        RecipeError: the template does not hold {instruction} exactly once.
    """
    if not problems:
        raise DataError("there are no problems to measure accuracy on.")
    if template != CHAT and template.count("{instruction}") != 1:
        raise RecipeError(
            f"template={template!r} must hold {{instruction}} exactly once: that is where the question goes."
        )
    # 1. the answers to compare with
    expected = [final_answer(ANSWER_MARKER + problem.answer) for problem in problems]
    for index, (problem, answer) in enumerate(zip(problems, expected, strict=True)):
        if answer is None and is_correct is None:
            raise DataError(
                f"problem {index} has the answer {problem.answer!r}, which holds no number to compare with."
            )
    # 2. the model's responses
    responses = generate_greedy(
        model,
        tokenizer,
        prompts_of(tokenizer, template, problems),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    # 3. the verdicts
    given = [final_answer(response) for response in responses]
    if is_correct is None:
        verdicts = tuple(a == b for a, b in zip(given, expected, strict=True))
    else:
        knows = _takes_problem(is_correct)
        verdicts = tuple(
            is_correct(response, each.answer, **({"problem": each.query} if knows else {}))
            for response, each in zip(responses, problems, strict=True)
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


def _takes_problem(is_correct: Callable[..., bool]) -> bool:
    """Whether it has a parameter `problem` that is still free, or takes any."""
    parameters = inspect.signature(is_correct).parameters
    return "problem" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def log_accuracy(trainer: Trainer, found: Mapping[str, float], **others: float) -> None:
    """Log an accuracy and its interval, apart from the logging window of training.

    In training mode, trainer.log would end the window, whose figures belong to the next loss. Whatever is logged also
    answers a request to log the loss of this step, which is therefore made again.

    Args:
        found: `accuracy`, `low` and `high`.
        others: logged with them.
    """
    is_loss_due = trainer.control.should_log
    with evaluation_mode(trainer.model):  # type: ignore[arg-type]
        trainer.log(
            {"accuracy": found["accuracy"], "accuracy_low": found["low"], "accuracy_high": found["high"], **others}
        )
    trainer.control.should_log = is_loss_due


class AccuracyCallback(TrainerCallback):
    """Logs greedy accuracy on a sample of problems while training.

    Logged are `accuracy` and the ends of its 95 % interval, `accuracy_low` and `accuracy_high`. Training is not
    affected: greedy decoding draws no random numbers, and modes are restored.

    Args:
        every: optimizer steps between two measurements, at least 1.
        settings: those of `measure_accuracy`.

    >>> trainer.add_callback(AccuracyCallback(trainer, problems, every=500))  # doctest: +SKIP
    """

    def __init__(self, trainer: Trainer, problems: Sequence[Question], *, every: int, **settings: Any) -> None:
        if every < 1:
            raise ValueError(
                f"every={every} must be 1 or more: it is the number of optimizer steps between measurements."
            )
        self.trainer, self.problems, self.every, self.settings = trainer, problems, every, settings

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            model, tokenizer = self.trainer.model, self.trainer.processing_class
            found = measure_accuracy(model, tokenizer, self.problems, **self.settings)  # type: ignore[arg-type]
            log_accuracy(self.trainer, {"accuracy": found.accuracy, "low": found.low, "high": found.high})
