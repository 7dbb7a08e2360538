"""The methods: which heads, which target network, which loss. One entry a method; everything else is shared.

A step gives two views of each image. The online network makes projections z and, where there is a predictor, predictions p;
where the method has a target network (a moving average of the online one, without gradients), it makes projections t.

Legend: B rows of all ranks, d width of the last head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.ssl import losses

__all__ = ["METHODS", "Branches", "Method", "check_loss_settings", "method_named"]


class Branches(NamedTuple):
    """What the heads made of the two views; the rows of all ranks. An entry is None where the method lacks that head or network."""

    z1: Tensor  # (B, d) online projections
    z2: Tensor | None
    p1: Tensor | None  # (B, d) online predictions
    p2: Tensor | None
    t1: Tensor | None  # (B, d) the target network's projections, without gradients
    t2: Tensor | None
    queue: Tensor | None = None  # (N, d) MoCo's keys of earlier batches
    prototypes: Tensor | None = None  # (M, d) SwAV's, of length one


def _of_projections(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda b, **settings: loss(b.z1, b.z2, **settings)


def _both(b: Branches) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert b.p1 is not None
    assert b.p2 is not None
    assert b.t1 is not None
    assert b.t2 is not None
    return b.p1, b.p2, b.t1, b.t2


def _matrix_ssl(b: Branches, **settings: Any) -> Tensor:
    p1, p2, t1, t2 = _both(b)
    if settings.get("preset", "official") == "paper":  # eq. 14 is one-sided
        return losses.matrix_ssl_loss(t1, p2, **settings)
    return (losses.matrix_ssl_loss(t2, p1, **settings) + losses.matrix_ssl_loss(t1, p2, **settings)) / 2


def _mec(b: Branches, **settings: Any) -> Tensor:
    p1, p2, t1, t2 = _both(b)
    return (losses.mec_loss(p1, t2, **settings) + losses.mec_loss(p2, t1, **settings)) / 2


def _byol(b: Branches) -> Tensor:
    p1, p2, t1, t2 = _both(b)
    return losses.byol_loss(p1, t2) + losses.byol_loss(p2, t1)


def _simsiam(b: Branches) -> Tensor:
    assert b.p1 is not None
    assert b.p2 is not None
    assert b.z2 is not None
    return losses.simsiam_loss(b.p1, b.p2, b.z1, b.z2)


def _moco(b: Branches, **settings: Any) -> Tensor:
    assert b.t2 is not None
    assert b.queue is not None
    return losses.moco_loss(b.z1, b.t2, b.queue, **settings)


def _swav(b: Branches, **settings: Any) -> Tensor:
    assert b.prototypes is not None
    assert b.z2 is not None
    with torch.autocast(b.z1.device.type, enabled=False):  # bfloat16 cosines would move the assignments
        scores = [F.normalize(z.float(), dim=1) @ b.prototypes.float().T for z in (b.z1, b.z2)]
    return losses.swav_loss(*scores, **settings)


def _mec_warm_up(settings: dict[str, Any], epoch: float) -> dict[str, Any]:
    """The release lowers eps from 8 times its value to it over 10 epochs, so that the Taylor series converges from the start."""
    return {**settings, "eps": settings.get("eps", 64.0) * (8 - 7 * min(epoch / 10, 1.0))}


@dataclass(frozen=True)
class Method:
    """One method. Widths are the paper's for a ResNet-50; a recipe may give others."""

    title: str
    paper: str
    loss: Callable[..., Tensor]
    settings: Callable[..., Tensor]  # the pinned loss, whose keyword arguments a recipe's `loss_settings` may give
    projector: tuple[int, ...]
    projector_end: str = (
        "linear"  # what follows the last layer: "linear" (nothing), "bn" (without affine) or "bn_affine"
    )
    hidden_bn: bool = True  # batch normalisation after the hidden layers
    predictor: tuple[int, ...] | None = None
    target: bool = False  # a moving average of the online network
    one_sided: bool = False  # the online network sees the first view alone, the target network the second
    queue: int = 0
    prototypes: int = 0
    ema_momentum: float = 0.996
    ema_schedule: str = "cosine"  # to 1 at the end, or "constant"
    fixed_predictor_lr: bool = False
    schedule: Callable[[dict[str, Any], float], dict[str, Any]] | None = None  # of the loss's settings over the epochs


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
        "Barlow Twins", "arXiv 2103.03230", _of_projections(losses.barlow_twins_loss), losses.barlow_twins_loss, (8192, 8192, 8192)
    ),
    "vicreg": Method("VICReg", "arXiv 2105.04906", _of_projections(losses.vicreg_loss), losses.vicreg_loss, (8192, 8192, 8192)),
    "simclr": Method(
        "SimCLR", "arXiv 2002.05709", _of_projections(losses.nt_xent_loss), losses.nt_xent_loss, (2048, 128), "bn_affine"
    ),
    "moco": Method(
        "MoCo v2", "arXiv 2003.04297", _moco, losses.moco_loss, (2048, 128), hidden_bn=False,
        target=True, one_sided=True, queue=65536, ema_momentum=0.999, ema_schedule="constant",
    ),
    "byol": Method("BYOL", "arXiv 2006.07733", _byol, losses.byol_loss, (4096, 256), predictor=(4096, 256), target=True),
    "simsiam": Method(
        "SimSiam", "arXiv 2011.10566", _simsiam, losses.simsiam_loss, (2048, 2048, 2048), "bn",
        predictor=(512, 2048), fixed_predictor_lr=True,
    ),
    "swav": Method("SwAV, two crops", "arXiv 2006.09882", _swav, losses.swav_loss, (2048, 128), prototypes=3000),
}  # fmt: skip


def method_named(name: str) -> Method:
    if name not in METHODS:
        from matrix_llm.base.values import nearest

        raise ValueError(f"method={name!r} is none of {', '.join(METHODS)}.{nearest(name, METHODS)}")
    return METHODS[name]


def check_loss_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that the method's loss does not have."""
    parameters = inspect.signature(method_named(name).settings).parameters.values()
    allowed = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for key in settings:
        if key not in allowed:
            takes = f"takes {', '.join(allowed)}" if allowed else "has none"
            raise ValueError(f"loss_settings: {key!r} is no setting of {name}'s loss, which {takes}. Remove it.")
