"""The settings of a pre-training run: what the recipe may say about model, data, augmentation and training, all checked before loading.

>>> # load_ssl_recipe("recipes/ssl/digits.yaml", ["--loss_settings", "{gamma: 0.5}"]).model.loss_settings == {"gamma": 0.5}
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, TrainingArguments

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.reader import Settings, find_from_repository
from matrix_llm.base.values import nearest, setting
from matrix_llm.ssl.augment import AugmentConfig
from matrix_llm.ssl.methods import METHODS, check_loss_settings, method_named

__all__ = ["SSLDataArguments", "SSLModelArguments", "SSLRecipe", "SSLTrainingConfig", "load_ssl_recipe"]

RESNET_50 = {"model_type": "resnet"}  # transformers' own defaults


@dataclass
class SSLModelArguments:
    """The method and the network. Widths that are not given are the paper's."""

    method: str = field(default="matrix_ssl", metadata={"choices": [*METHODS]})
    backbone_config: dict | None = (
        None  # e.g. {"model_type": "resnet", "depths": [2, 2, 2, 2], ...}; not given: ResNet-50
    )
    projector_widths: list[int] | None = None
    predictor_widths: list[int] | None = None
    loss_settings: dict | None = None  # of the method's loss, e.g. {"gamma": 1.0, "order": 4}
    queue_size: int | None = None
    prototypes: int | None = None
    zero_init_residual: bool = True
    online_probe: bool = True  # with labelled images: a linear classifier on detached features, trained along

    def __post_init__(self):
        for name in ("projector_widths", "predictor_widths"):
            widths = getattr(self, name)
            if widths is not None and (not widths or min(widths) < 1):
                raise RecipeError(
                    f"{name}={widths} cannot work: give one width above 0 for each layer, e.g. [2048, 2048, 2048]."
                )
        try:
            check_loss_settings(self.method, self.loss_settings or {})
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if self.backbone_config is not None and not isinstance(self.backbone_config.get("model_type"), str):
            raise RecipeError(
                f"backbone_config={self.backbone_config!r} does not say which architecture. Add model_type, e.g. resnet."
            )
        if self.backbone_config is not None and (kind := self.backbone_config["model_type"]) not in (
            known := (*CONFIG_MAPPING, "small_resnet")
        ):
            raise RecipeError(
                f"backbone_config: model_type={kind!r} is no architecture of transformers.{nearest(kind, known)}"
            )


@dataclass
class SSLDataArguments:
    """Which images. `dataset`: "digits", "synthetic", a folder, an .npz, a CIFAR binary folder, or a Hub id (data.py)."""

    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    eval_dataset: str | None = None  # for the online probe's held-out accuracy
    eval_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    max_train_rows: int | None = setting(None, at_least=1)

    def __post_init__(self):
        if self.dataset is None:
            raise RecipeError('dataset is not given. Name a folder of images, an .npz, a Hub data set, or "digits".')


@dataclass
class SSLTrainingConfig(TrainingArguments):
    """`TrainingArguments` for pre-training.

    Other defaults: no gradient clipping (1.0 in TrainingArguments; no released code of these methods clips), incomplete batches are
    dropped, cosine schedule, no reporting service.
    """

    optimizer: str = field(default="sgd", metadata={"choices": ["sgd", "lars", "adamw"]})
    momentum: float = setting(0.9, at_least=0, below=1)
    base_learning_rate: float | None = setting(
        None, above=0
    )  # learning_rate = base_learning_rate * batch of all ranks / 256
    ema_momentum: float | None = None  # of the target network; not given: the method's
    ema_schedule: str | None = field(default=None, metadata={"choices": ["cosine", "constant"]})
    probe_learning_rate: float = setting(0.1, above=0)  # of the online probe, by the same schedule
    effective_rank_steps: int = setting(
        100, at_least=0
    )  # log effective ranks of the last batch every so many steps; 0: never
    weight_decay: float = 1e-5
    max_grad_norm: float = 0.0
    lr_scheduler_type: str = "cosine"
    dataloader_drop_last: bool = True
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    ddp_broadcast_buffers: bool | None = False  # rank-wide normalisation and gathered keys keep them equal
    per_device_eval_batch_size: int = 256
    report_to: str | list[str] | None = "none"
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.gradient_accumulation_steps != 1:
            raise RecipeError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not enlarge the batch here: covariances, negatives "
                "and batch normalisation are those of each micro-batch alone. Use more ranks or a smaller batch, and set it to 1."
            )
        if self.n_gpu > 1:
            raise RecipeError(
                f"one process sees {self.n_gpu} GPUs, and transformers would split each batch over copies of the model, with a loss for "
                f"each part. Start it with `accelerate launch --num_processes {self.n_gpu}`, or set CUDA_VISIBLE_DEVICES=0."
            )
        if not self.dataloader_drop_last:
            raise RecipeError(
                "dataloader_drop_last=False: the last batch would be smaller, another loss. Set it to true."
            )
        if self.deepspeed or self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise RecipeError(
                "deepspeed and fsdp shard weights, which the target network copies. Launch pre-training with plain DDP."
            )
        if self.ema_momentum is not None and not 0 <= self.ema_momentum <= 1:
            raise RecipeError(f"ema_momentum={self.ema_momentum} cannot work: it must be from 0 to 1.")
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self.images_per_step / 256

    @property
    def images_per_step(self) -> int:
        return self.per_device_train_batch_size * max(self.n_gpu, 1) * self.world_size


@dataclass
class SSLRecipe:
    model: SSLModelArguments
    data: SSLDataArguments
    augment: AugmentConfig
    training: SSLTrainingConfig
    path: Path
    resolved: dict[str, Any]


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
    """Reads a flat YAML recipe, applies `--key value` overrides, checks everything and builds the four dataclasses.

    Args:
        dry_run: build the training settings on the CPU, so that a machine without a GPU can plan a bf16 run.

    Raises:
        RecipeError: a setting that cannot work.
    """
    path = Path(path).expanduser()
    resolved = SETTINGS.read(path, overrides)
    settings = {"output_dir": f"runs/ssl/{path.stem}", **resolved}
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
    given = SETTINGS.split(settings)
    if dry_run:
        given["training"] |= {"use_cpu": True}
    try:
        model = SSLModelArguments(**given["model"])
        recipe = SSLRecipe(
            model,
            SSLDataArguments(**given["data"]),
            AugmentConfig(**given["augment"]),
            SSLTrainingConfig(**given["training"]),
            path,
            resolved,
        )
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"{path}: {error}") from None
    if not method_named(model.method).target and (
        recipe.training.ema_momentum is not None or recipe.training.ema_schedule is not None
    ):
        raise RecipeError(
            f"{path}: ema_momentum or ema_schedule given, but {model.method} has no target network. Remove it."
        )
    return recipe
