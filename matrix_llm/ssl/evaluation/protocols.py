"""The protocols: what is trained on which features, how it is scored, and what the result records.

Each `run_*` first refuses what cannot work, then loads the weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from matrix_llm.base.errors import ProbeError
from matrix_llm.base.files import write_text
from matrix_llm.base.statistics import wilson_interval
from matrix_llm.ssl.evaluation.features import Features, correct_at, effective_ranks
from matrix_llm.ssl.evaluation.label_draws import few_label_draws
from matrix_llm.ssl.evaluation.linear import choose_c, few_label_accuracy, linear_scores
from matrix_llm.ssl.evaluation.neighbours import knn_votes
from matrix_llm.ssl.evaluation.passes import AugmentedBatches, extract_features, labels_of, pooled_features
from matrix_llm.ssl.evaluation.settings import (
    CommonSettings,
    FewSettings,
    KnnSettings,
    LinearSettings,
    SemiSettings,
    TrainedSettings,
)
from matrix_llm.ssl.evaluation.splits import choose_split
from matrix_llm.ssl.evaluation.subjects import Subject, recipe_flip
from matrix_llm.ssl.evaluation.trained import fine_tune, fit_linear, lars_reach
from matrix_llm.ssl.images.dataset import Images
from matrix_llm.ssl.models.backbones import feature_dim

__all__ = ["Job", "Result", "run_protocol"]

ENOUGH_REACH = 3.0  # of `lars_reach`: weights can grow twentyfold. Below, a LARS probe on the digits misses its optimum
FORWARD = 256  # images through the backbone at once: a batch of 4,096 of 224 x 224 would need 13 GB for its first layer
FEW_STEPS = 100  # of fine-tuning
MANY_IMAGES = 5000  # from here on, processes read the images

Result = dict[str, Any]  # protocol, n_train, n_test, classes, top1, ..., settings, skipped
S = TypeVar("S", bound=CommonSettings)
T = TypeVar("T", bound=TrainedSettings)


@dataclass
class Job(Generic[S]):
    """One evaluation: the settings and what they name."""

    settings: S
    """The command line."""
    subject: Subject
    """The network, not yet loaded."""
    train: Images
    """The training images, labelled."""
    test: Images
    """The test images, with labels that mean the same."""
    classes: int
    """The number of classes."""
    device: torch.device
    """Where the network runs."""

    def load(self) -> PreTrainedModel | None:
        backbone = self.subject.load(self.settings.seed)
        return backbone if backbone is None else backbone.to(self.device)  # type: ignore[arg-type]

    def features(self, backbone: PreTrainedModel | None, images: Images) -> Features:
        settings = self.settings
        return extract_features(
            backbone,
            images,
            self.subject.transform,
            batch_size=settings.eval_batch_size,
            device=self.device,
            workers=self.workers(images),
            bf16=settings.bf16,
        )

    def frozen_features(self) -> tuple[Features, Features]:
        """The features of the training and of the test images."""
        backbone = self.load()
        return self.features(backbone, self.train), self.features(backbone, self.test)

    def workers(self, images: Images) -> int:
        if self.settings.workers is not None:
            return self.settings.workers
        return 0 if len(images) < MANY_IMAGES else min(8, os.cpu_count() or 1)


def run_protocol(job: Job) -> Result:
    """Run the protocol of the job's settings.

    Raises:
        ProbeError: settings that do not fit the images or the network.
    """
    settings = job.settings
    if isinstance(settings, LinearSettings):
        return _run_lbfgs(job) if settings.protocol == "lbfgs" else _run_linear(job)
    if isinstance(settings, KnnSettings):
        return _run_knn(job)
    if isinstance(settings, SemiSettings):
        return _run_semi(job)
    return _run_few(job)


# --- on frozen features -----------------------------------------------------------------------------------------------


def _run_knn(job: Job[KnnSettings]) -> Result:
    settings = job.settings
    if max(settings.k) > len(job.train):
        raise ProbeError(
            f"--k {' '.join(map(str, settings.k))}, but there are {len(job.train)} training images. "
            "Give numbers between 1 and that."
        )
    train, test = job.frozen_features()
    on_device = [Features(part.x.to(job.device), part.y.to(job.device)) for part in (train, test)]
    by_k = {}
    for k in settings.k:
        readable = min(k, len(train.y))
        votes = knn_votes(on_device[0], on_device[1], k=readable, temperature=settings.temperature)
        by_k[str(k)] = _score(votes.cpu(), test.y, job.classes)
    used = {"k": settings.k[0], "temperature": settings.temperature, "similarity": "cosine"}
    found = by_k[str(settings.k[0])] | {"by_k": by_k, **effective_ranks(test.x, test.y)}
    return _result("knn", found, len(train.y), used, train.skipped, test.skipped)


def _run_lbfgs(job: Job[LinearSettings]) -> Result:
    settings = job.settings
    is_auto = settings.C == "auto"
    if is_auto and int(torch.bincount(labels_of(job.train).unique(return_inverse=True)[1]).min()) < 2:
        raise ProbeError(
            "--C auto, but a class has one training image, which cannot be both trained on and held out. "
            "Give --C a number."
        )
    train, test = job.frozen_features()
    C = choose_c(train, seed=settings.seed) if is_auto else float(settings.C)
    how = "on a fifth of the training part" if is_auto else "fixed"
    used = {"C": C, "C_chosen": how, "features": "standardised"}
    found = _score(linear_scores(train, test, C=C), test.y, job.classes) | effective_ranks(test.x, test.y)
    return _result("lbfgs", found, len(train.y), used, train.skipped, test.skipped)


def _run_few(job: Job[FewSettings]) -> Result:
    settings = job.settings
    # 1. Refuse a class with too few images.
    few_label_draws(labels_of(job.train), labels_per_class=settings.labels_per_class, draws=1, seed=settings.seed)
    # 2. Score every draw.
    train, test = job.frozen_features()
    each = few_label_accuracy(
        train,
        test,
        labels_per_class=settings.labels_per_class,
        draws=settings.draws,
        seed=settings.seed,
        C=settings.C,
    )
    # 3. The mean, with an interval over the test images and one over the draws
    mean = float(np.mean(each))
    found = {
        "n_test": len(test.y),
        "classes": job.classes,
        "top1": mean,
        "top1_interval": list(wilson_interval(round(mean * len(test.y)), len(test.y))),
        "top1_interval_over_draws": list(interval_of_mean(each)),
        "top1_each_draw": each,
        **effective_ranks(test.x, test.y),
    }
    used = {
        "labels_per_class": settings.labels_per_class,
        "draws": settings.draws,
        "C": settings.C,
        "features": "standardised",
    }
    labels = settings.labels_per_class * len(train.y.unique())
    return _result("few", found, labels, used, train.skipped, test.skipped)


# --- on augmented images ----------------------------------------------------------------------------------------------


def _run_linear(job: Job[LinearSettings]) -> Result:
    settings = job.settings
    # 1. The steps, and the optimizer that suits them
    batch_size = min(settings.batch_size, len(job.train))
    steps, rate = len(job.train) // batch_size, settings.base_learning_rate * batch_size / 256
    reach = lars_reach(rate, settings.momentum, steps * settings.epochs)
    optimizer = settings.optimizer or ("lars" if reach >= ENOUGH_REACH else "sgd")
    _say_reach(settings, reach, optimizer, steps * settings.epochs, rate)
    # 2. Train on features of augmented images, computed afresh each epoch.
    backbone = job.load()
    assert backbone is not None
    batches, flip_prob = _augmented(job, job.train, batch_size)
    probe = fit_linear(
        _FeatureBatches(backbone, batches, settings.bf16),
        width=feature_dim(backbone),
        classes=job.classes,
        epochs=settings.epochs,
        steps=steps,
        learning_rate=rate,
        optimizer=optimizer,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        device=job.device,
    )
    # 3. Score
    test = job.features(backbone, job.test)
    with torch.no_grad():
        scores = probe(test.x.to(job.device)).cpu()
    found = _score(scores, test.y, job.classes) | effective_ranks(test.x, test.y)
    used = {
        "optimizer": optimizer,
        "epochs": settings.epochs,
        "steps": steps * settings.epochs,
        "batch_size": batch_size,
        "learning_rate": rate,
        "base_learning_rate": settings.base_learning_rate,
        **_trained_settings(settings, flip_prob),
        "lars_reach": reach,
        "bf16": settings.bf16,
    }
    read = len(job.train) - len(batches.skipped)
    return _result(f"linear-{optimizer}", found, read, used, batches.skipped, test.skipped)


def _say_reach(settings: LinearSettings, reach: float, optimizer: str, steps: int, rate: float) -> None:
    if reach >= ENOUGH_REACH:
        return
    if optimizer == "lars":
        print(
            f"=> warning: {steps} steps of LARS at {rate:.3g} leave the classifier near its start; the score is too "
            "low. Use --optimizer sgd, or a larger --base_learning_rate or --epochs.",
            file=sys.stderr,
        )
    elif settings.optimizer is None:
        print(
            f"=> SGD instead of LARS, whose {steps} steps at {rate:.3g} would leave the classifier near its start",
            file=sys.stderr,
        )


def _run_semi(job: Job[SemiSettings]) -> Result:
    settings = job.settings
    # 1. The labelled images
    places = choose_split(job.train, job.test, percent=settings.percent, file=settings.split, seed=settings.seed)
    if len(places) < 2:
        raise ProbeError(
            f"{len(places)} labelled image(s), but batch normalisation needs at least 2. Give a larger --percent."
        )
    chosen = job.train.subset(places)
    batch_size = min(settings.batch_size, len(chosen))
    steps = len(chosen) // batch_size
    if steps * settings.epochs < FEW_STEPS:  # a data set much smaller than ImageNet, whose 1 % makes 1,000 steps
        print(
            f"=> warning: {steps * settings.epochs} steps change the network little, and its running statistics may "
            "lag. Give more --epochs, or a smaller --batch_size.",
            file=sys.stderr,
        )
    # 2. Train
    backbone = job.load()
    assert backbone is not None
    batches, flip_prob = _augmented(job, chosen, batch_size)
    classifier = fine_tune(
        backbone,
        batches,
        classes=job.classes,
        epochs=settings.epochs,
        steps=steps,
        backbone_learning_rate=settings.backbone_learning_rate,
        head_learning_rate=settings.head_learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        bf16=settings.bf16,
    )
    # 3. Score
    test = job.features(backbone, job.test)
    with torch.no_grad():
        scores = classifier(test.x.to(job.device)).cpu()
    used = {
        "percent": 100 * len(chosen) / len(job.train),
        "epochs": settings.epochs,
        "steps": steps * settings.epochs,
        "batch_size": batch_size,
        "backbone_learning_rate": settings.backbone_learning_rate,
        "head_learning_rate": settings.head_learning_rate,
        **_trained_settings(settings, flip_prob),
        "bf16": settings.bf16,
        "split": settings.split or str(_split_file(settings.result_path)),
    }
    # 4. A split that was drawn is saved next to the result.
    if settings.split is None:
        ids = "".join(f"{job.train.ids[i]}\n" for i in places.tolist())
        write_text(_split_file(settings.result_path), ids)
    read = len(chosen) - len(batches.skipped)
    return _result("semi", _score(scores, test.y, job.classes), read, used, batches.skipped, test.skipped)


def _split_file(result: Path) -> Path:
    return result.with_suffix(".split.txt")


def _augmented(job: Job[T], images: Images, batch_size: int) -> tuple[AugmentedBatches, float]:
    """Random crops of the images, and the probability of a flip: the command line's or the recipe's."""
    settings = job.settings
    flip_prob = recipe_flip(job.subject.folder) if settings.flip_prob is None else settings.flip_prob
    batches = AugmentedBatches(
        images,
        job.subject.transform,
        batch_size=batch_size,
        seed=settings.seed,
        flip_prob=flip_prob,
        crop_scale_min=settings.crop_scale_min,
        device=job.device,
        workers=job.workers(images),
    )
    return batches, flip_prob


class _FeatureBatches:
    """batches(epoch) yields the frozen backbone's features of augmented images, and their labels."""

    def __init__(self, backbone: PreTrainedModel, batches: AugmentedBatches, bf16: bool) -> None:
        self.backbone, self.batches, self.bf16 = backbone, batches, bf16

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, y in self.batches(epoch):
            with torch.no_grad():
                parts = [pooled_features(self.backbone, part, self.bf16) for part in pixels.split(FORWARD)]
            yield torch.cat(parts), y


