"""The protocols: what is trained on which features, how it is scored, and what the result says about it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from matrix_llm.base.errors import ProbeError
from matrix_llm.base.statistics import wilson_interval
from matrix_llm.ssl.data import Images
from matrix_llm.ssl.loops import augmented_batches, extract_features, fine_tune, pooled_features
from matrix_llm.ssl.modeling import feature_dim
from matrix_llm.ssl.probes import (
    Features,
    choose_c,
    correct_at,
    effective_ranks,
    few_label_accuracy,
    fit_linear,
    interval_of_mean,
    knn_votes,
    lars_reach,
    linear_scores,
)
from matrix_llm.ssl.subjects import Subject

__all__ = ["Job", "run_few", "run_knn", "run_linear", "run_semi", "score", "split_file"]

ENOUGH_REACH = 3.0  # of `lars_reach`: weights can grow twentyfold. Under that a LARS probe on the digits stays far from its optimum
FORWARD = 256  # images through the backbone at once: a batch of 4,096 of 224 x 224 would need 13 GB for its first layer
FEW_STEPS = 100  # of fine-tuning


def split_file(result: Path) -> Path:
    return result.with_suffix(".split.txt")


@dataclass
class Job:
    """What every protocol needs."""

    args: argparse.Namespace
    subject: Subject
    train: Images
    test: Images
    classes: int
    device: torch.device

    def workers(self, images: Images) -> int:
        return (
            self.args.workers
            if self.args.workers is not None
            else 0
            if len(images) < 5000
            else min(8, os.cpu_count() or 1)
        )

    def features(self, backbone: PreTrainedModel | None, images: Images) -> Features:
        return extract_features(
            backbone, images, self.subject.transform, batch_size=self.args.eval_batch_size, device=self.device,
            workers=self.workers(images), bf16=self.args.bf16,
        )  # fmt: skip

    def frozen(self) -> tuple[Features, Features]:
        backbone = self.load()
        return self.features(backbone, self.train), self.features(backbone, self.test)

    def load(self) -> PreTrainedModel | None:
        try:
            backbone = self.subject.load(self.args.seed)
        except Exception as error:  # OSError, SafetensorError, RuntimeError of sizes that differ, ...
            first = (str(error).splitlines() or [""])[0]
            raise ProbeError(
                f"the weights in {self.subject.folder} cannot be loaded ({type(error).__name__}: {first})."
            ) from error
        return backbone if backbone is None else backbone.to(self.device)  # type: ignore[arg-type]

    def augmented(
        self, images: Images, batch_size: int, skipped: dict[str, None]
    ) -> Callable[[int], Iterable[tuple[Tensor, Tensor]]]:
        """Batches of crops; a sign of life on stderr every half minute."""
        args, told = self.args, [time.monotonic()]
        batches = augmented_batches(
            images, self.subject.transform, batch_size=batch_size, seed=args.seed, flip_prob=args.flip_prob,
            crop_scale_min=args.crop_scale_min, device=self.device, workers=self.workers(images), skipped=skipped,
        )  # fmt: skip

        def told_batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
            if time.monotonic() - told[0] > 30:
                told[0] = time.monotonic()
                print(f"=> epoch {epoch + 1} of {args.epochs}", file=sys.stderr, flush=True)
            return batches(epoch)

        return told_batches


def score(scores: Tensor, y: Tensor, classes: int) -> dict[str, Any]:
    """Top-1, and top-5 where five guesses are not nearly all there are, each with Wilson's 95 % interval over the test images."""
    found: dict[str, Any] = {"n_test": len(y), "classes": classes}
    for k in (1, 5) if classes >= 6 else (1,):
        correct = correct_at(scores, y, k)
        found |= {f"top{k}": correct / len(y), f"top{k}_interval": list(wilson_interval(correct, len(y)))}
    return found


Result = dict[str, Any]  # protocol, n_train, n_test, classes, top1, ..., settings, skipped


