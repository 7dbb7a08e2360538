"""All of the augmentation except the crops, batched on the device.

The operations are those of torchvision's tensors (ColorJitter, RandomGrayscale, GaussianBlur, RandomSolarize). They
are written out here because torchvision is not a dependency, and because each row of a batch has its own parameters.

Legend: B images, C channels (1 or 3), S pixels a side, R rows (the 2 B images of both views, or those that drew an
operation), K uniforms for each row (`draws.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.information import outside_autocast
from matrix_llm.ssl.images.draws import COLUMNS, DRAWS
from matrix_llm.ssl.images.settings import AugmentConfig

__all__ = ["Augment"]

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, which sum to 0.9999
JITTER = ("brightness", "contrast", "saturation", "hue")
ORDERS = tuple(itertools.permutations(range(len(JITTER))))  # 24


class Augment:
    """Turn the crops and the uniforms of a batch into its two normalised views.

    Leave `draws` on the CPU: which rows an operation changes is decided where `draws` lie, and on a GPU that would
    wait for the queue.

    >>> from matrix_llm.ssl.images.draws import draw
    >>> crops = torch.zeros(2, 5, 1, 8, 8, dtype=torch.uint8)
    >>> draws = torch.stack([draw(0, 0, range(5), view) for view in (0, 1)])
    >>> view1, view2 = Augment(AugmentConfig(image_size=8, channels=1))(crops, draws)
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
        self._orders = torch.tensor([[op for op in order if op in active] for order in ORDERS])  # (24, active)

    @torch.no_grad()
    def __call__(
        self,
        crops: Tensor,  # (2, B, C, S, S) uint8; or (1, B, C, S, S), the first view alone
        draws: Tensor,  # (2, B, K)
    ) -> tuple[Tensor, ...]:
        """A (B, C, S, S) float32 tensor for each view, on the device of `crops`.

        Raises:
            ValueError: another shape or type.
        """
        # 1. Check, and put both views into one batch.
        c = self.config
        size = (c.channels, c.image_size, c.image_size)
        if crops.dtype != torch.uint8 or crops.ndim != 5 or crops.shape[0] not in (1, 2) or crops.shape[2:] != size:
            raise ValueError(
                f"crops is {tuple(crops.shape)} {crops.dtype}, not (2, B, {', '.join(map(str, size))}) uint8."
            )
        if draws.shape != (*crops.shape[:2], DRAWS):
            raise ValueError(f"draws is {tuple(draws.shape)}, but these crops need {(*crops.shape[:2], DRAWS)}.")
        x = crops.flatten(0, 1).float().div_(255)  # (R, C, S, S)
        u = draws.flatten(0, 1)  # (R, K)
        second = torch.arange(len(u), device=u.device) >= crops.shape[1]

        # 2. Geometry
        if c.rotate_degrees:
            x = _rotate(x, ((2 * u[:, COLUMNS["rotate"]] - 1) * c.rotate_degrees).to(x.device))
        _change_rows(x, u[:, COLUMNS["flip"]] < c.flip_prob, lambda part, _: part.flip(-1))
        # 3. Colour
        if self._jitter:
            drawn = u[:, COLUMNS["jitter"]] < c.jitter_prob
            _change_rows(x, drawn, lambda part, rows: self._color_jitter(part, u[rows]))
        if c.channels == 3:
            _change_rows(x, u[:, COLUMNS["gray"]] < c.gray_prob, lambda part, _: _grey(part).expand_as(part))
        # 4. Blur and solarise, with a probability for each view
        sigma = c.blur_sigma_min + u[:, COLUMNS["sigma"]] * (c.blur_sigma_max - c.blur_sigma_min)
        drawn = u[:, COLUMNS["blur"]] < torch.where(second, c.blur_prob2, c.blur_prob)
        _change_rows(x, drawn, lambda part, rows: _blur(part, sigma[rows].to(part.device)))
        drawn = u[:, COLUMNS["solarize"]] < torch.where(second, c.solarize_prob2, c.solarize_prob)
        _change_rows(x, drawn, lambda part, _: torch.where(part >= 0.5, 1 - part, part))
        # 5. Normalise
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (c.image_mean, c.image_std))
        return tuple(x.sub_(mean).div_(std).view(crops.shape))

    def _color_jitter(
        self,
        x: Tensor,  # (R, C, S, S), changed in place
        u: Tensor,  # (R, K)
    ) -> Tensor:
        """Brightness, contrast, saturation and hue, each row in its own order.

        All but hue are clip(f x + (1 - f) m), where m is 0 (brightness), the mean of the grey image (contrast) or
        that image (saturation).
        """
        # 1. The parameters of each row
        order = self._orders.to(u.device)[(u[:, COLUMNS["order"]] * len(ORDERS)).long()]  # (R, active)
        factor = torch.ones(len(u), len(JITTER), device=u.device)
        for name, strength in self._jitter.items():
            if name != "hue":
                low = max(0.0, 1 - strength)
                factor[:, JITTER.index(name)] = low + u[:, COLUMNS[name]] * (1 + strength - low)
        shift = (2 * u[:, COLUMNS["hue"]] - 1) * self.config.hue
        # 2. The first operation of every row, then the second, ...: rows of one pass may do different things
        size = (-1, 1, 1, 1)
        for operation in order.T:  # (R,)
            f = factor.gather(1, operation[:, None])[:, 0]
            contrast, saturation = (
                torch.where(operation == JITTER.index(name), 1 - f, 0.0).to(x.device).view(size)
                for name in ("contrast", "saturation")
            )
            grey = _grey(x)
            m = grey.mean((2, 3), keepdim=True) * contrast
            m = torch.addcmul(m, grey, saturation) if "saturation" in self._jitter else m
            x = x.mul_(f.to(x.device).view(size)).add_(m).clamp_(0, 1)
            if "hue" in self._jitter:
                drawn = operation == JITTER.index("hue")
                _change_rows(x, drawn, lambda part, rows: _shift_hue(part, shift[rows].to(part.device)))
        return x


