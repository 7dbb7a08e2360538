"""How close the model was to the other token where two greedy texts part.

Greedy decoding takes the largest logit. Two programs that batch differently add the same numbers in another order, so
where the two largest logits agree to within rounding, each may take the other token, and the texts part for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.agreement.compare import shared_length
from eval.generate.generation import tokenize
from matrix_llm.base.errors import EvalError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Parting:
    """The place where two texts part, seen by the model in one pass without padding or cache."""

    tokens: int
    """Tokens that the two responses share."""
    gap: float
    """The largest logit minus the second, >= 0."""
    top_two: bool
    """Whether both texts go on with one of these two tokens. A text that ends here may go on with either."""


class Reader:
    """A model and its tokenizer, to read what others wrote."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise EvalError(f"--model {folder} is not a folder with config.json. Give the folder of the model.")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def parting(self, prompt: str, first: str, second: str) -> Parting:
        """Where two responses to one prompt part, and how near the two likeliest tokens are there."""
        one, two = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second))
        shared = shared_length(one, two)
        starts_with_bos = bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)
        (prompt_ids,) = tokenize(self.tokenizer, [prompt], special_tokens=not starts_with_bos)
        logits = self._last_logits([*prompt_ids, *one[:shared]])
        values, tokens = logits.topk(2)
        follow = {ids[shared] for ids in (one, two) if len(ids) > shared}
        return Parting(shared, (values[0] - values[1]).item(), follow <= set(tokens.tolist()))

    def _last_logits(self, ids: Sequence[int]) -> Tensor:  # (T,) -> (V,)
        import torch

        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
