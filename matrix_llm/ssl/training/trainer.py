"""`SSLTrainer`: a `transformers.Trainer` for two views of unlabelled images. The mathematics of the methods is
elsewhere.

What it adds:
- batches are (crops, draws) from the loader's workers; the rest of the augmentation runs on the device
- batch normalisation over all ranks (Trainer has none) and losses over the rows of all ranks, so that W ranks with B
  / W images each train as one rank with B images
- SGD, LARS or AdamW; a predictor whose learning rate stays (SimSiam); the target network's moving average with its
  schedule
- the logged names `loss, learning_rate, images_per_second, online_probe_accuracy, effective_rank,
  feature_effective_rank, effective_rank_rows, ema_momentum, skipped_images`
- checkpoints that are complete or absent (`run/saving.py`); a resumed run ends with the weights of an uninterrupted one

Legend: B images of this rank, F features of the backbone, d width of the last head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback

from matrix_llm.base.errors import ImageDataError, NonFiniteLossError, NonFiniteRowsError, RecipeError
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.run.saving import AtomicCheckpoints
from matrix_llm.ssl.config import SSLTrainingConfig
from matrix_llm.ssl.images.augment import Augment
from matrix_llm.ssl.images.crops import TwoViewCollator
from matrix_llm.ssl.images.dataset import EpochSampler, Images, TrainImages
from matrix_llm.ssl.images.eval_transform import EvalTransform
from matrix_llm.ssl.images.settings import AugmentConfig
from matrix_llm.ssl.losses.gather import gather_rows
from matrix_llm.ssl.metrics import batch_effective_rank, class_effective_ranks
from matrix_llm.ssl.models.ssl_model import SSLModel
from matrix_llm.ssl.models.sync_batch_norm import synchronise_batch_norm
from matrix_llm.ssl.training.callbacks import EmaCallback
from matrix_llm.ssl.training.optimizers import build_optimizer, build_scheduler

__all__ = ["SSLTrainer"]

logger = logging.getLogger(__name__)


class SSLTrainer(AtomicCheckpoints):
    """Train an `SSLModel` on unlabelled images.

    Args:
        model: changed in place on several ranks (`synchronise_batch_norm`).
        images: the training images; their labels, if any, are for the online probe alone.
        augment: the augmentation of both views.
        eval_images: labelled images for the online probe's held-out accuracy.

    Raises:
        RecipeError: fewer images than one step takes; a queue shorter than a batch; a probe without labels, or labels
            outside its classes.

    >>> # SSLTrainer(model, SSLTrainingConfig("runs/x"), images=load_images("digits"), augment=AugmentConfig())
    """

    args: SSLTrainingConfig

    def __init__(
        self,
        model: SSLModel,
        args: SSLTrainingConfig,
        *,
        images: Images,
        augment: AugmentConfig,
        eval_images: Images | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        # 1. Refuse what cannot train, before anything is changed.
        _check_batch(model, args, images)
        for part in (images, eval_images):
            if model.probe is not None and part is not None:
                _check_probe_labels(part, model.config.probe_classes)
        # 2. The model
        if args.world_size > 1:
            synchronise_batch_norm(model, args.device)
        self.ssl_model = model
        self.ema: EmaCallback | None = None
        if model.method.target:
            start = model.method.ema_momentum if args.ema_momentum is None else args.ema_momentum
            self.ema = EmaCallback(model, start, args.ema_schedule or model.method.ema_schedule)
        # 3. What is measured along the way
        self.skipped: set[str] = set()
        self._probe = _ProbeAccuracy()
        self._speed = _Speed()
        self._last: tuple[Tensor, Tensor] | None = None  # embedding (B, d) and features (B, F) of the last batch
        self._ranked_at = 0  # the step of the last effective ranks
        # 4. The images
        self._seed = args.seed if args.data_seed is None else args.data_seed
        self.augment = Augment(augment)
        self.transform = EvalTransform(
            augment.image_size, augment.channels, image_mean=augment.image_mean, image_std=augment.image_std
        )
        labels = images.labels if model.probe is not None else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=TrainImages(images),
            eval_dataset=None if eval_images is None else _EvalImages(eval_images, self.transform),
            data_collator=_HostDraws(TwoViewCollator(augment, seed=self._seed, labels=labels)),
            callbacks=list(callbacks),
        )
        if self.ema is not None:
            self.add_callback(self.ema)

    def train(self, *args, **kwargs):
        self._speed.restart(self.state.global_step)
        self._ranked_at = 0
        return super().train(*args, **kwargs)

    # --- batches and the loss -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(len(dataset), seed=self._seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        # 1. Name each unreadable image once.
        for name in inputs["skipped"]:
            if name not in self.skipped:
                self.skipped.add(name)
                logger.warning("unreadable image, skipped: %s", name)
        # 2. The views, in float32
        with torch.no_grad(), torch.autocast(inputs["crops"].device.type, enabled=False):
            views = self.augment(inputs["crops"], torch.from_numpy(inputs["draws"]))
        # 3. The method's loss
        try:
            out = model(*views, labels=inputs.get("labels"), epoch=float(self.state.epoch or 0.0))
        except NonFiniteRowsError as error:
            raise self._diverged(str(error)) from None
        if not torch.isfinite(out.loss):
            raise self._diverged(f"the loss is {float(out.loss)}.")
        # 4. The probe's gradient reaches the probe alone, and adds 0 to the value: the logged loss stays the method's.
        loss = out.loss
        if out.probe_loss is not None:
            loss = loss + (out.probe_loss - out.probe_loss.detach())
            self._probe.add(out.probe_correct.detach())
        self._last = (out.embedding.detach(), out.features.detach())
        return (loss, out) if return_outputs else loss

    def _diverged(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"at step {self.state.global_step + 1}, which was not taken: {what} "
            "Lower base_learning_rate, lengthen warmup_steps, or train in float32."
        )

    # --- optimizer ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.ssl_model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None
            self.lr_scheduler = build_scheduler(self.args, optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- logs ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            images_per_second = self._speed.measure(self.state.global_step, self.args.images_per_step)
            if images_per_second is not None:
                logs["images_per_second"] = images_per_second
            if self._probe.batches:
                mean = self._probe.take_mean(self.accelerator.device)
                logs["online_probe_accuracy"] = float(self.accelerator.reduce(mean, "mean"))
            if self.ema is not None and self.ema.momentum is not None:
                logs["ema_momentum"] = self.ema.momentum
            if self.skipped:
                logs["skipped_images"] = len(self.skipped)  # of this process
            logs |= self._effective_ranks()
        super().log(logs, start_time)

    def _effective_ranks(self) -> dict[str, float]:
        """Effective ranks of the last batch, with the first log after every `effective_rank_steps` steps."""
        every, step = self.args.effective_rank_steps, self.state.global_step
        if not every or self._last is None or step // every == self._ranked_at // every:
            return {}
        self._ranked_at = step
        with torch.no_grad():
            embedding, features = gather_rows(*self._last)
        return {
            "effective_rank": batch_effective_rank(embedding),
            "feature_effective_rank": batch_effective_rank(features),
            "effective_rank_rows": len(features),
        }

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """Held-out accuracy of the online probe, and effective ranks of the held-out features.

        The ranks are those of all features, within classes (eq. 20) and between classes (eq. 21).

        Raises:
            RecipeError: no labelled held-out images, or no probe.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None or self.ssl_model.probe is None:
            raise RecipeError(
                "evaluation needs labelled eval_images and the online probe. Give eval_dataset, or set eval_strategy: "
                "no."
            )
        started = time.perf_counter()
        # 1. Features and guesses of all ranks, without the images that cannot be read
        features, guess, labels = self._held_out(dataset)
        if not torch.isfinite(features).all():
            raise self._diverged("the held-out features hold NaN or infinity.")
        # 2. What they are worth
        seconds = time.perf_counter() - started
        found = {
            "online_probe_accuracy": float((guess == labels).float().mean()),
            "feature_effective_rank": batch_effective_rank(features),
            **class_effective_ranks(features, labels),
            "rows": len(features),
            "runtime": round(seconds, 3),
        }
        # 3. Log it, and exclude the time that this took from images_per_second.
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._speed.exclude(time.perf_counter() - started)
        return metrics

    @torch.no_grad()
    def _held_out(self, dataset: Dataset) -> tuple[Tensor, Tensor, Tensor]:
        """Features (N, F), the probe's guesses (N,) and the labels (N,) of the readable images."""
        model, device, args = self.ssl_model, self.accelerator.device, self.args
        assert model.probe is not None
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=args.per_device_eval_batch_size, num_workers=args.dataloader_num_workers)
        )
        batches = []
        with evaluation_mode(model):
            for pixel_values, labels in loader:
                with self.accelerator.autocast():
                    features = model(pixel_values.to(device)).features
                    guess = model.probe(features).argmax(1)
                found = self.accelerator.gather_for_metrics((features.float(), guess, labels.to(device)))
                readable = found[2] >= 0
                batches.append([x[readable] for x in found])
        features, guess, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return features, guess, labels


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_batch(model: SSLModel, args: SSLTrainingConfig, images: Images) -> None:
    batch = args.images_per_step
    if batch < 2:
        raise RecipeError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} on one process makes a batch of one "
            "image, but batch normalisation and these losses compare images. Set per_device_train_batch_size to at "
            "least 2."
        )
    if len(images) < batch:
        raise RecipeError(
            f"{images.name} has {len(images)} images, but one step takes {batch} (per_device_train_batch_size="
            f"{args.per_device_train_batch_size} on {args.world_size} process(es)), and incomplete batches are "
            "dropped. Set per_device_train_batch_size lower."
        )
    if model.config.queue_size and model.config.queue_size < batch:
        raise RecipeError(
            f"queue_size={model.config.queue_size} is smaller than a batch of {batch} keys. Set queue_size to at "
            f"least {batch}."
        )


