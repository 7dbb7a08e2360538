"""The settings of a pre-training run: model, data, augmentation and training, all checked before anything is loaded.

>>> # recipe = load_ssl_recipe("recipes/ssl/digits.yaml", ["--loss_settings", "{gamma: 0.5}"])
>>> # recipe.model.loss_settings == {"gamma": 0.5}
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, TrainingArguments

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.reader import Settings, find_from_repository, find_recipe
from matrix_llm.base.values import nearest, setting
from matrix_llm.checks.machine import MissingOnThisMachineError, check_compile, check_loader, check_reports
from matrix_llm.checks.optimizer import check_schedule
from matrix_llm.ssl.images.settings import AugmentConfig
from matrix_llm.ssl.methods import METHODS, check_loss_settings, find_method

__all__ = ["SSLDataArguments", "SSLModelArguments", "SSLRecipe", "SSLTrainingConfig", "load_ssl_recipe"]

RESNET_50 = {"model_type": "resnet"}  # transformers' defaults


@dataclass
class SSLModelArguments:
    """The method and the network. Widths default to the paper's."""

    method: str = field(default="matrix_ssl", metadata={"choices": [*METHODS]})
    """A key of `methods.METHODS`."""
    backbone_config: dict | None = None
    """The architecture, e.g. {"model_type": "resnet", "depths": [2, 2, 2, 2]}; not given: a ResNet-50."""
    projector_widths: list[int] | None = None
    """Widths of the projector's layers, each at least 1."""
    predictor_widths: list[int] | None = None
    """Widths of the predictor's layers, each at least 1; the last one is that of the projector."""
    loss_settings: dict | None = None
    """Settings of the method's loss, e.g. {"gamma": 1.0, "order": 4}."""
    queue_size: int | None = None
    """Number of keys in MoCo's queue, at least one batch of all ranks."""
    prototypes: int | None = None
    """Number of SwAV's prototypes, at least 1."""
    zero_init_residual: bool = True
    """Start each residual branch at zero."""
    online_probe: bool = True
    """Whether to train a linear classifier on detached features along with the network, if the images have labels."""

    def __post_init__(self):
        for name in ("projector_widths", "predictor_widths"):
            widths = getattr(self, name)
            if widths is not None and (not widths or min(widths) < 1):
                raise RecipeError(
                    f"{name}={widths} cannot work: give one width above 0 for each layer, e.g. [2048, 2048, 2048]."
                )
        check_loss_settings(self.method, self.loss_settings or {})
        if self.backbone_config is not None:
            kind, known = self.backbone_config.get("model_type"), (*CONFIG_MAPPING, "small_resnet")
            if not isinstance(kind, str):
                raise RecipeError(
                    f"backbone_config={self.backbone_config!r} does not name the architecture. Add model_type, e.g. "
                    "resnet."
                )
            if kind not in known:
                raise RecipeError(
                    f"backbone_config: model_type={kind!r} is not an architecture of "
                    f"transformers.{nearest(kind, known)}"
                )


@dataclass
class SSLDataArguments:
    """Which images to train and evaluate on."""

    dataset: str | None = None
    """The images to train on: "digits", "synthetic", a folder, an .npz, CIFAR's binary folder or a Hub id
    (`images/load.py`).
    """
    dataset_config: str | None = None
    """Configuration of a Hub data set."""
    dataset_split: str = "train"
    """Split of `dataset` to train on."""
    eval_dataset: str | None = None
    """Labelled images for the online probe's held-out accuracy."""
    eval_split: str = "test"
    """Split of `eval_dataset`."""
    image_column: str | None = None
    """Column of a Hub data set with the images; detected if not given."""
    label_column: str | None = None
    """Column of a Hub data set with the labels; detected if not given."""
    max_train_rows: int | None = setting(None, at_least=1)
    """Train on at most this many images, at least 1."""

    def __post_init__(self):
        if self.dataset is None:
            raise RecipeError('dataset is not given. Name a folder of images, an .npz, a Hub data set, or "digits".')


