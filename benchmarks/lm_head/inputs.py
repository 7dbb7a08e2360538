"""Shapes, and random inputs that are shaped like a trained model's.

Legend: N positions, H hidden width, V vocabulary size.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**32}  # of float32 logits at a time, wherever this package makes logits itself


class Shape(NamedTuple):
    n: int
    """Positions N."""
    h: int
    """Hidden width H."""
    v: int
    """Vocabulary size V."""
    dtype: str
    """Name of the dtype of hidden states and weight."""
    device: str
    """"cpu" or "cuda"."""

    @property
    def chunk(self) -> int:
        """Positions whose logits are made at a time; 1 to N."""
        return max(1, min(self.n, CHUNK_BYTES[self.device] // (4 * self.v)))


class Inputs(NamedTuple):
    hidden: Tensor  # (N, H), with a gradient
    weight: Tensor  # (V, H), with a gradient
    labels: Tensor  # (N,)


SHAPES = {
    "tiny": Shape(256, 128, 2048, "float32", "cpu"),
    "llemma-cpu": Shape(2048, 2048, 32016, "float32", "cpu"),
    "qwen-cpu": Shape(1024, 896, 151936, "float32", "cpu"),
    "llemma-gpu": Shape(8192, 4096, 32016, "bfloat16", "cuda"),
    "qwen-gpu": Shape(16384, 2048, 151936, "bfloat16", "cuda"),
}


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def make_inputs(shape: Shape, seed: int, mean_ce: float = 1.0) -> Inputs:
    """Inputs like those of a trained model whose predictions are calibrated.

    Vectors of the weight: singular values i^-0.5 over randomly rotated directions, a shared mean direction,
    log-normal norms. Hidden states: a mixture of seven of these vectors, drawn Zipf-like, and noise, without the
    shared direction, and turned a little towards the weak directions, which is what makes a trained head's target
    stand out. Labels are drawn from the prediction itself, so the mean cross-entropy is the mean entropy: many
    certain positions, a wide middle, and a few surprises.

    Args:
        mean_ce: the mean entropy, in nats, that the scale of the hidden states is chosen for.
    """
    n, h, v, dtype, device = shape
    g = torch.Generator(device).manual_seed(seed)
    normal, uniform = (functools.partial(f, generator=g, device=device) for f in (torch.randn, torch.rand))

    # 1. The weight.
    rotation = torch.linalg.qr(normal(h, h)).Q
    spectrum = torch.arange(1, h + 1, device=device) ** -0.5
    mean = unit(normal(h))
    weight = torch.empty(v, h, device=device)
    for vectors in weight.split(8192):
        direction = unit((normal(len(vectors), h) * spectrum) @ rotation.T) + 0.4 * mean
        vectors.copy_(unit(direction) * torch.exp(0.2 * normal(len(vectors), 1)))

    # 2. Hidden states.
    zipf = 1 / (torch.arange(v, device=device) + 2.7)
    tokens = torch.randperm(v, generator=g, device=device)
    hidden, closeness = 0.3 * unit(normal(n, h)), uniform(n, 1)
    for rank in range(7):
        strength = closeness * uniform(n, 1) if rank else 1.0
        hidden += strength * unit(weight[tokens[torch.multinomial(zipf, n, True, generator=g)]])
    hidden -= (hidden @ mean)[:, None] * mean
    hidden = unit(((hidden @ rotation) * spectrum**-0.25) @ rotation.T) * torch.exp(0.25 * normal(n, 1))

    # 3. One scale for all of them, by bisection on a sample.
    sample = hidden[:256] @ weight.T
    low, high = 1.0, 1000.0
    for _ in range(16):
        scale = math.sqrt(low * high)
        log_q = (scale * sample).log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1).mean().item()
        low, high = (scale, high) if entropy > mean_ce else (low, scale)
    del sample, log_q  # (256, V) each, which would count as memory of whatever is measured next
    hidden *= scale

    # 4. Labels, a chunk of logits at a time.
    labels = [
        torch.multinomial((chunk @ weight.T).softmax(-1), 1, generator=g)[:, 0] for chunk in hidden.split(shape.chunk)
    ]
    to = getattr(torch, dtype)
    return Inputs(hidden.to(to).requires_grad_(), weight.to(to).requires_grad_(), torch.cat(labels))
