"""Passes of a backbone over images: features of a split, augmented batches for a probe, fine-tuning.

Images are read by the loader's workers. One that cannot be read is left out, and the reason returned.

Legend: B images of a batch, C channels, S pixels a side, F features of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from matrix_llm.base.errors import ImageDataError, ProbeError
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.ssl.augment import Augment, AugmentConfig, EvalTransform, TwoViewCollator
from matrix_llm.ssl.data import EpochSampler, Images
from matrix_llm.ssl.modeling import feature_dim, pooled
from matrix_llm.ssl.probes import Features, cosine, linear_layer

__all__ = ["augmented_batches", "extract_features", "fine_tune", "labels_of"]


def labels_of(images: Images) -> Tensor:
    if images.labels is None:
        raise ProbeError(
            f"{images.name} has no labels, which an evaluation needs. Sort the images into a folder for each class."
        )
    return images.labels


Item = tuple[int, int, Image.Image | str]  # epoch, index, image or the reason why there is none


class _Readable(Dataset):
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


class _Upright:
    """The evaluation transform of each image, in the worker."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, list[str]]:
        kept = [(i, self.transform(image)) for _, i, image in items if not isinstance(image, str)]
        pixels = torch.stack([x for _, x in kept]) if kept else torch.empty(0)
        return (
            pixels,
            torch.tensor([i for i, _ in kept], dtype=torch.long),
            [x for *_, x in items if isinstance(x, str)],
        )


class _Cropped:
    """RandomResizedCrop of each image, in the worker; crops and uniforms for `Augment`."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.collate = TwoViewCollator(config, seed, views=1)

    def __call__(self, items: Sequence[Item]) -> tuple[dict[str, Any] | None, list[str]]:
        kept = [(epoch, i, image, None) for epoch, i, image in items if not isinstance(image, str)]
        return self.collate(kept) if kept else None, [x for *_, x in items if isinstance(x, str)]


def pooled_features(backbone: PreTrainedModel | None, pixels: Tensor, bf16: bool) -> Tensor:
    """(B, F) float32; the pixels themselves without a backbone."""
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
    """The backbone's pooled features of labelled images, in eval mode, on the CPU; of None, the pixels.

    Raises:
        ProbeError: the images have no labels, or none can be read, or the features are not finite.
    """
    labels = labels_of(images)
    loader = DataLoader(
        _Readable(images),
        batch_size,
        sampler=[(0, i) for i in range(len(images))],
        collate_fn=_Upright(transform),
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
        raise ProbeError(f"none of the {len(images)} images of {images.name} can be read. The first: {skipped[0]}")
    return Features(torch.cat(rows), labels[torch.cat(indices)], tuple(skipped))


def augmented_batches(
    images: Images,
    transform: EvalTransform,
    *,
    batch_size: int,
    seed: int,
    flip_prob: float,
    crop_scale_min: float = 0.08,
    device: str | torch.device = "cpu",
    workers: int = 0,
    skipped: dict[str, None] | None = None,  # filled with the reasons
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """epoch -> (B, C, S, S) crops, flipped with flip_prob and normalised as by `transform`, and (B,) labels; whole batches alone."""
    t, labels = transform, labels_of(images)
    config = AugmentConfig(
        image_size=t.image_size, channels=t.channels, crop_scale_min=crop_scale_min, flip_prob=flip_prob, image_mean=t.image_mean,
        image_std=t.image_std, jitter_prob=0.0, gray_prob=0.0, blur_prob=0.0, blur_prob2=0.0, solarize_prob2=0.0,
    )  # fmt: skip
    flipped = Augment(config)
    sampler = EpochSampler(len(images), seed)
    loader = DataLoader(
        _Readable(images), batch_size, sampler=sampler, collate_fn=_Cropped(config, seed), num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        sampler.set_epoch(epoch)
        for batch, missing in loader:
            if skipped is not None:
                skipped.update(dict.fromkeys(missing))
            if batch is not None:
                (pixels,) = flipped(batch["crops"].to(device), batch["draws"])
                yield pixels, labels[batch["indices"]].to(device)

    return batches


def fine_tune(
    backbone: PreTrainedModel,  # changed in place
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],  # epoch -> (B, C, S, S) images and (B,) labels
    *,
    classes: int,
    epochs: int,
    steps: int,
    backbone_learning_rate: float,
    head_learning_rate: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    bf16: bool = False,
) -> nn.Linear:
    """Trains backbone and a linear head together, by SGD with a learning rate each and the cosine schedule; returns the head.

    As in Barlow Twins and VICReg, batch normalisation is in train mode. `steps` is the number of batches of an epoch.
    """
    device = next(backbone.parameters()).device
    head = linear_layer(feature_dim(backbone), classes, seed).to(device)
    rates = (backbone_learning_rate, head_learning_rate)
    groups = [
        {"params": list(part.parameters()), "lr": rate} for part, rate in zip((backbone, head), rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)
    backbone.train()
    for epoch in range(epochs):
        for step, (pixels, y) in enumerate(batches(epoch)):
            if len(y) < 2:
                continue
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(epoch * steps + step, epochs * steps)
            optimizer.zero_grad()
            F.cross_entropy(head(pooled_features(backbone, pixels, bf16)), y).backward()
            optimizer.step()
    backbone.eval()
    return head.eval()
