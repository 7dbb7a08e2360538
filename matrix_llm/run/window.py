"""The logging window: sums over micro-batches, the clock of training, and what a token costs."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel


class TokenSums:
    """Sums over the trained tokens of a window, by name. One of them, `tokens`, counts the tokens.

    They stay on the device until the window is logged, so that no micro-batch waits for the host.

    >>> sums = TokenSums()
    >>> sums.add(tokens=torch.tensor(4), ce=torch.tensor(2.0))
    >>> sums.add(tokens=torch.tensor(4), ce=torch.tensor(6.0))
    >>> sums.state()
    {'tokens': 8.0, 'ce': 8.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add to the sum of each name."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, accelerator: Accelerator, *only: str) -> dict[str, float]:
        """The sums over all ranks, by one collective, and of these names only if any are given; they start again."""
        names = sorted(name for name in self._sums if name in only or not only)
        if not names:
            return {}
        stacked = torch.stack([self._sums.pop(name) for name in names])
        total = accelerator.reduce(stacked.to(accelerator.device).float(), "sum")
        return dict(zip(names, total.tolist(), strict=True))

    def clear(self) -> None:
        """Forget the sums."""
        self._sums.clear()

    def state(self) -> dict[str, float]:
        """This rank's sums, for a checkpoint."""
        return {name: float(value) for name, value in self._sums.items()}

    def restore(self, state: dict[str, float], device: torch.device) -> None:
        """Continue from the `state` of a checkpoint."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.items()}


class TokenClock:
    """Tokens per second since the last reading, not counting pauses."""

    def __init__(self, tokens: int) -> None:
        self._pauses = 0  # those that are going on, one inside the other
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Start now, with `tokens` tokens already trained."""
        self._since, self._tokens = time.perf_counter(), tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block, such as an evaluation of several sets, each a pause within the pause."""
        self._pauses += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._since += time.perf_counter() - start

    def read(self, tokens: int) -> float:
        """Tokens per second since the last reading, with `tokens` trained by now; then restart."""
        since, before = self._since, self._tokens
        self.restart(tokens)
        return (tokens - before) / max(self._since - since, 1e-9)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the accelerator's allocator, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def training_flops_per_token(model: PreTrainedModel, length: int) -> float | None:
    """Floating-point operations that a training step needs per token, for MFU: 6 N + 12 L d T (PaLM, appendix B).

    N is the number of weights that a token is multiplied with: not the input embeddings, which are looked up, unless
    the LM head shares them; and of a mixture of experts only the experts that a token is sent to. L layers attend with
    width d over T = `length` tokens; where a configuration does not name L and d, that term is left out. The weights
    are counted, rather than derived from the configuration, so that every architecture can be.

    Returns:
        None for a mixture of experts whose configuration does not say how many experts a token is sent to.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes))
    >>> training_flops_per_token(model, length=3)  # 6 (256 + 96 + 24 + 80) + 12 * 8 * 3
    3024.0
    """
    config = model.config.get_text_config()
    looked_up, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = lm_head is not None and getattr(lm_head, "weight", None) is getattr(looked_up, "weight", 0)

    # 1. The weights, each once
    dense, experts = 0.0, 0
    for name, parameter in model.named_parameters():
        if parameter is getattr(looked_up, "weight", None) and not shared:
            continue
        if ".experts." in name:
            experts += _count_weights(parameter)
        else:
            dense += _count_weights(parameter)

    # 2. The share of the experts that a token is sent to
    if experts:
        used = _first_number(config, "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
        total = _first_number(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        if not used or not total:
            return None
        dense += experts * used / total

    # 3. Attention over the sequence
    layers = _first_number(config, "num_hidden_layers") or 0
    heads, head_dim = _first_number(config, "num_attention_heads"), _first_number(config, "head_dim")
    width = heads * head_dim if heads and head_dim else _first_number(config, "hidden_size") or 0
    return float(6 * dense + 12 * layers * width * length)


def _count_weights(parameter: nn.Parameter) -> int:
    """The elements of a parameter, also where ZeRO-3 has emptied it or bitsandbytes has packed it."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


def _first_number(config: object, *names: str) -> int | None:
    """The first of these settings that the configuration has as one number; some have a list, one for each layer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except (ValueError, RuntimeError):  # Gemma 4 raises for what differs from layer to layer
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
