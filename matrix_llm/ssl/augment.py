"""Two random views of each image: crops with PIL in the loader's workers, everything else batched on the device.

    draw(seed, epoch, index, view)   uniforms, a function of these four alone: no ranks, workers or resumes in it
    TwoViewCollator                  RandomResizedCrop of each image, twice, as uint8
    Augment                          flip, rotation, colour jitter, grey, blur, solarise and normalisation, from the uniforms
    EvalTransform                    what an image goes through when it is no longer augmented

The operations are those of torchvision's tensors (RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur, RandomSolarize),
written out because torchvision is no dependency here, and because one batch holds rows with parameters of their own.

Legend: B images, C channels (1 or 3), S pixels a side, R rows (2 B images of both views, or those that drew an operation), K uniforms.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from matrix_llm.base.files import write_text
from matrix_llm.information import outside_autocast

__all__ = ["Augment", "AugmentConfig", "EvalTransform", "TwoViewCollator", "draw"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # their means over the channels
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, which sum to 0.9999
ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to the centre
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's step
PROCESSOR_FILE = "preprocessor_config.json"

# Which of a row's K uniforms decides what. New ones go to the end, or every run's augmentation changes.
AREA, RATIO = slice(0, ATTEMPTS), slice(ATTEMPTS, 2 * ATTEMPTS)
NAMES = "top left flip rotate jitter order brightness contrast saturation hue gray blur sigma solarize"
COLUMNS = {name: i for i, name in enumerate(NAMES.split(), start=2 * ATTEMPTS)}
DRAWS = 2 * ATTEMPTS + len(COLUMNS)  # K

JITTER = ("brightness", "contrast", "saturation", "hue")
ORDERS = tuple(itertools.permutations(range(len(JITTER))))  # 24


@dataclass(frozen=True)
class AugmentConfig:
    """The distribution of the two views; the defaults are those of the ImageNet runs. A value that cannot work is a ValueError."""

    image_size: int = 224
    channels: int = 3  # 1 for grey images, where saturation, hue and gray_prob do nothing
    crop_scale_min: float = 0.2  # smallest share of the image's area that a crop takes
    crop_scale_max: float = 1.0
    crop_ratio_min: float = 3 / 4  # smallest width / height of a crop, before it is resized to a square
    crop_ratio_max: float = 4 / 3
    flip_prob: float = 0.5
    brightness: float = 0.4  # factors between max(0, 1 - brightness) and 1 + brightness; so too contrast and saturation
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shifts between -hue and hue of the colour circle; 0.5 at most
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 1.0  # of the first view
    blur_prob2: float = 0.1  # of the second view
    blur_sigma_min: float = 0.1  # in pixels; the kernel is a tenth of the image wide
    blur_sigma_max: float = 2.0
    solarize_prob: float = 0.0
    solarize_prob2: float = 0.2
    rotate_degrees: float = 0.0  # angles between -rotate_degrees and rotate_degrees, black where nothing was
    image_mean: tuple[float, ...] = IMAGENET_MEAN  # left alone with channels=1, ImageNet's mean over the channels
    image_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers):
                raise ValueError(f"{f.name}={value!r} holds something that is no finite number.")
            if "prob" in f.name and not 0 <= value <= 1:
                raise ValueError(f"{f.name}={value}, but a probability is between 0 and 1.")
        for name in ("brightness", "contrast", "saturation", "hue", "rotate_degrees"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}, but a strength is not negative. 0 switches it off.")
        for low, high in (
            ("crop_scale_min", "crop_scale_max"),
            ("crop_ratio_min", "crop_ratio_max"),
            ("blur_sigma_min", "blur_sigma_max"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} and {high}={getattr(self, high)}, but they need 0 < {low} <= {high}."
                )
        for name, limit, what in (("crop_scale_max", 1, "the whole image"), ("hue", 0.5, "the whole colour circle")):
            if getattr(self, name) > limit:
                raise ValueError(f"{name}={getattr(self, name)}, but {limit} is already {what}. Give {limit} or less.")
        _check_pixels(self)


def _check_pixels(config: AugmentConfig | EvalTransform) -> None:
    """The size, and one mean and std a channel, as tuples; ImageNet's become grey where there is one channel."""
    if config.channels not in (1, 3):
        raise ValueError(f"channels={config.channels}, but images are grey (1) or RGB (3).")
    if config.image_size != int(config.image_size) or config.image_size < 4:
        raise ValueError(f"image_size={config.image_size}, but an image has 4 pixels a side or more.")
    for name, colour, grey in (("image_mean", IMAGENET_MEAN, GREY_MEAN), ("image_std", IMAGENET_STD, GREY_STD)):
        value = tuple(float(v) for v in getattr(config, name))
        value = grey if config.channels == 1 and value == colour else value
        if len(value) != config.channels:
            raise ValueError(
                f"{name}={list(value)} has {len(value)} number(s), but channels={config.channels}. Give one a channel."
            )
        object.__setattr__(config, name, value)  # the dataclass is frozen
    if min(config.image_std) <= 0:
        raise ValueError(f"image_std={list(config.image_std)}, but pixels are divided by it. Give positive numbers.")


