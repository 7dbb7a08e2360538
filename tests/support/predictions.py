"""Predictions of a wanted entropy."""

import torch
from torch import Tensor


def scale_to_entropy(logits: Tensor, entropy: float) -> Tensor:
    """The logits (N, V) times the factor that gives their softmax this mean entropy, in nats."""
    low, high = 0.0, 1000.0
    for _ in range(50):
        scale = (low + high) / 2
        found = torch.distributions.Categorical(logits=scale * logits).entropy().mean()
        low, high = (scale, high) if found > entropy else (low, scale)
    return scale * logits
