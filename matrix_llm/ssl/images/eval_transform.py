"""The transform of images that are not augmented, and the file that describes it to `transformers`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from matrix_llm.base.errors import ImageDataError, RecipeError
from matrix_llm.base.files import write_text
from matrix_llm.ssl.images.settings import IMAGENET_MEAN, IMAGENET_STD, check_pixels

__all__ = ["PROCESSOR_FILE", "EvalTransform"]

PROCESSOR_FILE = "preprocessor_config.json"


@dataclass
class EvalTransform:
    """Resize the shorter side to image_size / crop_pct (bicubic), cut out the centre, and normalise.

    This is what `transformers`' ConvNextImageProcessor does with the saved file. At 384 pixels and above that
    processor resizes to a square and cuts nothing off, and so does this class.

    >>> EvalTransform(image_size=8, channels=1)(Image.new("L", (20, 10))).shape
    torch.Size([1, 8, 8])
    """

    image_size: int = 224
    """Pixels a side, at least 4."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    crop_pct: float | None = None
    """Share of the shorter side that is kept, above 0 and at most 1; None is 0.875, or 1.0 below 64 pixels."""
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted from pixels in 0 to 1, one number for each channel."""
    image_std: tuple[float, ...] = IMAGENET_STD
    """Divides pixels, one number above 0 for each channel."""

    def __post_init__(self) -> None:
        check_pixels(self)
        if self.crop_pct is None:
            self.crop_pct = 1.0 if self.image_size < 64 else 0.875  # the border is a large part of a small image
        if not 0 < self.crop_pct <= 1:
            raise RecipeError(
                f"crop_pct={self.crop_pct} must be the share of the shorter side that is kept, above 0 and at most 1."
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """(C, S, S) float32."""
        assert self.crop_pct is not None  # __post_init__
        mode, size = "L" if self.channels == 1 else "RGB", self.image_size
        image = image if image.mode == mode else image.convert(mode)
        width, height = size, size
        if size < 384:
            short, sides = int(size / self.crop_pct), image.size
            long = int(short * max(sides) / min(sides))
            width, height = (short, long) if sides[0] <= sides[1] else (long, short)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        array = np.array(image, dtype=np.float32)
        pixels = torch.from_numpy(array).view(size, size, self.channels).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write preprocessor_config.json, which `transformers.AutoImageProcessor` reads."""
        content = {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": self.image_size},
            "crop_pct": self.crop_pct,
            "do_resize": True,
            "resample": int(Image.Resampling.BICUBIC),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        write_text(Path(folder) / PROCESSOR_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EvalTransform:
        """Read what `save` wrote.

        Raises:
            ImageDataError: no such file, or one that something else wrote.
        """
        path = Path(folder) / PROCESSOR_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            mean, std = tuple(content["image_mean"]), tuple(content["image_std"])
            return cls(content["size"]["shortest_edge"], len(mean), content["crop_pct"], mean, std)
        except FileNotFoundError:
            raise ImageDataError(
                f"{path} does not exist, so how the model's images were prepared is unknown. Give a finished run's "
                "folder."
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise ImageDataError(
                f"{path} is not a file that EvalTransform wrote ({type(error).__name__}: {error}). "
                "Give a finished run's folder."
            ) from None
