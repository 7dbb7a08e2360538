"""The target network: a moving average of the online one, updated after each optimizer step."""

from __future__ import annotations

import math

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matrix_llm.ssl.models.ssl_model import SSLModel

__all__ = ["EmaCallback", "ema_momentum"]


def ema_momentum(step: int, steps: int, start: float, schedule: str) -> float:
    """1 - (1 - start) (1 + cos(pi step / steps)) / 2, BYOL's schedule from `start` to 1; or `start` throughout.

    >>> [ema_momentum(step, 100, 0.996, "cosine") for step in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """
    if schedule == "constant":
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2


class EmaCallback(TrainerCallback):
    """Update the target network after each optimizer step, before a checkpoint is written.

    Args:
        model: whose target network moves.
        start: the momentum at step 0, from 0 to 1.
        schedule: "cosine" or "constant".
    """

    def __init__(self, model: SSLModel, start: float, schedule: str) -> None:
        self.model, self.start, self.schedule = model, start, schedule
        self.momentum: float | None = None  # of the last step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.momentum = ema_momentum(state.global_step, state.max_steps, self.start, self.schedule)
        self.model.update_target(self.momentum)
