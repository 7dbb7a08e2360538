"""The logging window: sums over micro-batches, and the clock of training, from one log to the next."""

from __future__ import annotations

import resource
import time

import torch
from accelerate import Accelerator
from torch import Tensor


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

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums over all ranks, by one collective; the window is empty afterwards."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name] for name in names])
        total = accelerator.reduce(stacked.to(accelerator.device).float(), "sum")
        self._sums.clear()
        return dict(zip(names, total.tolist(), strict=True))

    def state(self) -> dict[str, float]:
        """This rank's sums, for a checkpoint."""
        return {name: float(value) for name, value in self._sums.items()}

    def restore(self, state: dict[str, float], device: torch.device) -> None:
        """Continue from the `state` of a checkpoint."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.items()}


class TokenClock:
    """Tokens per second since the last reading, not counting excluded time."""

    def __init__(self, tokens: int) -> None:
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Start now, with `tokens` tokens already trained."""
        self._since, self._tokens = time.perf_counter(), tokens

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on training, such as an evaluation."""
        self._since += seconds

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