# ---------------------------------------------------------------------------------------------------------------- the uniforms


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of a uint64 depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(
    seed: int,
    epoch: int | Sequence[int],
    index: Tensor | Sequence[int],  # (B,)
    view: int,
) -> Tensor:
    """(B, K) float32 uniforms in [0, 1), multiples of 2^-24: splitmix64 keyed by the four arguments, and by nothing else.

    >>> torch.equal(draw(0, 3, [7, 8], 1)[1], draw(0, 3, [8], 1)[0])
    True
    """
    rows = np.asarray(index, dtype=np.int64).astype(np.uint64)
    key = np.full(rows.shape, int(seed) % 2**64, dtype=np.uint64)
    for part in (np.asarray(epoch, dtype=np.int64).astype(np.uint64), rows, np.uint64(view)):
        key = _mix(key + GOLDEN * (part + np.ones_like(rows)))
    bits = _mix(key[:, None] + GOLDEN * np.arange(1, DRAWS + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


# ------------------------------------------------------------------------------------------------------- crops, in the workers


def _crop_boxes(config: AugmentConfig, draws: Tensor, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """(R, 4) left, top, right, bottom from (R, K), (R,) and (R,): the first of ten areas and ratios that fit, else the centre."""
    u = draws.numpy().astype(np.float64)
    log_min, log_max = math.log(config.crop_ratio_min), math.log(config.crop_ratio_max)
    area = (widths * heights)[:, None] * (
        config.crop_scale_min + u[:, AREA] * (config.crop_scale_max - config.crop_scale_min)
    )
    ratio = np.exp(log_min + u[:, RATIO] * (log_max - log_min))
    w, h = (
        np.rint(np.sqrt(area * ratio)).astype(np.int64),
        np.rint(np.sqrt(area / ratio)).astype(np.int64),
    )  # half to even, as round()
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    found, first = fits.any(1), fits.argmax(1)[:, None]
    # The centre, where none fits (an image of few pixels, or much longer than wide): the largest crop of an allowed ratio.
    center_w = np.clip(np.rint(heights * config.crop_ratio_max), 1, widths)
    center_h = np.clip(np.rint(widths / config.crop_ratio_min), 1, heights)
    w = np.where(found, np.take_along_axis(w, first, 1)[:, 0], center_w).astype(np.int64)
    h = np.where(found, np.take_along_axis(h, first, 1)[:, 0], center_h).astype(np.int64)
    left = np.where(found, u[:, COLUMNS["left"]] * (widths - w + 1), (widths - w) // 2).astype(np.int64)  # rounds down
    top = np.where(found, u[:, COLUMNS["top"]] * (heights - h + 1), (heights - h) // 2).astype(np.int64)
    return np.stack([left, top, left + w, top + h], axis=1)


class TwoViewCollator:
    """From items of `TrainImages` to a batch for `Augment`.

    [(0, 5, <L 8x8>, None), (0, 2, <L 8x8>, None)]
        -> {"crops": uint8 (2, B, C, S, S), "draws": float32 (2, B, K), "indices": [5, 2], "labels": [9, 1], "skipped": []}

    `labels` is there where the images have labels; views=1 makes the first view alone, as a supervised step needs it. The bicubic
    resize sees the crop alone, as in torchvision.
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
            for row, (image, box) in enumerate(zip(images, boxes, strict=True)):
                crop = image.crop(box)
                crop = crop if crop.mode == mode else crop.convert(mode)
                pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))
                out[row] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
        rows = torch.tensor(indices)
        labels = {} if self.labels is None else {"labels": self.labels[rows]}
        return {
            "crops": crops,
            "draws": draws,
            "indices": rows,
            "skipped": [text for text in skipped if text],
            **labels,
        }


# ------------------------------------------------------------------------------------------------------ the rest, on the device


def _grey(x: Tensor) -> Tensor:
    """(R, C, S, S) to (R, 1, S, S)."""
    if x.shape[1] == 1:
        return x
    r, g, b = GREY_WEIGHTS
    return (r * x[:, :1]).add_(x[:, 1:2], alpha=g).add_(x[:, 2:], alpha=b)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """(R, 3, S, S) turned by (R,) colour circles: to HSV, h + shift, and back, where channel n = 5, 3, 1 is

    v - chroma clip(min(k, 4 - k), 0, 1) with k = (n + 6 h) mod 6.
    """
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    r, g, b = x.unbind(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        r == value, (g - b) / divisor, torch.where(g == value, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    )
    offset = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (sixths[:, None] + (offset + 6 * shift.view(-1, 1, 1, 1))).remainder_(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


@outside_autocast
def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """(R, C, S, S) under Gaussians of (R,) pixels, mirrored at the border; the kernel is a tenth of S wide, odd, 3 at least."""
    rows, channels, size, _ = x.shape
    half = max(size // 10 // 2, 1)
    taps = torch.arange(-half, half + 1, dtype=torch.float32, device=x.device)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None]).square(), dim=1)  # exp(...) divided by its sum
    kernel = kernel.repeat_interleave(channels, 0)  # (R C, taps)
    x = F.pad(x, (half, half, half, half), mode="reflect").view(1, rows * channels, size + 2 * half, size + 2 * half)
    x = F.conv2d(x, kernel[:, None, None, :], groups=rows * channels)
    return F.conv2d(x, kernel[:, None, :, None], groups=rows * channels).view(rows, channels, size, size)


@outside_autocast
def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """(R, C, S, S) turned about its centre by (R,) degrees, counter-clockwise."""
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    zero = torch.zeros_like(cos)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)  # from a pixel to where it came from
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Augment:
    """The two normalised views of a batch, from its crops and its uniforms.

    Leave `draws` on the CPU: which rows an operation touches is decided where they lie, and on a GPU that waits for the queue.

    >>> config = AugmentConfig(image_size=8, channels=1)
    >>> crops, draws = torch.zeros(2, 5, 1, 8, 8, dtype=torch.uint8), torch.stack([draw(0, 0, range(5), view) for view in (0, 1)])
    >>> view1, view2 = Augment(config)(crops, draws)
    >>> view2.shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        strengths = {"brightness": config.brightness, "contrast": config.contrast}
        if config.channels == 3:
            strengths |= {"saturation": config.saturation, "hue": config.hue}
        self._jitter = {name: strength for name, strength in strengths.items() if strength > 0}
        active = [JITTER.index(name) for name in self._jitter]
        self._orders = torch.tensor(
            [[op for op in order if op in active] for order in ORDERS]
        )  # (24, active operations)

    @torch.no_grad()
    def __call__(
        self,
        crops: Tensor,  # (2, B, C, S, S) uint8; or (1, ...), the first view alone
        draws: Tensor,  # (2, B, K)
    ) -> tuple[Tensor, ...]:
        """A (B, C, S, S) float32 tensor for each view, on the device of `crops`. Another shape or type is a ValueError."""
        c = self.config
        size = (c.channels, c.image_size, c.image_size)
        if crops.dtype != torch.uint8 or crops.ndim != 5 or crops.shape[0] not in (1, 2) or crops.shape[2:] != size:
            raise ValueError(
                f"crops is {tuple(crops.shape)} {crops.dtype}, not (2, B, {', '.join(map(str, size))}) uint8."
            )
        if draws.shape != (*crops.shape[:2], DRAWS):
            raise ValueError(f"draws is {tuple(draws.shape)}, but these crops come with {(*crops.shape[:2], DRAWS)}.")
        x = crops.flatten(0, 1).float().div_(255)  # (R, C, S, S), R = 2 B
        u = draws.flatten(0, 1)
        second = torch.arange(len(u), device=u.device) >= crops.shape[1]

        if c.rotate_degrees:
            x = _rotate(x, ((2 * u[:, COLUMNS["rotate"]] - 1) * c.rotate_degrees).to(x.device))
        _on_rows(x, u[:, COLUMNS["flip"]] < c.flip_prob, lambda part, _: part.flip(-1))
        if self._jitter:
            _on_rows(x, u[:, COLUMNS["jitter"]] < c.jitter_prob, lambda part, rows: self._color_jitter(part, u[rows]))
        if c.channels == 3:
            _on_rows(x, u[:, COLUMNS["gray"]] < c.gray_prob, lambda part, _: _grey(part).expand_as(part))
        sigma = c.blur_sigma_min + u[:, COLUMNS["sigma"]] * (c.blur_sigma_max - c.blur_sigma_min)
        blurred = u[:, COLUMNS["blur"]] < torch.where(second, c.blur_prob2, c.blur_prob)
        _on_rows(x, blurred, lambda part, rows: _blur(part, sigma[rows].to(part.device)))
        solarized = u[:, COLUMNS["solarize"]] < torch.where(second, c.solarize_prob2, c.solarize_prob)
        _on_rows(x, solarized, lambda part, _: torch.where(part >= 0.5, 1 - part, part))

        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (c.image_mean, c.image_std))
        return tuple(x.sub_(mean).div_(std).view(crops.shape))

    def _color_jitter(self, x: Tensor, u: Tensor) -> Tensor:
        """(R, C, S, S), in place, each row in an order of its own, from uniforms (R, K).

        All but hue are clip(f x + (1 - f) m), where m is 0 (brightness), the mean of the grey image (contrast) or that image (saturation).
        """
        order = self._orders.to(u.device)[(u[:, COLUMNS["order"]] * len(ORDERS)).long()]  # (R, active)
        size = (-1, 1, 1, 1)
        factor = torch.ones(len(u), len(JITTER), device=u.device)
        for name, strength in self._jitter.items():
            if name != "hue":
                low = max(0.0, 1 - strength)
                factor[:, JITTER.index(name)] = low + u[:, COLUMNS[name]] * (1 + strength - low)
        shift = (2 * u[:, COLUMNS["hue"]] - 1) * self.config.hue
        for operation in order.T:
            f = factor.gather(1, operation[:, None])[:, 0]
            contrast, saturation = ((1 - f) * (operation == JITTER.index(name)) for name in ("contrast", "saturation"))
            grey = _grey(x)
            m = grey.mean((2, 3), keepdim=True) * contrast.to(x.device).view(size)
            m = torch.addcmul(m, grey, saturation.to(x.device).view(size)) if "saturation" in self._jitter else m
            x = x.mul_(f.to(x.device).view(size)).add_(m).clamp_(0, 1)
            if "hue" in self._jitter:
                _on_rows(
                    x,
                    operation == JITTER.index("hue"),
                    lambda part, rows: _shift_hue(part, shift[rows].to(part.device)),
                )
        return x


def _on_rows(x: Tensor, mask: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In place, the rows of x (R, ...) that mask (R,) marks become operation(those rows, their numbers on the mask's device)."""
    rows = mask.nonzero().flatten()
    if len(rows):
        there = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, there, operation(x.index_select(0, there), rows).contiguous())


# ------------------------------------------------------------------------------------------------------------------ evaluation


@dataclass
class EvalTransform:
    """Shorter side to image_size / crop_pct (bicubic), the centre, normalised: ConvNextImageProcessor, which reads the saved file.

    At 384 pixels and above that processor resizes to a square and cuts nothing off, and so does this.

    >>> EvalTransform(image_size=8, channels=1)(Image.new("L", (20, 10))).shape
    torch.Size([1, 8, 8])
    """

    image_size: int = 224
    channels: int = 3
    crop_pct: float | None = None  # None: 0.875, and 1.0 below 64 pixels, where a border is a large part of the image
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_pixels(self)
        if self.crop_pct is None:
            self.crop_pct = 1.0 if self.image_size < 64 else 0.875
        if not 0 < self.crop_pct <= 1:
            raise ValueError(
                f"crop_pct={self.crop_pct}, but it is the share of the shorter side that is kept: above 0, 1 at most."
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """(C, S, S) float32."""
        mode, size = "L" if self.channels == 1 else "RGB", self.image_size
        image = image if image.mode == mode else image.convert(mode)
        assert self.crop_pct is not None  # __post_init__
        width, height = size, size
        if size < 384:
            short, sides = int(size / self.crop_pct), image.size
            long = int(short * max(sides) / min(sides))
            width, height = (short, long) if sides[0] <= sides[1] else (long, short)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        pixels = (
            torch.from_numpy(np.array(image, dtype=np.float32)).view(size, size, self.channels).permute(2, 0, 1) / 255
        )
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes preprocessor_config.json, which `transformers.AutoImageProcessor` reads."""
        content = {
            "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": self.image_size}, "crop_pct": self.crop_pct,
            "do_resize": True, "resample": int(Image.Resampling.BICUBIC), "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(self.image_mean), "image_std": list(self.image_std),
        }  # fmt: skip
        write_text(Path(folder) / PROCESSOR_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EvalTransform:
        """What `save` wrote, or a ValueError."""
        path = Path(folder) / PROCESSOR_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            mean, std = tuple(content["image_mean"]), tuple(content["image_std"])
            return cls(content["size"]["shortest_edge"], len(mean), content["crop_pct"], mean, std)
        except FileNotFoundError:
            raise ValueError(
                f"{path} does not exist, so its images' preparation is unknown. Give a finished run's folder."
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a file that EvalTransform wrote ({type(error).__name__}: {error})."
            ) from None
