"""The methods: which heads, which target network and which loss. One entry for each method; everything else is shared.

A step gives two views of each image. The online network computes projections z and, where there is a predictor,
predictions p. The target network, a moving average of the online one without gradients, computes projections t.

Legend: B rows of all ranks, d width of the last head, N queue length, M prototypes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import nearest
from matrix_llm.ssl import losses

__all__ = ["METHODS", "Branches", "Method", "check_loss_settings", "find_method"]


class Branches(NamedTuple):
    """The heads' outputs for the two views, for the rows of all ranks. None where the method lacks that head or
    network.
    """

    z1: Tensor  # (B, d) online projections
    z2: Tensor | None  # (B, d) those of the second view
    p1: Tensor | None  # (B, d) online predictions
    p2: Tensor | None  # (B, d) those of the second view
    t1: Tensor | None  # (B, d) the target network's projections, without gradients
    t2: Tensor | None  # (B, d) those of the second view
    queue: Tensor | None = None  # (N, d) MoCo's keys of earlier batches
    prototypes: Tensor | None = None  # (M, d) SwAV's, of length one


@dataclass(frozen=True)
class Method:
    """One method. The widths are the paper's for a ResNet-50; a recipe can change them."""

    title: str
    """The method's name in tables and cards."""
    paper: str
    """Its arXiv number."""
    loss: Callable[..., Tensor]
    """(Branches, **loss settings) -> the loss."""
    loss_function: Callable[..., Tensor]
    """The function of `losses`, whose keyword arguments a recipe's `loss_settings` may set."""
    projector: tuple[int, ...]
    """Widths of the projector's layers."""
    projector_end: str = "linear"
    """What follows the projector's last layer: "linear" (nothing), "bn" (without affine) or "bn_affine"."""
    hidden_bn: bool = True
    """Batch normalisation after the projector's hidden layers."""
    predictor: tuple[int, ...] | None = None
    """Widths of the predictor's layers; None for no predictor."""
    target: bool = False
    """Whether there is a target network, a moving average of the online network."""
    one_sided: bool = False
    """Whether the online network sees the first view only, and the target network the second."""
    queue: int = 0
    """Length of the queue of keys; 0 for no queue."""
    prototypes: int = 0
    """Number of prototypes; 0 for none."""
    ema_momentum: float = 0.996
    """Share of the target network that one step keeps, at the start."""
    ema_schedule: str = "cosine"
    """How that share changes: "cosine" (to 1 at the end) or "constant"."""
    fixed_predictor_lr: bool = False
    """Whether the predictor's learning rate stays constant."""
    schedule: Callable[[dict[str, Any], float], dict[str, Any]] | None = None
    """(loss settings, epoch) -> the loss settings of that epoch."""


# --- the losses over branches -----------------------------------------------------------------------------------------


def _matrix_ssl(b: Branches, **settings: Any) -> Tensor:
    p1, p2, t1, t2 = _predictions_and_targets(b)
    if settings.get("preset", "official") == "paper":  # eq. 14 is one-sided
        return losses.matrix_ssl_loss(t1, p2, **settings)
    return (losses.matrix_ssl_loss(t2, p1, **settings) + losses.matrix_ssl_loss(t1, p2, **settings)) / 2


def _mec(b: Branches, **settings: Any) -> Tensor:
    p1, p2, t1, t2 = _predictions_and_targets(b)
    return (losses.mec_loss(p1, t2, **settings) + losses.mec_loss(p2, t1, **settings)) / 2


def _mec_warm_up(settings: dict[str, Any], epoch: float) -> dict[str, Any]:
    """Lower eps from 8 times its value to its value over 10 epochs, as the release does: the series then converges
    from the start.
    """
    return {**settings, "eps": settings.get("eps", 64.0) * (8 - 7 * min(epoch / 10, 1.0))}


def _barlow_twins(b: Branches, **settings: Any) -> Tensor:
    return losses.barlow_twins_loss(*_projections(b), **settings)


def _vicreg(b: Branches, **settings: Any) -> Tensor:
    return losses.vicreg_loss(*_projections(b), **settings)


def _simclr(b: Branches, **settings: Any) -> Tensor:
    return losses.nt_xent_loss(*_projections(b), **settings)


def _moco(b: Branches, **settings: Any) -> Tensor:
    assert b.t2 is not None
    assert b.queue is not None
    return losses.moco_loss(b.z1, b.t2, b.queue, **settings)


