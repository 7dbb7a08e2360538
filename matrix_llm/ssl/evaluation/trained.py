"""Classifiers that are trained by gradient descent: the published linear probe, and fine-tuning on few labels.

Legend: B images of a batch, C channels, S pixels a side, F features of the backbone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.evaluation.passes import pooled_features
from matrix_llm.ssl.models.backbones import feature_dim
from matrix_llm.ssl.training.lars import LARS

__all__ = ["fine_tune", "fit_linear", "lars_reach"]

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # epoch -> (inputs, labels) of each batch
SIGN_OF_LIFE = 30.0  # seconds between two lines on stderr


def lars_reach(learning_rate: float, momentum: float, steps: int) -> float:
    """The e-folds by which LARS can lengthen a weight over a cosine schedule: c · lr / (1 - m) · steps / 2.

    One step is at most c = 0.001 of the weight's length, times the learning rate. ImageNet's 31,300 steps at 0.48
    give 75. One step an epoch, on a small data set, leaves the classifier where it started.

    >>> round(lars_reach(0.48, 0.9, 31300), 1)
    75.1
    """
    return 0.001 * learning_rate / max(1 - momentum, 1e-9) * steps / 2


def fit_linear(
    batches: Batches,  # of features (B, F) and labels (B,)
    *,
    width: int,
    classes: int,
    epochs: int,
    steps: int,
    learning_rate: float,
    optimizer: str = "lars",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> nn.Sequential:
    """The published linear probe: batch normalisation without affine, then a linear layer, trained on cross-entropy.

    Args:
        batches: the features of an epoch, computed afresh where images are augmented. A batch of one row is skipped.
        steps: batches of an epoch, for the cosine schedule to 0.
        learning_rate: at the first step.
        optimizer: "lars" or "sgd".

    Returns:
        The probe in eval mode.

    Raises:
        ProbeError: another optimizer, or no steps to train for.
    """
    if optimizer not in ("lars", "sgd"):
        raise ProbeError(f"optimizer={optimizer!r} must be lars or sgd.")
    if epochs < 1 or steps < 1:
        raise ProbeError(f"epochs={epochs} of {steps} step(s) train nothing. Both must be at least 1.")
    probe = nn.Sequential(nn.BatchNorm1d(width, affine=False), _linear_layer(width, classes, seed)).to(device).train()
    make = LARS if optimizer == "lars" else torch.optim.SGD
    trained = make(probe.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    _train(trained, probe, batches, epochs, steps)
    return probe.eval()


def fine_tune(
    backbone: PreTrainedModel,  # changed in place
    batches: Batches,  # of images (B, C, S, S) and labels (B,)
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
    """Train the backbone and a linear classifier together, by SGD with a learning rate each and the cosine schedule.

    As in Barlow Twins and VICReg, batch normalisation is in train mode. `steps` is the number of batches of an epoch.

    Returns:
        The classifier; it and the backbone are in eval mode.
    """
    device = next(backbone.parameters()).device
    classifier = _linear_layer(feature_dim(backbone), classes, seed).to(device)
    groups = [
        {"params": list(backbone.parameters()), "lr": backbone_learning_rate},
        {"params": list(classifier.parameters()), "lr": head_learning_rate},
    ]
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)
    backbone.train()
    _train(optimizer, lambda pixels: classifier(pooled_features(backbone, pixels, bf16)), batches, epochs, steps)
    backbone.eval()
    return classifier.eval()


def _train(
    optimizer: torch.optim.Optimizer,
    logits_of: Callable[[Tensor], Tensor],
    batches: Batches,
    epochs: int,
    steps: int,
) -> None:
    """Minimise cross-entropy; each group's learning rate falls to 0 on a cosine. Long runs print progress on stderr."""
    rates = [group["lr"] for group in optimizer.param_groups]
    said = time.monotonic()
    for epoch in range(epochs):
        if time.monotonic() - said > SIGN_OF_LIFE:
            said = time.monotonic()
            print(f"=> epoch {epoch + 1} of {epochs}", file=sys.stderr, flush=True)
        for step, (x, y) in enumerate(batches(epoch)):
            if len(y) < 2:  # batch normalisation has no variance of one row
                continue
            factor = 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
            F.cross_entropy(logits_of(x), y).backward()
            optimizer.step()


def _linear_layer(width: int, classes: int, seed: int) -> nn.Linear:
    """Initialised as in the released codes (MoCo, SimSiam, Barlow Twins): weights of deviation 0.01, bias 0."""
    layer = nn.Linear(width, classes)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
    return layer