# --- scores and results -----------------------------------------------------------------------------------------------


def interval_of_mean(values: list[float]) -> tuple[float, float]:
    """Student's 95 % interval for the mean of independent draws. Their spread would not shrink with more draws.

    Raises:
        ProbeError: fewer than two values.

    >>> [round(v, 3) for v in interval_of_mean([0.0, 1.0])]  # 0.5 -+ 12.706 · 0.7071 / sqrt(2)
    [-5.853, 6.853]
    """
    if len(values) < 2:
        raise ProbeError("one draw tells nothing about how draws differ. Make at least 2.")
    from scipy import stats

    mean = float(np.mean(values))
    radius = float(
        stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    )  # t.interval is NaN where all values are equal
    return mean - radius, mean + radius


def _score(scores: Tensor, y: Tensor, classes: int) -> Result:
    """Top-1, and top-5 where five guesses are not nearly all there are, each with Wilson's 95 % interval over the
    test images.
    """
    found: Result = {"n_test": len(y), "classes": classes}
    for k in (1, 5) if classes >= 6 else (1,):
        correct = correct_at(scores, y, k)
        found |= {f"top{k}": correct / len(y), f"top{k}_interval": list(wilson_interval(correct, len(y)))}
    return found


def _trained_settings(settings: TrainedSettings, flip_prob: float) -> Result:
    return {
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "flip_prob": flip_prob,
        "crop_scale_min": settings.crop_scale_min,
    }


def _result(
    protocol: str, found: Result, n_train: int, used: Result, train: Iterable[str], test: Iterable[str]
) -> Result:
    skipped = {"train": list(train), "test": list(test)}
    return {"protocol": protocol, "n_train": n_train, **found, "settings": used, "skipped": skipped}
