"""Images that need no download: scikit-learn's digits, and shapes drawn on the fly."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw

from matrix_llm.base.errors import ImageDataError
from matrix_llm.ssl.images.dataset import Images, check_labels, number_ids

__all__ = ["check_split", "load_digits", "load_synthetic", "read_array"]


def read_array(pixels: np.ndarray, i: int) -> Image.Image:
    return Image.fromarray(pixels[i])


def check_split(split: str, source: str) -> None:
    """Raise an ImageDataError unless the split is train or test."""
    if split not in ("train", "test"):
        raise ImageDataError(f"{source!r} has the splits train and test, not {split!r}. Give one of these.")


def load_digits(split: str) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8 x 8: 1,297 to train on and 500 to test, classes in equal shares."""
    check_split(split, "digits")
    try:
        from sklearn.datasets import load_digits as read_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImageDataError(
            "the digits come with scikit-learn, which is not installed: pip install 'matrix-llm[ssl]'."
        ) from None
    pixels, labels = read_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    rows = np.sort(parts[0] if split == "train" else parts[1])
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    names = list("0123456789")
    whole = Images("digits", number_ids(len(labels)), partial(read_array, images), check_labels(labels), names)
    return whole.subset(rows)


SHAPES: dict[str, list[tuple[float, float]]] = {  # corners, in a square from -1 to 1
    "disc": [(math.cos(k * math.pi / 16), math.sin(k * math.pi / 16)) for k in range(32)],
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "arrow": [(-1, -0.4), (0, -0.4), (0, -1), (1, 0), (0, 1), (0, 0.4), (-1, 0.4)],
    "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
}
SYNTHETIC = {"train": 5000, "test": 1000}
SIDE = 64  # pixels


def load_synthetic(split: str) -> Images:
    """Coloured shapes of 10 classes: five shapes, filled or as an outline."""
    check_split(split, "synthetic")
    ids = number_ids(SYNTHETIC[split])
    names = [f"{how} {shape}" for how in ("filled", "outlined") for shape in SHAPES]
    return Images("synthetic", ids, partial(_draw_shape, split), torch.arange(len(ids)) % 10, names)


def _draw_shape(split: str, i: int) -> Image.Image:
    """Image i of a split, with random colours, place and size that (split, i) alone decide."""
    rng = np.random.default_rng([tuple(SYNTHETIC).index(split), i])
    outlined, shape = divmod(i % 10, len(SHAPES))
    back, front = (tuple(rng.integers(*limits, 3).tolist()) for limits in ((0, 96), (128, 256)))
    radius = SIDE * rng.uniform(0.2, 0.32)
    x, y = rng.uniform(radius + 1, SIDE - radius - 1, 2)
    corners = [(x + radius * dx, y + radius * dy) for dx, dy in list(SHAPES.values())[shape]]
    image = Image.new("RGB", (SIDE, SIDE), back)
    ImageDraw.Draw(image).polygon(corners, fill=None if outlined else front, outline=front, width=max(SIDE // 24, 1))
    return image