def _change_rows(
    x: Tensor,  # (R, C, S, S), changed in place
    mask: Tensor,  # (R,) bool
    operation: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Replace the rows that the mask marks by operation(those rows, their numbers on the mask's device)."""
    rows = mask.nonzero().flatten()
    if len(rows):
        there = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, there, operation(x.index_select(0, there), rows).contiguous())


def _grey(x: Tensor) -> Tensor:
    """(R, C, S, S) to (R, 1, S, S)."""
    if x.shape[1] == 1:
        return x
    r, g, b = GREY_WEIGHTS
    return (r * x[:, :1]).add_(x[:, 1:2], alpha=g).add_(x[:, 2:], alpha=b)


def _shift_hue(
    x: Tensor,  # (R, 3, S, S)
    shift: Tensor,  # (R,) in turns of the colour circle
) -> Tensor:
    """To HSV, h + shift, and back, where channel n = 5, 3, 1 is

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
def _blur(
    x: Tensor,  # (R, C, S, S)
    sigma: Tensor,  # (R,) in pixels
) -> Tensor:
    """Gaussian blur, mirrored at the border; the kernel is a tenth of S wide, odd, and at least 3."""
    rows, channels, size, _ = x.shape
    half = max(size // 10 // 2, 1)
    taps = torch.arange(-half, half + 1, dtype=torch.float32, device=x.device)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None]).square(), dim=1)  # exp(...) divided by its sum
    kernel = kernel.repeat_interleave(channels, 0)  # (R C, taps)
    # One group for each image and channel, because each row has its own kernel.
    x = F.pad(x, (half, half, half, half), mode="reflect").view(1, rows * channels, size + 2 * half, size + 2 * half)
    x = F.conv2d(x, kernel[:, None, None, :], groups=rows * channels)
    return F.conv2d(x, kernel[:, None, :, None], groups=rows * channels).view(rows, channels, size, size)


@outside_autocast
def _rotate(
    x: Tensor,  # (R, C, S, S)
    degrees: Tensor,  # (R,) counter-clockwise
) -> Tensor:
    """Rotation about the centre, black where the image has no pixel."""
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    zero = torch.zeros_like(cos)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)  # from a pixel to where it came from
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