def _check_probe_labels(images: Images, classes: int) -> None:
    if images.labels is None:
        raise RecipeError(f"{images.name} has no labels, which the online probe needs. Set online_probe: false.")
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= classes:
        raise RecipeError(
            f"{images.name} has the label {low if low < 0 else high}, but the online probe has {classes} classes. "
            "Use the training images' classes, or set online_probe: false."
        )


# --- helpers ----------------------------------------------------------------------------------------------------------


@dataclass
class _ProbeAccuracy:
    """The online probe's accuracy, summed on the device since the last log."""

    total: Tensor | float = 0.0
    """Sum of the batches' accuracies."""
    batches: int = 0
    """Number of batches in the sum."""

    def add(self, correct: Tensor) -> None:
        self.total = self.total + correct
        self.batches += 1

    def take_mean(self, device: torch.device) -> Tensor:
        """The mean since the last call; then start over."""
        mean = torch.as_tensor(self.total, device=device) / self.batches
        self.total, self.batches = 0.0, 0
        return mean


@dataclass
class _Speed:
    """Images per second since the last log, without the time that evaluation took."""

    started: float = 0.0
    """Time of the last log, on the performance counter."""
    step: int = 0
    """Step of the last log."""

    def restart(self, step: int) -> None:
        self.started, self.step = time.perf_counter(), step

    def exclude(self, seconds: float) -> None:
        self.started += seconds

    def measure(self, step: int, images_per_step: int) -> float | None:
        """Images per second; None if no step was taken since the last call."""
        steps, seconds = step - self.step, time.perf_counter() - self.started
        self.restart(step)
        return steps * images_per_step / max(seconds, 1e-9) if steps > 0 else None


class _EvalImages(Dataset):
    """(pixel values, label) for the online probe; an unreadable image gets the label -100, which is not counted."""

    def __init__(self, images: Images, transform: EvalTransform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        labels, t = self.images.labels, self.transform
        assert labels is not None
        try:
            return t(self.images.read(index)), int(labels[index])
        except ImageDataError:
            return torch.zeros(t.channels, t.image_size, t.image_size), -100


class _HostDraws:
    """The collator, with the draws as a NumPy array: accelerate leaves arrays on the host, where choosing rows waits
    for nothing.
    """

    def __init__(self, collator: TwoViewCollator) -> None:
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = self.collator(items)
        return {**batch, "draws": batch["draws"].numpy()}
