"""`AugmentConfig`: the distribution of the two views, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from matrix_llm.base.errors import RecipeError

__all__ = ["AugmentConfig", "check_pixels"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # their means over the channels


@dataclass(frozen=True)
class AugmentConfig:
    """The distribution of the two views; the defaults are those of the ImageNet runs.

    Raises:
        RecipeError: a value that cannot work.
    """

    image_size: int = 224
    """Pixels a side of a view, at least 4."""
    channels: int = 3
    """1 (grey) or 3 (RGB); for grey images, saturation, hue and gray_prob do nothing."""
    crop_scale_min: float = 0.2
    """Smallest share of the image's area that a crop takes, above 0 and at most crop_scale_max."""
    crop_scale_max: float = 1.0
    """Largest share of the image's area that a crop takes, at most 1."""
    crop_ratio_min: float = 3 / 4
    """Smallest width / height of a crop before it is resized to a square, above 0 and at most crop_ratio_max."""
    crop_ratio_max: float = 4 / 3
    """Largest width / height of a crop."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip, 0 to 1."""
    brightness: float = 0.4
    """Strength, at least 0: the factor is between max(0, 1 - brightness) and 1 + brightness."""
    contrast: float = 0.4
    """Strength, at least 0, with factors as for brightness."""
    saturation: float = 0.2
    """Strength, at least 0, with factors as for brightness."""
    hue: float = 0.1
    """Strength, 0 to 0.5: the hue moves by -hue to hue of the colour circle."""
    jitter_prob: float = 0.8
    """Probability of the four changes of colour above, in a random order, 0 to 1."""
    gray_prob: float = 0.2
    """Probability that a view turns grey, 0 to 1."""
    blur_prob: float = 1.0
    """Probability of a Gaussian blur of the first view, 0 to 1."""
    blur_prob2: float = 0.1
    """Probability of a Gaussian blur of the second view, 0 to 1."""
    blur_sigma_min: float = 0.1
    """Smallest deviation of the blur in pixels, above 0 and at most blur_sigma_max; the kernel is a tenth of the
    image wide.
    """
    blur_sigma_max: float = 2.0
    """Largest deviation of the blur in pixels."""
    solarize_prob: float = 0.0
    """Probability that the first view's bright pixels are inverted, 0 to 1."""
    solarize_prob2: float = 0.2
    """Probability that the second view's bright pixels are inverted, 0 to 1."""
    rotate_degrees: float = 0.0
    """Largest angle of rotation to either side, at least 0; the corners become black."""
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted from pixels in 0 to 1, one number for each channel; the default becomes its mean for channels=1."""
    image_std: tuple[float, ...] = IMAGENET_STD
    """Divides pixels, one number above 0 for each channel; the default becomes its mean for channels=1."""

    def __post_init__(self) -> None:
        # 1. Each field alone
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers):
                raise RecipeError(f"{f.name}={value!r} must hold finite numbers only.")
            if "prob" in f.name and not 0 <= value <= 1:
                raise RecipeError(f"{f.name}={value} must be a probability, from 0 to 1.")
        for name in ("brightness", "contrast", "saturation", "hue", "rotate_degrees"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name}={getattr(self, name)} must be at least 0. Set it to 0 to switch it off.")
        for name, limit, what in (("crop_scale_max", 1, "the whole image"), ("hue", 0.5, "the whole colour circle")):
            if getattr(self, name) > limit:
                raise RecipeError(f"{name}={getattr(self, name)} must be at most {limit}, which is {what}.")
        # 2. Lower and upper limits
        for low, high in (
            ("crop_scale_min", "crop_scale_max"),
            ("crop_ratio_min", "crop_ratio_max"),
            ("blur_sigma_min", "blur_sigma_max"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise RecipeError(
                    f"{low}={getattr(self, low)} and {high}={getattr(self, high)} must satisfy 0 < {low} <= {high}."
                )
        # 3. Size, mean and deviation
        check_pixels(self)


def check_pixels(config: Any) -> None:
    """Check size, channels, mean and deviation of an `AugmentConfig` or `EvalTransform`, and store the last two as
    tuples.

    With one channel, ImageNet's mean and deviation are replaced by their grey versions.

    Raises:
        RecipeError: a value that cannot work.
    """
    if config.channels not in (1, 3):
        raise RecipeError(f"channels={config.channels} must be 1 (grey) or 3 (RGB).")
    if config.image_size != int(config.image_size) or config.image_size < 4:
        raise RecipeError(f"image_size={config.image_size} must be a whole number of pixels, at least 4.")
    for name, colour, grey in (("image_mean", IMAGENET_MEAN, GREY_MEAN), ("image_std", IMAGENET_STD, GREY_STD)):
        value = tuple(float(v) for v in getattr(config, name))
        value = grey if config.channels == 1 and value == colour else value
        if len(value) != config.channels:
            raise RecipeError(
                f"{name}={list(value)} has {len(value)} number(s), but channels={config.channels}. Give one for each "
                "channel."
            )
        object.__setattr__(config, name, value)  # AugmentConfig is frozen
    if min(config.image_std) <= 0:
        raise RecipeError(f"image_std={list(config.image_std)}, but pixels are divided by it. Give positive numbers.")
