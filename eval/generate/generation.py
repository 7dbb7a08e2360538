"""What an engine is asked for and returns, and how token ids become a text that ends at the first stop string."""

import bisect
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

Key = tuple[str, int]  # problem id, sample
CONTEXT_TOKENS = 8  # of the prompt, decoded before a response: they decide whether it begins with a space


@dataclass(frozen=True)
class Request:
    """A request for one sample."""

    id: str
    """Of the problem."""
    sample: int
    """Number of the sample, from 0."""
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt, at least one."""
    max_tokens: int
    """Maximum length of the response, 1 or more."""

    @property
    def key(self) -> Key:
        return self.id, self.sample


@dataclass(frozen=True)
class Decoding:
    """How text is drawn, and where it ends apart from the end-of-text token."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this much probability; above 0, at most 1."""
    seed: int = 0
    """Seed from which each request draws its own."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    keep_stop: bool = False
    """True: the response ends with the stop string that ended it."""

    def seed_of(self, request: Request) -> int:
        """The seed of a request: independent of batch and order, and the same on every machine."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{request.id}/{request.sample}".encode()).digest()[:7])


@dataclass(frozen=True)
class Generation:
    """One generated sample."""

    id: str
    """Of the problem."""
    sample: int
    """Number of the sample, from 0."""
    response: str
    """The response without special tokens, up to the first stop string."""
    finish_reason: str
    """"stop": an end-of-text token or a stop string. "length": the limit of tokens."""
    stop_reason: str | None
    """The stop string; None for an end-of-text token or the limit."""
    tokens: int
    """Number of generated tokens, including the end-of-text token and a stop string's tokens."""


def tokenize(tokenizer: Any, prompts: Sequence[str], *, special_tokens: bool) -> list[tuple[int, ...]]:
    """Token ids of each prompt, without the closing end-of-text token that some tokenizers add: the model must continue
    from here.

    Args:
        special_tokens: False for a chat template, whose text already holds them. A second <s> lowers scores.
    """
    if not prompts:
        return []
    closes = special_tokens and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    rows = tokenizer(list(prompts), add_special_tokens=special_tokens)["input_ids"]
    return [tuple(row[:-1] if closes else row) for row in rows]


def response_text(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """What `new_ids` add to the text. Decoded after the last tokens of the prompt: alone, Llama's tokenizer drops a
    leading space.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    context = list(prompt_ids[-CONTEXT_TOKENS:])
    before, whole = tokenizer.decode(context, **options), tokenizer.decode([*context, *new_ids], **options)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(new_ids), **options)


def first_stop(text: str, stops: Collection[str]) -> tuple[int, str] | None:
    """Place and text of the stop string that is complete first, as if the text were read letter by letter.

    >>> first_stop("18\\n\\nQuestion: 2", ("Question:", "Question", "USER"))
    (4, 'Question')
    """
    found = [(text.find(stop), stop) for stop in stops]
    return min(
        ((place, stop) for place, stop in found if place >= 0), key=lambda hit: hit[0] + len(hit[1]), default=None
    )


def finish(tokenizer: Any, request: Request, new_ids: Sequence[int], decoding: Decoding, *, ended: bool) -> Generation:
    """The Generation of the tokens `new_ids`, cut at the first stop string.

    Args:
        ended: an end-of-text token, and not the limit, ended them.
    """
    text = response_text(tokenizer, request.prompt_ids, new_ids)
    hit = first_stop(text, decoding.stop)
    if hit is None:
        return Generation(*request.key, text, "stop" if ended else "length", None, len(new_ids))
    place, stop = hit
    end = place + len(stop) if decoding.keep_stop else place
    return Generation(*request.key, text[:end], "stop", stop, _tokens_until(stop, tokenizer, request, new_ids))


def _tokens_until(stop: str, tokenizer: Any, request: Request, new_ids: Sequence[int]) -> int:
    """How many tokens it took to write the stop string: the rest would not have been drawn by an engine that stops at
    once.
    """
    return bisect.bisect_left(
        range(len(new_ids)),
        True,
        key=lambda count: stop in response_text(tokenizer, request.prompt_ids, new_ids[:count]),
    )