def _byol(b: Branches) -> Tensor:
    p1, p2, t1, t2 = _predictions_and_targets(b)
    return losses.byol_loss(p1, t2) + losses.byol_loss(p2, t1)


def _simsiam(b: Branches) -> Tensor:
    assert b.p1 is not None
    assert b.p2 is not None
    return losses.simsiam_loss(b.p1, b.p2, *_projections(b))


def _swav(b: Branches, **settings: Any) -> Tensor:
    assert b.prototypes is not None
    with torch.autocast(b.z1.device.type, enabled=False):  # bfloat16 cosines would change the assignments
        scores = [F.normalize(z.float(), dim=1) @ b.prototypes.float().T for z in _projections(b)]
    return losses.swav_loss(*scores, **settings)


def _projections(b: Branches) -> tuple[Tensor, Tensor]:
    assert b.z2 is not None
    return b.z1, b.z2


def _predictions_and_targets(b: Branches) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert b.p1 is not None
    assert b.p2 is not None
    assert b.t1 is not None
    assert b.t2 is not None
    return b.p1, b.p2, b.t1, b.t2


# --- the table --------------------------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {
    "matrix_ssl": Method(
        "Matrix-SSL", "arXiv 2305.17326", _matrix_ssl, losses.matrix_ssl_loss, (2048, 2048, 2048), "bn",
        predictor=(512, 2048), target=True,
    ),
    "mec": Method(
        "MEC", "arXiv 2210.11464", _mec, losses.mec_loss, (2048, 2048, 2048), "bn",
        predictor=(512, 2048), target=True, schedule=_mec_warm_up,
    ),
    "barlow_twins": Method(
        "Barlow Twins", "arXiv 2103.03230", _barlow_twins, losses.barlow_twins_loss, (8192, 8192, 8192),
    ),
    "vicreg": Method(
        "VICReg", "arXiv 2105.04906", _vicreg, losses.vicreg_loss, (8192, 8192, 8192),
    ),
    "simclr": Method(
        "SimCLR", "arXiv 2002.05709", _simclr, losses.nt_xent_loss, (2048, 128), "bn_affine",
    ),
    "moco": Method(
        "MoCo v2", "arXiv 2003.04297", _moco, losses.moco_loss, (2048, 128), hidden_bn=False,
        target=True, one_sided=True, queue=65536, ema_momentum=0.999, ema_schedule="constant",
    ),
    "byol": Method(
        "BYOL", "arXiv 2006.07733", _byol, losses.byol_loss, (4096, 256),
        predictor=(4096, 256), target=True,
    ),
    "simsiam": Method(
        "SimSiam", "arXiv 2011.10566", _simsiam, losses.simsiam_loss, (2048, 2048, 2048), "bn",
        predictor=(512, 2048), fixed_predictor_lr=True,
    ),
    "swav": Method(
        "SwAV, two crops", "arXiv 2006.09882", _swav, losses.swav_loss, (2048, 128), prototypes=3000,
    ),
}  # fmt: skip


def find_method(name: str) -> Method:
    """METHODS[name], or a RecipeError that lists the methods."""
    if name not in METHODS:
        raise RecipeError(f"method={name!r} is not one of {', '.join(METHODS)}.{nearest(name, METHODS)}")
    return METHODS[name]


def check_loss_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Check the names and the types of a recipe's `loss_settings`; the loss itself checks their ranges.

    Raises:
        RecipeError: a setting that the method's loss does not have, or a value of the wrong type.
    """
    signature = inspect.signature(find_method(name).loss_function)
    defaults = {p.name: p.default for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for key, value in settings.items():
        if key not in defaults:
            takes = f"takes {', '.join(defaults)}" if defaults else "has no settings"
            raise RecipeError(f"loss_settings: {key!r} is not a setting of {name}'s loss, which {takes}. Remove it.")
        wanted = {int: (int,), float: (int, float), str: (str,)}[type(defaults[key])]
        if key == "order" and value is None and name == "mec":
            continue  # the exact logarithm
        if not isinstance(value, wanted) or isinstance(value, bool):
            what = {int: "a whole number", float: "a number", str: "a text"}[type(defaults[key])]
            hint = " YAML reads 1e-3 as a text; write 1.0e-3." if isinstance(value, str) else ""
            raise RecipeError(f"loss_settings: {key}={value!r} must be {what}.{hint}")
