"""`SSLTrainer`: a `transformers.Trainer` for two views of unlabelled images. No mathematics of any method here.

What it adds:
- batches are (crops, draws) from the loader's workers; the rest of the augmentation runs on the device
- batch normalisation over all ranks (Trainer has none) and losses over the rows of all ranks: W ranks with B / W images are one with B
- SGD, LARS or AdamW; a predictor whose learning rate stays (SimSiam); the target network's moving average with its schedule
- the logged names `loss, learning_rate, images_per_second, online_probe_accuracy, effective_rank, feature_effective_rank,
  effective_rank_rows, ema_momentum, skipped_images`
- checkpoints that are whole or absent (`matrix_llm/saving.py`); a resumed run ends with the weights of an unbroken one
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from matrix_llm.base.errors import ImageDataError, NonFiniteLossError, RecipeError
from matrix_llm.run.saving import WholeCheckpoints
from matrix_llm.ssl.augment import Augment, AugmentConfig, EvalTransform, TwoViewCollator
from matrix_llm.ssl.config import SSLTrainingConfig
from matrix_llm.ssl.data import EpochSampler, Images, TrainImages
from matrix_llm.ssl.gather import gather_rows
from matrix_llm.ssl.lars import LARS
from matrix_llm.ssl.metrics import batch_effective_rank, class_effective_ranks
from matrix_llm.ssl.modeling import SSLModel, synchronise_batch_norm
from matrix_llm.ssl.rows import NonFiniteRowsError

__all__ = ["EmaCallback", "SSLTrainer", "ema_momentum"]

logger = logging.getLogger(__name__)


def ema_momentum(step: int, steps: int, start: float, schedule: str) -> float:
    """1 - (1 - start) (1 + cos(pi step / steps)) / 2: BYOL's schedule from `start` to 1; or `start` throughout.

    >>> [ema_momentum(step, 100, 0.996, "cosine") for step in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """
    if schedule == "constant":
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2


class EmaCallback(TrainerCallback):
    """Moves the target network after each optimizer step, before a checkpoint is written."""

    def __init__(self, trainer: SSLTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        trainer = self.trainer
        trainer.momentum = ema_momentum(state.global_step, state.max_steps, *trainer.ema)
        trainer.ssl_model.update_target(trainer.momentum)


class _EvalImages(Dataset):
    """(pixel values, label) for the online probe; an unreadable image gets the label -100, which is not counted."""

    def __init__(self, images: Images, transform: EvalTransform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        labels = self.images.labels
        assert labels is not None
        try:
            return self.transform(self.images.read(index)), int(labels[index])
        except ImageDataError:
            return torch.zeros(self.transform.channels, self.transform.image_size, self.transform.image_size), -100


class _DrawsStayOnTheHost:
    """The collator, with the draws as an array, which accelerate leaves where it is: choosing rows on the device would wait for it."""

    def __init__(self, collator: TwoViewCollator) -> None:
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = self.collator(items)
        return {**batch, "draws": batch["draws"].numpy()}


class SSLTrainer(WholeCheckpoints):
    """
    Args:
        model: changed in place on several ranks (`synchronise_batch_norm`).
        images: the training images; their labels, if any, are for the online probe alone.
        augment: both views' augmentation.
        eval_images: labelled images for the online probe's held-out accuracy.

    Raises:
        RecipeError: fewer images than one step takes; a probe without labels, or labels outside its classes.

    >>> # trainer = SSLTrainer(model, SSLTrainingConfig("runs/x"), images=load_images("digits"), augment=AugmentConfig(image_size=16))
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
        if len(images) < args.images_per_step:
            raise RecipeError(
                f"{images.name} has {len(images)} images, but one step takes {args.images_per_step} (per_device_train_batch_size="
                f"{args.per_device_train_batch_size} on {args.world_size} process(es)), and incomplete batches are dropped. "
                "Set per_device_train_batch_size lower."
            )
        if model.config.queue_size and model.config.queue_size < args.images_per_step:
            raise RecipeError(
                f"queue_size={model.config.queue_size} is smaller than a batch of {args.images_per_step} keys. "
                "Set queue_size to at least that."
            )
        for part in (images, eval_images):
            if model.probe is not None and part is not None:
                if part.labels is None:
                    raise RecipeError(
                        f"{part.name} has no labels, which the online probe needs. Set online_probe: false."
                    )
                low, high = int(part.labels.min()), int(part.labels.max())
                if low < 0 or high >= model.config.probe_classes:
                    raise RecipeError(
                        f"{part.name} has the label {low if low < 0 else high}, but the online probe knows {model.config.probe_classes} "
                        "classes. Use the training images' classes, or set online_probe: false."
                    )
        if args.world_size > 1:
            synchronise_batch_norm(model, args.device)
        self.ssl_model = model
        method = model.method
        self.ema = (
            method.ema_momentum if args.ema_momentum is None else args.ema_momentum,
            args.ema_schedule or method.ema_schedule,
        )
        self.momentum: float | None = None
        self.augment = Augment(augment)
        self.transform = EvalTransform(
            augment.image_size, augment.channels, image_mean=augment.image_mean, image_std=augment.image_std
        )
        self.skipped: set[str] = set()
        self._probe_sums = [0.0, 0]
        self._last: tuple[Tensor, Tensor] | None = None
        self._ranked = 0  # the step of the last effective ranks
        self._clock = (time.perf_counter(), 0)
        self._seed = args.seed if args.data_seed is None else args.data_seed
        super().__init__(
            model=model,
            args=args,
            train_dataset=TrainImages(images),
            eval_dataset=None if eval_images is None else _EvalImages(eval_images, self.transform),
            data_collator=_DrawsStayOnTheHost(
                TwoViewCollator(augment, seed=self._seed, labels=images.labels if model.probe is not None else None)
            ),
            callbacks=list(callbacks),
        )
        if method.target:
            self.add_callback(EmaCallback(self))

    # -- batches and the loss ---------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(len(dataset), seed=self._seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        for name in inputs["skipped"]:
            if name not in self.skipped:
                self.skipped.add(name)
                logger.warning("unreadable image, skipped: %s", name)
        with torch.no_grad(), torch.autocast(inputs["crops"].device.type, enabled=False):
            views = self.augment(inputs["crops"], torch.from_numpy(inputs["draws"]))
        try:
            out = model(*views, labels=inputs.get("labels"), epoch=float(self.state.epoch or 0.0))
        except NonFiniteRowsError as error:
            raise self._diverged(str(error)) from None
        if not torch.isfinite(out.loss):
            raise self._diverged(f"the loss is {float(out.loss)}.")
        loss = out.loss
        if out.probe_loss is not None:  # its gradient reaches the probe alone; the logged loss stays the method's
            loss = loss + (out.probe_loss - out.probe_loss.detach())
            self._probe_sums[0] = self._probe_sums[0] + out.probe_correct.detach()
            self._probe_sums[1] += 1
        self._last = (out.embedding.detach(), out.features.detach())
        return (loss, out) if return_outputs else loss

    def _diverged(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"at step {self.state.global_step + 1}, which was not taken: {what} "
            "Lower base_learning_rate, lengthen warmup_steps, or train in float32."
        )

    # -- optimizer ---------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        args, net = self.args, self.ssl_model
        apart = {
            id(p)
            for part in (net.probe, net.predictor if net.method.fixed_predictor_lr else None)
            if part
            for p in part.parameters()
        }
        trained = [p for p in net.parameters() if p.requires_grad and id(p) not in apart]
        groups: list[dict[str, Any]] = [{"params": trained}]
        if args.optimizer == "adamw":
            groups = [
                {"params": [p for p in trained if p.ndim > 1]},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
        if net.predictor is not None and net.method.fixed_predictor_lr:
            groups.append({"params": [*net.predictor.parameters()], "fixed": True})
        if net.probe is not None:
            groups.append(
                {
                    "params": [*net.probe.parameters()],
                    "lr": args.probe_learning_rate,
                    "weight_decay": 0.0,
                    "adapt": False,
                }
            )
        common: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        if args.optimizer == "adamw":
            self.optimizer = AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, **common)
        else:
            self.optimizer = (LARS if args.optimizer == "lars" else SGD)(groups, momentum=args.momentum, **common)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None
            scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,  # type: ignore[arg-type]
            )
            for index, group in enumerate(optimizer.param_groups):
                if group.get("fixed"):
                    scheduler.lr_lambdas[index] = _always_one
                    group["lr"] = scheduler._last_lr[index] = group["initial_lr"]
            self.lr_scheduler = scheduler
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- logs ----------------------------------------------------------------------------------------------------------------

    def _effective_ranks(self) -> dict[str, float]:
        every, step = self.args.effective_rank_steps, self.state.global_step
        if not every or self._last is None or step // every == self._ranked // every:
            return {}
        self._ranked = step
        with torch.no_grad():
            embedding, features = gather_rows(*self._last)
        return {
            "effective_rank": batch_effective_rank(embedding),
            "feature_effective_rank": batch_effective_rank(features),
            "effective_rank_rows": len(features),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, step = time.perf_counter(), self.state.global_step
            since, before = self._clock
            self._clock = (now, step)
            if step > before:
                logs["images_per_second"] = (step - before) * self.args.images_per_step / max(now - since, 1e-9)
            if self._probe_sums[1]:
                mean = torch.as_tensor(self._probe_sums[0], device=self.accelerator.device) / self._probe_sums[1]
                logs["online_probe_accuracy"] = float(self.accelerator.reduce(mean, "mean"))
                self._probe_sums = [0.0, 0]
            if self.momentum is not None:
                logs["ema_momentum"] = self.momentum
            if self.skipped:
                logs["skipped_images"] = len(self.skipped)  # of this process
            logs |= self._effective_ranks()
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        self._clock, self._ranked = (time.perf_counter(), self.state.global_step), 0
        return super().train(*args, **kwargs)

    # -- evaluation ----------------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """Held-out accuracy of the online probe; effective ranks of held-out features, of all, within (eq. 20) and between classes (21).

        Raises:
            RecipeError: no labelled held-out images, or no probe.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None or self.ssl_model.probe is None:
            raise RecipeError(
                "evaluation needs labelled eval_images and the online probe. Give eval_dataset, or set eval_strategy: no."
            )
        started = time.perf_counter()
        loader = self.accelerator.prepare(
            DataLoader(
                dataset, batch_size=self.args.per_device_eval_batch_size, num_workers=self.args.dataloader_num_workers
            )
        )
        model, device = self.ssl_model, self.accelerator.device
        was_training = model.training
        model.eval()
        rows: list[Tensor] = []
        classes: list[Tensor] = []
        hits: list[Tensor] = []
        with torch.no_grad():
            for pixel_values, labels in loader:
                with self.accelerator.autocast():
                    features = model(pixel_values.to(device)).features
                    guess = model.probe(features).argmax(1)  # type: ignore[misc]
                features, guess, labels = self.accelerator.gather_for_metrics(
                    (features.float(), guess, labels.to(device))
                )
                rows.append(features[labels >= 0])
                classes.append(labels[labels >= 0])
                hits.append((guess == labels)[labels >= 0])
        model.train(was_training)
        features, labels = torch.cat(rows), torch.cat(classes)
        if not torch.isfinite(features).all():
            raise self._diverged("the held-out features hold NaN or infinity.")
        found = {
            "online_probe_accuracy": float(torch.cat(hits).float().mean()),
            "feature_effective_rank": batch_effective_rank(features),
            **class_effective_ranks(features, labels),
            "rows": len(features),
            "runtime": round(time.perf_counter() - started, 3),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock = (self._clock[0] + time.perf_counter() - started, self._clock[1])
        return metrics


def _always_one(step: int) -> float:
    return 1.0
