"""What every loss does first: check its settings and its rows, and convert the rows to at least float32.

A setting that cannot work is a RecipeError, because a recipe's `loss_settings` reach the loss unchanged. Rows of the
wrong shape are a plain ValueError: no recipe can produce them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from matrix_llm.base.errors import NonFiniteRowsError, RecipeError

__all__ = ["check_positive", "check_preset", "check_rows"]

PRESETS = ("official", "paper")


def check_rows(minimum: int, **views: Tensor) -> tuple[Tensor, ...]:
    """Check that the views are finite, of one shape (B, d) and have B >= minimum; return them in one dtype, at least
    float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or too few rows.
        NonFiniteRowsError: NaN or infinity.
    """
    (first, z), *others = views.items()
    # 1. Shapes
    for name, view in views.items():
        if view.ndim != 2 or view.shape[1] == 0 or not view.is_floating_point():
            raise ValueError(f"{name} must be (B, d) floating-point rows, not {tuple(view.shape)} {view.dtype}.")
    for name, view in others:
        if view.shape != z.shape:
            raise ValueError(
                f"{first} is {tuple(z.shape)} and {name} is {tuple(view.shape)}, but row i of each must be a view of "
                "image i."
            )
    if len(z) < minimum:
        raise ValueError(
            f"{first} is a batch of {len(z)}, but this loss compares the rows of a batch and needs at least {minimum}. "
            "Set drop_last=True in the loader, or use a larger batch."
        )
    # 2. Values. The sum is one cheap reduction, but finite rows can overflow it: only then look at each entry.
    for name, view in views.items():
        if not torch.isfinite(view.sum()) and not (finite := torch.isfinite(view)).all():
            bad = int((~finite.all(1)).sum())
            raise NonFiniteRowsError(
                f"{name} holds NaN or infinity in {bad} of {len(view)} rows, so the loss has no value."
            )
    # 3. One dtype
    dtype = torch.float32
    for view in views.values():
        dtype = torch.promote_types(dtype, view.dtype)
    return tuple(view.to(dtype) for view in views.values())


def check_positive(**settings: float) -> None:
    """Raise a RecipeError that names the first setting that is not a positive finite number."""
    for name, value in settings.items():
        if not (value > 0 and math.isfinite(value)):
            raise RecipeError(
                f"{name}={value}, but the loss divides by it or takes its logarithm. Give a positive number."
            )


def check_preset(preset: str) -> None:
    if preset not in PRESETS:
        raise RecipeError(
            f"preset={preset!r} is not one of {', '.join(map(repr, PRESETS))}: the released code, or the paper's "
            "equations."
        )
