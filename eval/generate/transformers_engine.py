"""Generation by transformers' `generate`: batches of similar length, padded on the left with an attention mask.

Runs anywhere; vLLM is faster. Sampling draws from a generator seeded by (seed, problem, sample), so that a sample
does not depend on what it is batched with.

Shapes: B batch, T longest prompt of the batch, L longest continuation, V vocabulary.
"""

import random
import warnings
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from matrix_llm.base.decoding import NEUTRAL_DECODING, end_tokens
from matrix_llm.base.errors import EvalError, ModelError
from matrix_llm.base.weights import check_adapter, check_finite, check_weights

from ..text import first_line, say
from .generation import Decoding, Generation, Key, Request, finish, first_stop, response_text
from .models import Source, load_tokenizer, refuse_code, stop_tokens


class TransformersEngine:
    """Generates with a model and tokenizer that are already loaded, for instance in the middle of training: neither
    is changed.
    """

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32, stops: Collection[int] | None = None):
        """
        Args:
            stops: the tokens that end a text; None: the tokenizer's, and those of the model's generation settings.
        """
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._stops = stops

    @classmethod
    def load(cls, source: Source, *, dtype: str, batch_size: int = 32) -> "TransformersEngine":
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = load_tokenizer(source)
        stops = stop_tokens(source, tokenizer)
        model: Any
        info: Any
        try:
            model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                source.base,
                revision=source.base_commit,
                dtype=getattr(torch, dtype),
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
            )
            for sentence in check_weights(model, info, f"--model {source.base}"):
                say(sentence)
            if source.adapter:
                from peft import PeftModel

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what PEFT warns of is refused below
                    model = PeftModel.from_pretrained(model, source.adapter)
                check_adapter(model, Path(source.adapter), f"the adapter {source.adapter}")
                check_finite(model, f"the adapter {source.adapter}")
            model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        except ModelError as error:
            raise EvalError(str(error)) from None
        except Exception as error:
            refuse_code(source.base, error)
            raise EvalError(
                f"--model {source.model} cannot be loaded: {type(error).__name__}: {first_line(error)}."
            ) from None
        model.eval()
        return cls(model, tokenizer, batch_size=batch_size, stops=stops)

    def close(self) -> None:
        """Do nothing: the model may belong to the caller."""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        """Yield batch by batch, longest prompts first, so that running out of memory shows at once.

        Requests in `skip` keep their place in a batch, and a batch is left out if all of it is skipped. A run that is
        resumed after a crash thus forms the same batches, and gives the same text even where rounding depends on the
        batch.
        """
        order = sorted(requests, key=lambda request: -len(request.prompt_ids))  # stable: ties stay in the order given
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if any(request.key not in skip for request in batch):
                for generation in self._generate_batch(batch, decoding):
                    if (generation.id, generation.sample) not in skip:
                        yield generation

    def _generate_batch(self, batch: list[Request], decoding: Decoding) -> list[Generation]:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        from matrix_llm.base.modes import evaluation_mode, neutral_generation

        # 1. prompts, padded on the left: every row then continues from its own last token
        stops = self._end_tokens
        pad = next(
            token for token in (self.tokenizer.pad_token_id, *stops, 0) if token is not None
        )  # masked: any will do
        length = max(len(request.prompt_ids) for request in batch)
        padding = [length - len(request.prompt_ids) for request in batch]
        rows = [[pad] * n + list(request.prompt_ids) for request, n in zip(batch, padding, strict=True)]
        device = next(self.model.parameters()).device
        input_ids = torch.tensor(rows, device=device)  # (B, T)
        attention_mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding], device=device)  # (B, T)

        # 2. how to decode
        limit = max(request.max_tokens for request in batch)
        settings = GenerationConfig(
            **NEUTRAL_DECODING, max_new_tokens=limit, use_cache=True, pad_token_id=pad, eos_token_id=list(stops) or None
        )
        criteria = [_StopStrings(self.tokenizer, batch, decoding.stop, length)] if decoding.stop else []
        processors = [_Sampler(batch, decoding)] if decoding.temperature > 0 else []

        # 3. generate. no_grad and not inference_mode, whose tensors could stay in a rotary cache and break training
        with evaluation_mode(self.model), neutral_generation(self.model), torch.no_grad():
            try:
                output = self.model.generate(  # (B, T + L)
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList(criteria),
                    logits_processor=processors,
                )
            except torch.OutOfMemoryError:
                raise EvalError(
                    f"the GPU ran out of memory with --batch_size {len(batch)}, "
                    f"{length} prompt tokens and up to {limit} new ones. "
                    "What is done is kept: run the same command with a smaller --batch_size."
                ) from None

        # 4. each row up to its own limit and its own end
        generations = []
        for request, new_ids in zip(batch, output[:, length:].tolist(), strict=True):
            new_ids = new_ids[: request.max_tokens]
            end = next((place for place, token in enumerate(new_ids) if token in stops), None)
            kept = new_ids if end is None else new_ids[: end + 1]
            generations.append(finish(self.tokenizer, request, kept, decoding, ended=end is not None))
        return generations

    @cached_property
    def _end_tokens(self) -> tuple[int, ...]:
        """The tokenizer's end-of-text token, and those of the model's generation config (chat models have several)."""
        if self._stops is not None:
            return tuple(self._stops)
        said = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        try:
            return tuple(end_tokens(said, self.tokenizer, self.model.config.get_text_config().vocab_size))
        except ModelError as error:
            raise EvalError(str(error)) from None


class _StopStrings:
    """A stopping criterion that ends a row once its text holds a stop string, so that a batch does not run on to the
    limit.

    The cut itself is made by `finish`.
    """

    def __init__(self, tokenizer: Any, batch: Sequence[Request], stops: Collection[str], length: int):
        self.tokenizer, self.batch, self.stops, self.length = tokenizer, batch, stops, length
        self.window = (
            max(map(len, stops)) + 4
        )  # tokens: each holds a byte at least, and the last ones may be half a letter
        self.done = [False] * len(batch)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # (B, T + L so far), unused -> (B,)
        import torch

        new = input_ids[:, max(self.length, input_ids.shape[1] - self.window) :].tolist()
        for row, ids in enumerate(new):
            if not self.done[row]:
                text = response_text(self.tokenizer, self.batch[row].prompt_ids, ids)
                self.done[row] = first_stop(text, self.stops) is not None
        return torch.tensor(self.done, device=input_ids.device)


class _Sampler:
    """A logits processor that draws each row's token with that row's own generator, then allows only that token.

    Inverse transform: the first token where the cumulative probability passes u, for one uniform u per row and step.
    """

    def __init__(self, batch: Sequence[Request], decoding: Decoding):
        self.generators = [random.Random(decoding.seed_of(request)) for request in batch]
        self.temperature, self.top_p = decoding.temperature, decoding.top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # (B, T + L so far), (B, V) -> (B, V)
        import torch

        probabilities = torch.softmax(scores.double() / self.temperature, dim=-1)
        sorted_probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = sorted_probabilities.cumsum(dim=-1)
        if self.top_p < 1:  # the smallest set of likeliest tokens that holds top_p
            kept = cumulative - sorted_probabilities < self.top_p
            cumulative = (sorted_probabilities * kept).cumsum(dim=-1)
        draws = [[generator.random()] for generator in self.generators]
        uniform = torch.tensor(draws, dtype=torch.double, device=scores.device)  # (B, 1)
        place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, place), 0.0)