@dataclass
class SSLTrainingConfig(TrainingArguments):
    """`TrainingArguments` for pre-training.

    Defaults that differ: no gradient clipping (none of these methods' released codes clips), incomplete batches are
    dropped, a cosine schedule, and no reporting service.
    """

    optimizer: str = field(default="sgd", metadata={"choices": ["sgd", "lars", "adamw"]})
    """The optimizer: sgd, lars or adamw."""
    momentum: float = setting(0.9, at_least=0, below=1)
    """Momentum of SGD and LARS, at least 0 and below 1."""
    base_learning_rate: float | None = setting(None, above=0)
    """Above 0: learning_rate = base_learning_rate * images of all ranks / 256."""
    ema_momentum: float | None = None
    """Share of the target network that one step keeps, 0 to 1; not given: the method's default."""
    ema_schedule: str | None = field(default=None, metadata={"choices": ["cosine", "constant"]})
    """How that share changes over the steps; not given: the method's default."""
    probe_learning_rate: float = setting(0.1, above=0)
    """Learning rate of the online probe, above 0; it follows the network's schedule."""
    effective_rank_steps: int = setting(100, at_least=0)
    """Log the effective ranks of the last batch every so many steps, at least 0; 0 never."""
    weight_decay: float = 1e-5
    """Weight decay, at least 0."""
    max_grad_norm: float = 0.0
    """Clip gradients to this norm, at least 0; 0 does not clip."""
    lr_scheduler_type: str = "cosine"
    """One of transformers' learning-rate schedules."""
    dataloader_drop_last: bool = True
    """Must be true: a smaller last batch would have a different loss."""
    remove_unused_columns: bool = False
    """False, because batches do not use the model's argument names."""
    ddp_find_unused_parameters: bool | None = False
    """False, because every trained weight is used in every step."""
    ddp_broadcast_buffers: bool | None = False
    """False, because normalisation over all ranks and gathered keys already keep the buffers equal."""
    per_device_eval_batch_size: int = 256
    """Held-out images at a time, at least 1."""
    report_to: str | list[str] | None = "none"
    """Reporting services to log to."""
    logging_nan_inf_filter: bool = False
    """False: a non-finite loss stops the run and must not be hidden."""

    def __post_init__(self):
        super().__post_init__()
        if self.gradient_accumulation_steps != 1:
            raise RecipeError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not enlarge the batch here: "
                "covariances, negatives and batch normalisation are computed on each micro-batch alone. Use more ranks "
                "or a smaller batch, and set it to 1."
            )
        if self.n_gpu > 1:
            raise RecipeError(
                f"one process sees {self.n_gpu} GPUs, and transformers would split each batch over copies of the "
                f"model, each with its own loss. Start it with `accelerate launch --num_processes {self.n_gpu}`, or "
                "set CUDA_VISIBLE_DEVICES=0."
            )
        if not self.dataloader_drop_last:
            raise RecipeError(
                "dataloader_drop_last=False: the last batch would be smaller and have a different loss. Set it to true."
            )
        if self.deepspeed or self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise RecipeError(
                "deepspeed and fsdp shard the weights, which the target network copies. Launch pre-training with "
                "plain DDP."
            )
        if self.ema_momentum is not None and not 0 <= self.ema_momentum <= 1:
            raise RecipeError(f"ema_momentum={self.ema_momentum} cannot work: it must be from 0 to 1.")
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self.images_per_step / 256

    @property
    def images_per_step(self) -> int:
        """Images of all ranks in one step."""
        return self.per_device_train_batch_size * max(self.n_gpu, 1) * self.world_size


@dataclass
class SSLRecipe:
    """A checked recipe."""

    model: SSLModelArguments
    """The method and the network."""
    data: SSLDataArguments
    """The images."""
    augment: AugmentConfig
    """The two views."""
    training: SSLTrainingConfig
    """How it trains."""
    path: Path
    """The recipe's file."""
    resolved: dict[str, Any]
    """The settings that were given, in the file or on the command line."""


SETTINGS = Settings(
    {"model": SSLModelArguments, "data": SSLDataArguments, "augment": AugmentConfig, "training": SSLTrainingConfig},
    {
        "lr": "write base_learning_rate (at 256 images) or learning_rate",
        "warmup_epochs": "write `warmup_steps: 0.1` for 10 epochs of 100",
        "warmup_ratio": "write `warmup_steps: 0.1` for a tenth of the steps",
        "epochs": "it is called num_train_epochs",
        "batch_size": "it is called per_device_train_batch_size",
        "model_config": "the architecture is backbone_config",
        **dict.fromkeys(
            ["gamma", "preset", "order", "mu", "lambda_", "eps", "temperature", "lambd", "scale"],
            "write it into loss_settings",
        ),
    },
)


def load_ssl_recipe(path: str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> SSLRecipe:
    """Read a flat YAML recipe, apply `--key value` overrides, check everything and build the four dataclasses.

    Args:
        dry_run: build the training settings for the CPU, so that a machine without a GPU can plan a bf16 run.

    Raises:
        RecipeError: a setting that cannot work.
    """
    path = find_recipe(path, "recipes/ssl")
    # 1. Names, types and ranges
    resolved = SETTINGS.read(path, overrides)
    settings = {"output_dir": f"runs/ssl/{path.stem}", **copy.deepcopy(resolved)}
    resolved.pop("hub_token", None)  # a secret: it is passed on, and never written
    # 2. Settings that contradict each other, or would do nothing
    if "optim" in settings:
        raise RecipeError(
            f"{path}: optim={settings['optim']!r} would do nothing here. Write `optimizer: sgd`, lars or adamw."
        )
    if "learning_rate" in settings and "base_learning_rate" in settings:
        raise RecipeError(
            f"{path}: learning_rate and base_learning_rate are both given, and the second sets the first. Give one."
        )
    for key in ("dataset", "eval_dataset"):
        if isinstance(settings.get(key), str):
            settings[key] = find_from_repository(settings[key], path)
    # 3. The dataclasses, which check themselves
    given = SETTINGS.split(settings)
    if dry_run:
        given["training"] |= {"use_cpu": True}
    try:
        model, data = SSLModelArguments(**given["model"]), SSLDataArguments(**given["data"])
        augment, training = AugmentConfig(**given["augment"]), SSLTrainingConfig(**given["training"])
        check_loader(training)
        check_compile(training)
        check_schedule(training, settings)
        check_reports(list(training.report_to or []))
    except MissingOnThisMachineError as error:
        if not dry_run:  # a plan may be for another machine
            raise RecipeError(f"{path}: {error}") from None
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:  # TrainingArguments refuses so
        raise RecipeError(" ".join(f"{path}: {error}".splitlines())) from None
    if not find_method(model.method).target and (
        training.ema_momentum is not None or training.ema_schedule is not None
    ):
        raise RecipeError(
            f"{path}: ema_momentum or ema_schedule is given, but {model.method} has no target network. Remove it."
        )
    return SSLRecipe(model, data, augment, training, path, resolved)
