"""The random numbers of an image's augmentation: a function of (seed, epoch, index, view) and nothing else.

Neither the number of ranks or workers nor a resume changes them, because no generator has a state that could be lost.

Legend: B images, K uniforms for each image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["AREA", "ATTEMPTS", "COLUMNS", "DRAWS", "RATIO", "draw"]

ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to the centre
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's step

# Which of an image's K uniforms decides what. Add new ones at the end, or every run's augmentation changes.
AREA, RATIO = slice(0, ATTEMPTS), slice(ATTEMPTS, 2 * ATTEMPTS)
NAMES = "top left flip rotate jitter order brightness contrast saturation hue gray blur sigma solarize"
COLUMNS = {name: i for i, name in enumerate(NAMES.split(), start=2 * ATTEMPTS)}
DRAWS = 2 * ATTEMPTS + len(COLUMNS)  # K


def draw(
    seed: int,
    epoch: int | Sequence[int],
    index: Tensor | Sequence[int],  # (B,)
    view: int,
) -> Tensor:
    """(B, K) float32 uniforms in [0, 1), multiples of 2^-24: splitmix64 keyed by the four arguments.

    >>> torch.equal(draw(0, 3, [7, 8], 1)[1], draw(0, 3, [8], 1)[0])
    True
    """
    indices = np.asarray(index, dtype=np.int64).astype(np.uint64)
    key = np.full(indices.shape, int(seed) % 2**64, dtype=np.uint64)
    for part in (np.asarray(epoch, dtype=np.int64).astype(np.uint64), indices, np.uint64(view)):
        key = _mix(key + GOLDEN * (part + np.ones_like(indices)))
    bits = _mix(key[:, None] + GOLDEN * np.arange(1, DRAWS + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the result depends on every bit of the uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
