"""Groups of positions: by the kind of the target token, and by cross-entropy.

Legend: N positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DIGITS, OPERATORS, WORDS, END, OTHER = KINDS = ("digits", "operators", "words", "end", "other")
_SIGNS = set("+-*/=<>^%()[]{}÷·±≤≥≈≠√∑∫\\\N{MULTIPLICATION SIGN}")
_EDGES = (0.5, 2.0, 5.0)
CE_RANGES = ("CE < 0.5", "0.5 to 2", "2 to 5", "CE >= 5")


def kind_of(text: str) -> str:
    """The kind of a token that is not special: words (it holds a letter), digits, operators or other.

    The first that applies counts: a letter, a digit, a sign of arithmetic or a bracket. White space and punctuation
    are other.

    >>> [kind_of(text) for text in (" apples", "12", "=2", " +", ".\\n")]
    ['words', 'digits', 'digits', 'operators', 'other']
    """
    if any(c.isalpha() for c in text):
        return WORDS
    if any(c.isdigit() for c in text):
        return DIGITS
    return OPERATORS if any(c in _SIGNS for c in text) else OTHER


def by_kind(labels: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """The places of the positions of each kind of target, (n,) each; "end" is any special token. Kinds may be empty."""
    special = set(tokenizer.all_special_ids)
    kinds = {token: END if token in special else kind_of(tokenizer.decode([token])) for token in set(labels.tolist())}
    of_each = [kinds[token] for token in labels.tolist()]
    return {kind: _places([each == kind for each in of_each]) for kind in KINDS}


def by_cross_entropy(cross_entropy: Tensor) -> dict[str, Tensor]:
    """The places of the positions in each range of CE, (n,) each; a range holds its lower end.

    Args:
        cross_entropy: (N,) nats.
    """
    at = torch.bucketize(cross_entropy.cpu(), torch.tensor(_EDGES, dtype=cross_entropy.dtype), right=True).tolist()
    return {name: _places([each == place for each in at]) for place, name in enumerate(CE_RANGES)}


def _places(chosen: list[bool]) -> Tensor:
    return torch.tensor([place for place, yes in enumerate(chosen) if yes], dtype=torch.long)


def show_token(tokenizer: Any, token: int) -> str:
    """A token as a Python string literal, in which nothing can hide: \"' apples'\", \"'\\\\n'\".

    A token that is no text by itself, such as a part of a UTF-8 character, is shown as the tokenizer's own name for it;
    a row of the LM head that belongs to no token, by its id.
    """
    if token >= len(tokenizer):
        return f"<row {token}>"
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    return repr(text)
