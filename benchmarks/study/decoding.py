"""Answers of one model, greedy or sampled, each with the model's confidence in it.

Legend: B prompts of a batch, T prompt tokens (padded on the left), L new tokens, V vocabulary size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from matrix_llm.base.modes import evaluation_mode
from matrix_llm.data.prompts import format_prompt
from matrix_llm.data.wordproblems import Problem
from matrix_llm.run.decode import ANSWER_MARKER, final_answer


@dataclass(frozen=True)
class Decoding:
    """How answers are made."""

    max_new_tokens: int = 72
    """At least 1."""
    batch_size: int = 125
    """Prompts decoded together; at least 1."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0
    """Of the sampling."""


@dataclass
class Generated:
    """What the model wrote after one prompt."""

    ids: list[int]
    """(L,) new tokens, the end-of-text token last if it came."""
    probabilities: list[float]
    """(L,) the probability the model gave each of them, at temperature 1 even where sampling is cooler."""


@dataclass(frozen=True)
class Response:
    text: str
    """The decoded text."""
    answer: str | None
    """The final answer in the text; None without one."""
    confidence: float
    """Product of the probabilities of the answer's tokens and of the end of the text; NaN without an answer."""


def decode(model: Any, tokenizer: Any, prompts: Sequence[str], how: Decoding) -> list[Generated]:
    """The continuation of each prompt, in the order of the prompts. Finished rows leave the batch."""
    prompt_ids = [torch.tensor(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    longest_first = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    found = [Generated([], []) for _ in prompt_ids]
    generator = torch.Generator(model.device).manual_seed(how.seed)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(longest_first), how.batch_size):
            rows = longest_first[start : start + how.batch_size]
            batch = [prompt_ids[i] for i in rows]
            _decode_batch(model, tokenizer, batch, [found[i] for i in rows], how, generator)
    return found


def _decode_batch(
    model: Any,
    tokenizer: Any,
    prompt_ids: list[Tensor],  # B tensors (T_i,)
    unfinished: list[Generated],  # filled in place
    how: Decoding,
    generator: torch.Generator,
) -> None:
    # 1. Prompts end at the right edge, so that each step's logits are the last column's.
    ids = pad_sequence(prompt_ids, True, tokenizer.pad_token_id, padding_side="left").to(model.device)  # (B, T)
    mask = pad_sequence([torch.ones_like(i) for i in prompt_ids], True, 0, padding_side="left").to(model.device)
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
    for _ in range(how.max_new_tokens):
        # 2. One step of the model.
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()  # (B, V)
        # 3. Choose a token for each row and remember how likely it was.
        if how.temperature:
            chosen = torch.multinomial((logits / how.temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        probabilities = logits.softmax(-1).gather(1, chosen[:, None])[:, 0]
        for row, token, probability in zip(unfinished, chosen.tolist(), probabilities.tolist(), strict=True):
            row.ids.append(token)
            row.probabilities.append(probability)
        # 4. Rows that have ended leave the batch, and the cache with them.
        going_on = torch.nonzero(chosen != tokenizer.eos_token_id)[:, 0]
        if not len(going_on):
            return
        if len(going_on) < len(unfinished):
            cache.batch_select_indices(going_on)
            unfinished = [unfinished[i] for i in going_on.tolist()]
        ids = chosen[going_on, None]
        mask = torch.cat([mask[going_on], mask.new_ones(len(going_on), 1)], 1)
        positions = positions[going_on, -1:] + 1


def to_response(tokenizer: Any, generated: Generated) -> Response:
    """The text, its final answer, and the model's confidence in everything after the last answer marker."""
    ids = generated.ids
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    answer = final_answer(text)
    if answer is None:
        return Response(text, None, math.nan)
    # The answer starts with the first token that brings text beyond the marker.
    marker_end = text.rfind(ANSWER_MARKER) + len(ANSWER_MARKER.rstrip())
    first = next(
        i for i in range(len(ids)) if len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) > marker_end
    )
    return Response(text, answer, math.prod(generated.probabilities[first:]))


def answer_problems(
    model: Any, tokenizer: Any, problems: Sequence[Problem], template: str, how: Decoding
) -> list[Response]:
    prompts = [format_prompt(template, problem.query) for problem in problems]
    return [to_response(tokenizer, generated) for generated in decode(model, tokenizer, prompts, how)]
