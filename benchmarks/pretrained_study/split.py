"""A causal language model in two parts: lower layers that stay as they are, upper layers that are trained.

The lower part is the same for all arms and never changes, so that what it makes of a row is computed once (cache.py).
A tied LM head is untied first: otherwise training it would change the embeddings, which the lower part reads.

Legend: B rows of a batch, T tokens of the longest, H hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.pretrained_study.rows import Tokens
from benchmarks.study.design import StudyError


@dataclass(frozen=True)
class Inputs:
    """A batch. Rows end in padding, which a causal model's earlier positions do not see, so there is no mask."""

    arguments: dict[str, Tensor]
    """input_ids (B, T) or inputs_embeds (B, T, H)."""
    labels: Tensor
    """(B, T), -100 where nothing is trained."""


class Split:
    """One model, with its trained part as a model of its own.

    Args:
        folder: a model on this machine. trained_layers: how many of the last layers are trained, with the norm and the
            LM head after them; 0 trains everything, embeddings and a tied head included, and freezes nothing.

    Raises:
        StudyError: the model has fewer layers, or is of another build.
    """

    def __init__(self, folder: Path, trained_layers: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        load: Any = AutoModelForCausalLM.from_pretrained
        self.full = load(folder, trust_remote_code=False, dtype=torch.float32).to(self.device)
        self.is_whole = trained_layers == 0
        self.upper: Any = self.full
        if not self.is_whole:
            self.upper = self._cut(trained_layers)
        self.trained = [p for p in self.upper.parameters() if p.requires_grad]

    def _cut(self, trained_layers: int) -> Any:
        full, layers = self.full, getattr(self.full.base_model, "layers", None)
        if layers is None or not hasattr(full.base_model, "rotary_emb") or trained_layers > len(layers):
            raise StudyError(
                f"--trained_layers {trained_layers} does not fit {type(full).__name__}: it needs a decoder with at "
                "least so many `layers` and rotary positions. Use --trained_layers 0, which trains the whole model."
            )
        # 1. an LM head of its own, equal to the embeddings at the start
        if full.config.tie_word_embeddings:
            weight = full.get_output_embeddings().weight.detach().clone()
            full.config.tie_word_embeddings = False
            full.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            full.lm_head.weight = nn.Parameter(weight)
        # 2. nothing is trained but the last layers, the norm and the head
        full.requires_grad_(False)
        upper_layers = layers[-trained_layers:]
        for part in (upper_layers, full.base_model.norm, full.lm_head):
            part.requires_grad_(True)
        # 3. a model of the last layers alone, which shares its weights with the first
        values = full.config.to_dict() | {"num_hidden_layers": trained_layers}
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][-trained_layers:]
        config = type(full.config).from_dict(values)
        with torch.device("meta"):
            upper = type(full)(config)
        upper.base_model.layers = upper_layers
        upper.base_model.norm, upper.base_model.rotary_emb = full.base_model.norm, full.base_model.rotary_emb
        upper.base_model.embed_tokens, upper.lm_head = full.base_model.embed_tokens, full.lm_head
        return upper

    def lower(self, rows: Sequence[Tokens]) -> list[Tensor]:
        """What the frozen part makes of each row: (T_i, H), the input of the first trained layer."""
        found: list[Tensor] = []
        count = len(self.full.base_model.layers) - len(self.upper.base_model.layers)

        def keep(module: Any, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append(positional[0] if positional else keywords["hidden_states"])

        hook = self.full.base_model.layers[count].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                self.full.base_model(input_ids=self._padded([row.ids for row in rows], 0), use_cache=False)
        finally:
            hook.remove()
        return [states[: len(row.ids)] for states, row in zip(found[0], rows, strict=True)]

    def inputs(self, rows: Sequence[Tokens], states: Sequence[Tensor] | None) -> Inputs:
        """A batch for `upper`: of token ids for a whole model, else of what the lower part made of the rows."""
        labels = self._padded([row.labels for row in rows], -100)
        if self.is_whole:
            return Inputs({"input_ids": self._padded([row.ids for row in rows], 0)}, labels)
        assert states is not None
        return Inputs({"inputs_embeds": pad_sequence(list(states), batch_first=True).to(self.device)}, labels)

    def _padded(self, values: Sequence[list[int]], filler: int) -> Tensor:
        return pad_sequence([torch.tensor(each) for each in values], True, filler).to(self.device)
