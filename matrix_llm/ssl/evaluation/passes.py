"""Passes of a backbone over images: the features of a split, and augmented batches to train a classifier on.

Images are read by the loader's workers. One that cannot be read is left out, and the reason is kept.

Legend: B images of a batch, C channels, S pixels a side, F features of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from matrix_llm.base.errors import ImageDataError, ProbeError
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.ssl.evaluation.features import Features
from matrix_llm.ssl.images.augment import Augment
from matrix_llm.ssl.images.crops import TwoViewCollator
from matrix_llm.ssl.images.dataset import EpochSampler, Images
from matrix_llm.ssl.images.eval_transform import EvalTransform
from matrix_llm.ssl.images.settings import AugmentConfig
from matrix_llm.ssl.models.backbones import pooled

__all__ = ["AugmentedBatches", "extract_features", "labels_of", "pooled_features"]

Item = tuple[int, int, Image.Image | str]  # epoch, index, and the image or the reason why there is none


def labels_of(images: Images) -> Tensor:
    """The labels, or a ProbeError where the images have none."""
    if images.labels is None:
        raise ProbeError(
            f"{images.name} has no labels, which an evaluation needs. Sort the images into a folder for each class."
        )
    return images.labels


def pooled_features(
    backbone: PreTrainedModel | None,
    pixels: Tensor,  # (B, C, S, S)
    bf16: bool,
) -> Tensor:
    """(B, F) float32; without a backbone, the pixels themselves."""
    if backbone is None:
        return pixels.flatten(1)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        return pooled(backbone, pixels).float()


def extract_features(
    backbone: PreTrainedModel | None,
    images: Images,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int = 0,
    bf16: bool = False,
) -> Features:
    """The backbone's pooled features of labelled images, computed in eval mode, on the CPU; without a backbone, the
    pixels.

    Raises:
        ProbeError: the images have no labels, none can be read, or the features are not finite.
    """
    labels = labels_of(images)
    loader = DataLoader(
        _ReadableImages(images),
        batch_size,
        sampler=[(0, i) for i in range(len(images))],
        collate_fn=_TransformCollator(transform),
        num_workers=workers,
    )
    rows, indices, skipped = [], [], []
    if backbone is not None:
        backbone.to(device)  # type: ignore[arg-type]
    with torch.no_grad(), evaluation_mode(backbone if backbone is not None else nn.Identity()):
        for pixels, index, missing in loader:
            skipped += missing
            if len(index):
                rows.append(pooled_features(backbone, pixels.to(device), bf16).cpu())
                indices.append(index)
    if not rows:
        raise ProbeError(
            f"none of the {len(images)} images of {images.name} can be read. The first: {skipped[0]} Repair the data."
        )
    return Features(torch.cat(rows), labels[torch.cat(indices)], tuple(skipped))


class AugmentedBatches:
    """batches(epoch) yields (B, C, S, S) random crops and (B,) labels, complete batches only.

    Args:
        transform: gives the crops their size and normalisation.
        flip_prob: probability of a horizontal flip, 0 to 1.
        crop_scale_min: smallest share of an image that is cropped, above 0 and at most 1.

    Attributes:
        skipped: the reason for each image that could not be read so far.
    """

    def __init__(
        self,
        images: Images,
        transform: EvalTransform,
        *,
        batch_size: int,
        seed: int,
        flip_prob: float,
        crop_scale_min: float = 0.08,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ) -> None:
        t = transform
        config = AugmentConfig(
            image_size=t.image_size, channels=t.channels, image_mean=t.image_mean, image_std=t.image_std,
            crop_scale_min=crop_scale_min, flip_prob=flip_prob,
            jitter_prob=0.0, gray_prob=0.0, blur_prob=0.0, blur_prob2=0.0, solarize_prob2=0.0,
        )  # fmt: skip
        self.skipped: dict[str, None] = {}  # a set in order of arrival: an image is met once an epoch
        self._labels, self._device = labels_of(images), device
        self._augment = Augment(config)
        self._sampler = EpochSampler(len(images), seed)
        self._loader = DataLoader(
            _ReadableImages(images),
            batch_size,
            sampler=self._sampler,
            collate_fn=_CropCollator(config, seed),
            num_workers=workers,
            drop_last=True,
            persistent_workers=workers > 0,
        )

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._sampler.set_epoch(epoch)
        for batch, missing in self._loader:
            self.skipped.update(dict.fromkeys(missing))
            if batch is not None:
                (pixels,) = self._augment(batch["crops"].to(self._device), batch["draws"])
                yield pixels, self._labels[batch["indices"]].to(self._device)


# --- in the loader's workers ------------------------------------------------------------------------------------------


class _ReadableImages(Dataset):
    """(epoch, index) -> (epoch, index, image), or the reason why there is none."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        try:
            return *key, self.images.read(key[1])
        except ImageDataError as error:
            return *key, str(error)


class _TransformCollator:
    """Pixels (B, C, S, S) under the evaluation transform, the images' indices, and the reasons for those left out."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, list[str]]:
        read = [(i, self.transform(image)) for _, i, image in items if not isinstance(image, str)]
        pixels = torch.stack([x for _, x in read]) if read else torch.empty(0)
        indices = torch.tensor([i for i, _ in read], dtype=torch.long)
        return pixels, indices, [x for *_, x in items if isinstance(x, str)]


class _CropCollator:
    """Random crops and uniforms for `Augment`, or None where no image can be read, and the reasons for those left
    out.
    """

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.collate = TwoViewCollator(config, seed, views=1)

    def __call__(self, items: Sequence[Item]) -> tuple[dict[str, Any] | None, list[str]]:
        read = [(epoch, i, image, None) for epoch, i, image in items if not isinstance(image, str)]
        return self.collate(read) if read else None, [x for *_, x in items if isinstance(x, str)]
