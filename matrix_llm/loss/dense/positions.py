"""What the dense losses read: the counted positions, with everything that may be asked of them.

Legend: N positions that count, V vocabulary, D embedding width, M number tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """The counted positions, in float32 or float64. What a loss does not need may be None."""

    logits: Tensor  # (N, V), z
    labels: Tensor  # (N,) int64, y
    embeddings: Tensor | None = None  # (V, D), constants
    teacher_logits: Tensor | None = None  # (N, V), constants
    number_ids: Tensor | None = None  # (M,) int64
    number_values: Tensor | None = None  # (M,)

    def log_probabilities(self) -> Tensor:
        """log q, (N, V)."""
        return torch.log_softmax(self.logits, dim=-1)

    def at_labels(self, of_tokens: Tensor) -> Tensor:
        """The label's entry of each row: (N, V) -> (N,)."""
        return of_tokens.gather(1, self.labels.unsqueeze(1)).squeeze(1)

    def cross_entropy(self) -> Tensor:
        """CE = -log q_y, (N,)."""
        return -self.at_labels(self.log_probabilities())
