"""RandomResizedCrop of each image, once for each view, with PIL in the loader's workers.

Legend: B images, C channels, S pixels a side, K uniforms for each image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from matrix_llm.ssl.images.draws import AREA, COLUMNS, RATIO, draw
from matrix_llm.ssl.images.settings import AugmentConfig

__all__ = ["TwoViewCollator"]


class TwoViewCollator:
    """Collate items of `TrainImages` into a batch for `Augment`.

    [(0, 5, <L 8x8>, None), (0, 2, <L 8x8>, None)]
        -> {"crops": uint8 (2, B, C, S, S), "draws": float32 (2, B, K), "indices": [5, 2],
            "labels": [9, 1], "skipped": []}

    The bicubic resize sees the crop alone, as in torchvision.

    Args:
        config: of the views.
        seed: of the uniforms.
        labels: of all images; None leaves "labels" out of the batch.
        views: 2, or 1 for the first view alone, which a supervised step needs.
    """

    def __init__(self, config: AugmentConfig, seed: int, labels: Tensor | None = None, *, views: int = 2) -> None:
        self.config, self.seed, self.labels, self.views = config, seed, labels, range(views)

    def __call__(self, items: Sequence[tuple[int, int, Image.Image, str | None]]) -> dict[str, Any]:
        epochs, indices, images, skipped = zip(*items, strict=True)
        size, channels = self.config.image_size, self.config.channels
        mode = "L" if channels == 1 else "RGB"
        widths, heights = np.array([image.size for image in images], dtype=np.int64).T
        draws = torch.stack([draw(self.seed, epochs, indices, view) for view in self.views])
        crops = torch.empty((len(self.views), len(items), channels, size, size), dtype=torch.uint8)
        for view in self.views:
            boxes = _crop_boxes(self.config, draws[view], widths, heights).tolist()
            out = crops[view].numpy()
            for place, (image, box) in enumerate(zip(images, boxes, strict=True)):
                crop = image.crop(box)
                crop = crop if crop.mode == mode else crop.convert(mode)
                pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))
                out[place] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
        rows = torch.tensor(indices)
        labels = {} if self.labels is None else {"labels": self.labels[rows]}
        return {
            "crops": crops,
            "draws": draws,
            "indices": rows,
            "skipped": [text for text in skipped if text],
            **labels,
        }


def _crop_boxes(
    config: AugmentConfig,
    draws: Tensor,  # (B, K)
    widths: np.ndarray,  # (B,)
    heights: np.ndarray,  # (B,)
) -> np.ndarray:
    """(B, 4) left, top, right, bottom: the first of ten random areas and ratios that fits the image, otherwise the
    centre.
    """
    u = draws.numpy().astype(np.float64)
    # 1. Ten sizes for each image; np.rint rounds half to even, as Python's round() in torchvision does.
    log_min, log_max = math.log(config.crop_ratio_min), math.log(config.crop_ratio_max)
    share = config.crop_scale_min + u[:, AREA] * (config.crop_scale_max - config.crop_scale_min)
    area = (widths * heights)[:, None] * share
    ratio = np.exp(log_min + u[:, RATIO] * (log_max - log_min))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    found, first = fits.any(1), fits.argmax(1)[:, None]
    # 2. Where none fits (a tiny image, or one much longer than wide): the largest centred crop of an allowed ratio.
    center_w = np.clip(np.rint(heights * config.crop_ratio_max), 1, widths)
    center_h = np.clip(np.rint(widths / config.crop_ratio_min), 1, heights)
    w = np.where(found, np.take_along_axis(w, first, 1)[:, 0], center_w).astype(np.int64)
    h = np.where(found, np.take_along_axis(h, first, 1)[:, 0], center_h).astype(np.int64)
    # 3. The place; astype rounds down.
    left = np.where(found, u[:, COLUMNS["left"]] * (widths - w + 1), (widths - w) // 2).astype(np.int64)
    top = np.where(found, u[:, COLUMNS["top"]] * (heights - h + 1), (heights - h) // 2).astype(np.int64)
    return np.stack([left, top, left + w, top + h], axis=1)
