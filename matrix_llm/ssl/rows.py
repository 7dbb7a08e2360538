"""What every loss does with its rows first: check them, and lift them to float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["NonFiniteRowsError", "check_positive", "check_rows"]


class NonFiniteRowsError(ValueError):
    """NaN or infinity in the rows: a training run that has diverged."""


def check_rows(minimum: int, **views: Tensor) -> tuple[Tensor, ...]:
    """The views, each (B, d) with B >= minimum, finite and of one shape, in their common dtype, float32 at least."""
    (first, z), *others = views.items()
    for name, view in views.items():
        if view.ndim != 2 or view.shape[1] == 0 or not view.is_floating_point():
            raise ValueError(f"{name} must be (B, d) floating-point rows, not {tuple(view.shape)} {view.dtype}.")
    for name, view in others:
        if view.shape != z.shape:
            raise ValueError(
                f"{first} is {tuple(z.shape)} and {name} is {tuple(view.shape)}, but row i of each must be a view of image i."
            )
    if len(z) < minimum:
        raise ValueError(
            f"{first} is a batch of {len(z)}, but this loss compares the rows of a batch with each other and needs at least {minimum}. "
            "Set `drop_last=True` in the loader, or a larger batch size."
        )
    for name, view in views.items():
        if (
            not torch.isfinite(view.sum()) and not (finite := torch.isfinite(view)).all()
        ):  # the sum alone is cheap, and may overflow
            bad = int((~finite.all(1)).sum())
            raise NonFiniteRowsError(
                f"{name} holds NaN or infinity in {bad} of {len(view)} rows, so the loss has no value."
            )
    dtype = torch.float32
    for view in views.values():
        dtype = torch.promote_types(dtype, view.dtype)
    return tuple(view.to(dtype) for view in views.values())


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{name}={value}, but the loss divides by it or takes its logarithm. Give a positive number."
            )