def run_linear(job: Job) -> Result:
    args = job.args
    if args.protocol == "lbfgs":
        train, test = job.frozen()
        C = choose_c(train, seed=args.seed) if args.C == "auto" else float(args.C)
        settings = {
            "C": C,
            "C_chosen": "on a fifth of the training part" if args.C == "auto" else "fixed",
            "features": "standardised",
        }
        scores = linear_scores(train, test, C=C)
        ranks = effective_ranks(test.x, test.y)
        return _result(
            "lbfgs", score(scores, test.y, job.classes), len(train.y), settings, train.skipped, test.skipped, **ranks
        )
    batch_size = min(args.batch_size, len(job.train))
    steps, rate = len(job.train) // batch_size, args.base_learning_rate * batch_size / 256
    reach = lars_reach(rate, args.momentum, steps * args.epochs)
    optimizer = args.optimizer or ("lars" if reach >= ENOUGH_REACH else "sgd")
    if reach < ENOUGH_REACH and optimizer != "sgd":
        print(f"=> warning: {steps * args.epochs} steps of LARS at {rate:.3g} leave the classifier near its start; the score is too low. "
              "--optimizer sgd, or a larger --base_learning_rate or --epochs", file=sys.stderr)  # fmt: skip
    elif args.optimizer is None and optimizer == "sgd":
        print(f"=> SGD instead of LARS, whose {steps * args.epochs} steps at {rate:.3g} would leave the classifier near its start",
              file=sys.stderr)  # fmt: skip
    backbone = job.load()
    assert backbone is not None
    skipped: dict[str, None] = {}
    batches = job.augmented(job.train, batch_size, skipped)

    def features(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        for pixels, y in batches(epoch):
            with torch.no_grad():
                x = torch.cat([pooled_features(backbone, part, args.bf16) for part in pixels.split(FORWARD)])
            yield x, y

    probe = fit_linear(
        features, width=feature_dim(backbone), classes=job.classes, epochs=args.epochs, steps=steps, learning_rate=rate,
        optimizer=optimizer, momentum=args.momentum, weight_decay=args.weight_decay, seed=args.seed, device=job.device,
    )  # fmt: skip
    test = job.features(backbone, job.test)
    with torch.no_grad():
        scores = probe(test.x.to(job.device)).cpu()
    settings = {
        "optimizer": optimizer, "epochs": args.epochs, "steps": steps * args.epochs, "batch_size": batch_size, "learning_rate": rate,
        "base_learning_rate": args.base_learning_rate, "momentum": args.momentum, "weight_decay": args.weight_decay,
        "flip_prob": args.flip_prob, "crop_scale_min": args.crop_scale_min, "lars_reach": reach, "bf16": args.bf16,
    }  # fmt: skip
    ranks = effective_ranks(test.x, test.y)
    found = score(scores, test.y, job.classes)
    return _result(
        f"linear-{optimizer}", found, len(job.train) - len(skipped), settings, skipped, test.skipped, **ranks
    )


def run_knn(job: Job) -> Result:
    train, test = job.frozen()
    on_device = [Features(part.x.to(job.device), part.y.to(job.device)) for part in (train, test)]
    by_k = {}
    for k in job.args.k:
        votes = knn_votes(on_device[0], on_device[1], k=min(k, len(train.y)), temperature=job.args.temperature)
        by_k[str(k)] = score(votes.cpu(), test.y, job.classes)
    settings = {"k": job.args.k[0], "temperature": job.args.temperature, "similarity": "cosine"}
    ranks = effective_ranks(test.x, test.y)
    first = by_k[str(job.args.k[0])]
    return _result("knn", first, len(train.y), settings, train.skipped, test.skipped, by_k=by_k, **ranks)


def run_few(job: Job) -> Result:
    args = job.args
    train, test = job.frozen()
    each = few_label_accuracy(
        train, test, labels_per_class=args.labels_per_class, draws=args.draws, seed=args.seed, C=args.C
    )
    mean = float(np.mean(each))
    found = {
        "n_test": len(test.y), "classes": job.classes, "top1": mean,
        "top1_interval": list(wilson_interval(round(mean * len(test.y)), len(test.y))),
        "top1_interval_over_draws": list(interval_of_mean(each)), "top1_each_draw": each,
    }  # fmt: skip
    settings = {"labels_per_class": args.labels_per_class, "draws": args.draws, "C": args.C, "features": "standardised"}
    used = args.labels_per_class * len(train.y.unique())
    ranks = effective_ranks(test.x, test.y)
    return _result("few", found, used, settings, train.skipped, test.skipped, **ranks)


def run_semi(job: Job, places: Tensor) -> Result:
    args, chosen = job.args, job.train.subset(places)
    batch_size = min(args.batch_size, len(chosen))
    steps = len(chosen) // batch_size
    if steps * args.epochs < FEW_STEPS:  # a data set much smaller than ImageNet, whose 1 % makes 1,000 steps
        print(f"=> warning: {steps * args.epochs} steps change the network little, and its running statistics may lag. "
              "Give more --epochs, or a smaller --batch_size", file=sys.stderr)  # fmt: skip
    backbone = job.load()
    assert backbone is not None
    skipped: dict[str, None] = {}
    head = fine_tune(
        backbone, job.augmented(chosen, batch_size, skipped), classes=job.classes, epochs=args.epochs, steps=steps,
        backbone_learning_rate=args.backbone_learning_rate, head_learning_rate=args.head_learning_rate, momentum=args.momentum,
        weight_decay=args.weight_decay, seed=args.seed, bf16=args.bf16,
    )  # fmt: skip
    test = job.features(backbone, job.test)
    with torch.no_grad():
        scores = head(test.x.to(job.device)).cpu()
    settings = {
        "percent": 100 * len(chosen) / len(job.train), "epochs": args.epochs, "steps": steps * args.epochs, "batch_size": batch_size,
        "backbone_learning_rate": args.backbone_learning_rate, "head_learning_rate": args.head_learning_rate, "momentum": args.momentum,
        "weight_decay": args.weight_decay, "flip_prob": args.flip_prob, "crop_scale_min": args.crop_scale_min, "bf16": args.bf16,
        "split": args.split or str(split_file(args.out)),
    }  # fmt: skip
    return _result(
        "semi", score(scores, test.y, job.classes), len(chosen) - len(skipped), settings, skipped, test.skipped
    )


def _result(
    protocol: str, found: Result, n_train: int, settings: Result, train: Iterable[str], test: Iterable[str], **more: Any
) -> Result:
    skipped = {"train": list(train), "test": list(test)}
    return {"protocol": protocol, "n_train": n_train, **found, **more, "settings": settings, "skipped": skipped}
