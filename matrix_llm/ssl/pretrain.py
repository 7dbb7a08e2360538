"""Pre-train an image backbone without labels, from one recipe.

    accelerate launch matrix_llm/ssl/pretrain.py recipes/ssl/digits.yaml [--key value ...]
    python matrix_llm/ssl/pretrain.py recipes/ssl/imagenet_r50_100ep.yaml --dry_run

1. the recipe, its overrides and the output directory are checked; nothing has been loaded yet
2. images are found; --dry_run prints the plan and stops
3. model, trainer, training; metrics.jsonl grows as it goes
4. the backbone for `AutoModel.from_pretrained`, preprocessor_config.json, pretraining/ (with heads and target
   network), recipe.yaml, results.json and README.md (the card) are moved into place
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])
if __name__ == "__main__":
    from matrix_llm.base.threads import wait_passively

    wait_passively()  # before torch is imported

import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import yaml

from matrix_llm.base.console import say
from matrix_llm.base.errors import RecipeError
from matrix_llm.base.files import write_text
from matrix_llm.publish.destination import find_destination, remove_push_settings
from matrix_llm.publish.push import push
from matrix_llm.run.command import Command, exit_process, run_command
from matrix_llm.run.run_folder import (
    CARD,
    METRICS,
    RESULTS,
    STAGING,
    find_resume_checkpoint,
    finish_run_folder,
    move_into_place,
    say_stopped,
    start_run_folder,
)
from matrix_llm.ssl.config import RESNET_50, SSLRecipe, load_ssl_recipe
from matrix_llm.ssl.images.dataset import Images
from matrix_llm.ssl.images.load import load_images

if TYPE_CHECKING:
    from matrix_llm.run.preemption import StopOnSignal
    from matrix_llm.ssl.models.ssl_model import SSLModel

USAGE = "usage: accelerate launch matrix_llm/ssl/pretrain.py RECIPE.yaml [--key value ...] [--dry_run]"
PRETRAINING = "pretraining"


def load_data(recipe: SSLRecipe) -> tuple[Images, Images | None]:
    """The training images, and the labelled held-out images of the online probe.

    Raises:
        RecipeError, ImageDataError: images that cannot be used, or an evaluation without labelled images.
    """
    data = recipe.data
    columns: dict[str, Any] = {
        "config": data.dataset_config,
        "image_column": data.image_column,
        "label_column": data.label_column,
    }
    images = load_images(str(data.dataset), split=data.dataset_split, max_rows=data.max_train_rows, **columns)
    held_out = None if data.eval_dataset is None else load_images(data.eval_dataset, split=data.eval_split, **columns)
    if str(recipe.training.eval_strategy) not in ("no", "IntervalStrategy.NO") and (
        held_out is None or images.labels is None
    ):
        raise RecipeError(
            f"eval_strategy={recipe.training.eval_strategy!r} measures the online probe, which needs labelled images "
            "and eval_dataset. Give eval_dataset, or set eval_strategy to no."
        )
    if recipe.model.online_probe and held_out is not None and images.labels is not None:
        from matrix_llm.base.errors import ProbeError
        from matrix_llm.ssl.evaluation.splits import aligned

        try:
            images, held_out, _ = aligned(images, held_out)  # a folder numbers its classes by itself
        except ProbeError as error:
            raise RecipeError(f"eval_dataset={recipe.data.eval_dataset!r}: {error}") from None
    return images, held_out


def build_model(recipe: SSLRecipe, images: Images) -> "SSLModel":
    """The recipe's model, initialised by its seed; a RecipeError where backbone, images and method do not fit."""
    from transformers import set_seed

    from matrix_llm.ssl.models.ssl_config import SSLConfig
    from matrix_llm.ssl.models.ssl_model import SSLModel

    # 1. The backbone must take the images' channels.
    settings, channels = recipe.model, recipe.augment.channels
    backbone = {**(settings.backbone_config or RESNET_50)}
    if backbone.setdefault("num_channels", channels) != channels:
        raise RecipeError(
            f"backbone_config has num_channels={backbone['num_channels']}, but images have channels={channels}. "
            "Make them equal."
        )
    # 2. The configuration and the model, initialised by the seed
    classes = int(images.labels.max()) + 1 if images.labels is not None and settings.online_probe else 0
    set_seed(recipe.training.seed)
    try:
        config = SSLConfig(
            method=settings.method,
            backbone_config=backbone,
            projector_widths=settings.projector_widths,
            predictor_widths=settings.predictor_widths,
            loss_settings=settings.loss_settings,
            queue_size=settings.queue_size,
            prototypes=settings.prototypes,
            zero_init_residual=settings.zero_init_residual,
            probe_classes=classes,
        )
    except RecipeError as error:
        raise RecipeError(f"{recipe.path}: {error}") from None
    model = SSLModel(config)
    _check_backbone(model, recipe)
    return model


def _check_backbone(model: "SSLModel", recipe: SSLRecipe) -> None:
    """Send one blank image through the backbone: sizes that do not fit would otherwise show only at the first step."""
    import torch

    from matrix_llm.base.modes import evaluation_mode
    from matrix_llm.ssl.models.backbones import feature_dim, pooled

    a, wanted = recipe.augment, feature_dim(model.backbone)
    try:
        with torch.no_grad(), evaluation_mode(model.backbone):
            found = pooled(model.backbone, torch.zeros(1, a.channels, a.image_size, a.image_size)).shape[1]
    except RuntimeError as error:
        raise RecipeError(
            f"backbone_config cannot take images of image_size={a.image_size}: {error}. Correct one of them."
        ) from None
    if found != wanted:
        raise RecipeError(
            f"backbone_config makes {found} features, but its hidden_sizes end at {wanted}. "
            "Give depths and hidden_sizes equally many entries."
        )


def plan_lines(recipe: SSLRecipe, images: Images, model: "SSLModel") -> list[str]:
    """What the run will do, one line for each part; a RecipeError where there are fewer images than one step takes."""
    training, config = recipe.training, model.config
    steps = len(images) // training.images_per_step
    total = training.max_steps if training.max_steps > 0 else int(steps * training.num_train_epochs)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = model.method
    lines = [
        f"images           {len(images):,} of {images.name}, {'without' if images.labels is None else 'with'} labels",
        f"method           {method.title} ({method.paper}), loss settings {config.loss_settings or 'as published'}",
        f"backbone         {type(model.backbone).__name__}, {backbone:,} parameters; trained with heads: {trained:,}",
        f"projector        {' - '.join(map(str, config.projector_widths))}"
        + (f", predictor {' - '.join(map(str, config.predictor_widths))}" if config.predictor_widths else ""),
        f"batch            {training.per_device_train_batch_size} x {training.world_size} process(es) = "
        f"{training.images_per_step} images",
        f"steps            {steps} an epoch, {total} in all; warm-up {training.get_warmup_steps(total)}",
        f"optimizer        {training.optimizer}, learning rate {training.learning_rate:g}"
        + (
            f" = {training.base_learning_rate:g} x {training.images_per_step} / 256"
            if training.base_learning_rate
            else ""
        )
        + f", weight decay {training.weight_decay:g}",
    ]
    if steps == 0:
        raise RecipeError(
            f"{images.name} has {len(images)} images, but one step takes {training.images_per_step}. "
            "Set per_device_train_batch_size lower."
        )
    return lines


def _card(recipe: SSLRecipe, model: "SSLModel", entries: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """README.md: how the backbone was made, and what this run measured."""
    from matrix_llm.publish.card import image_card

    architecture = type(model.backbone).__name__
    card = image_card(
        title=Path(str(recipe.training.output_dir)).name,
        architecture=architecture,
        needs_import="matrix_llm.ssl.modeling" if architecture.startswith("SmallResNet") else None,
        dataset=str(recipe.data.dataset),
        method=recipe.model.method,
        method_title=model.method.title,
        paper=model.method.paper,
        settings=recipe.resolved,
        entries=entries,
        results=results,
    )
    return str(card)


def pretrain(recipe: SSLRecipe, stop: "StopOnSignal", arguments: list[str]) -> None:
    """Steps 2 to 4 of the module's list. A run that `stop` ends early saves a checkpoint and prints how to resume."""
    from accelerate.utils import gather_object

    from matrix_llm.base.files import read_jsonl
    from matrix_llm.publish.card import versions
    from matrix_llm.run.metrics import MetricsFileCallback
    from matrix_llm.run.preemption import resume_command
    from matrix_llm.ssl.training.trainer import SSLTrainer

    training, output = recipe.training, Path(str(recipe.training.output_dir))
    # 2. Images and model
    images, held_out = load_data(recipe)
    model = build_model(recipe, images)
    say("\n".join(f"=> {line}" for line in plan_lines(recipe, images, model)))
    trainer = SSLTrainer(
        model,
        training,
        images=images,
        augment=recipe.augment,
        eval_images=held_out if model.probe is not None else None,
        callbacks=[MetricsFileCallback(), stop],
    )
    # 3. Training; the output directory is written from here on
    resume = find_resume_checkpoint(training)
    if trainer.is_world_process_zero():
        start_run_folder(output, recipe.resolved, {})
        trainer.transform.save(output)  # evaluate.py reads it for checkpoints, too

    clock = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    if stop.stopped:
        say_stopped(
            trainer.state, output, resume_command(arguments, stop.launcher, script="matrix_llm/ssl/pretrain.py")
        )
        trainer.accelerator.wait_for_everyone()
        return
    # 4. What was measured, then the weights and the card
    results: dict[str, Any] = {
        "images": len(images),
        "steps": trainer.state.global_step,
        "processes": training.world_size,
    }
    results["train_seconds"] = round(time.perf_counter() - clock, 1)
    if trainer.eval_dataset is not None:
        results["evaluation"] = trainer.evaluate()
    skipped = sorted(set(gather_object(sorted(trainer.skipped))))  # of all processes
    results["skipped_images"] = len(skipped)
    if skipped:
        say(f"=> {len(skipped)} unreadable image(s) were skipped, e.g. {skipped[0]}")
    if trainer.is_world_process_zero():
        staging = output / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        model.backbone.save_pretrained(staging)
        model.save_pretrained(staging / PRETRAINING)
        move_into_place(staging, output)
        results["versions"] = versions()
        write_text(output / RESULTS, json.dumps(results, indent=2) + "\n")
        write_text(output / CARD, _card(recipe, model, read_jsonl(output / METRICS), results))
        finish_run_folder(output)
        say(
            f"=> {output}/ holds the backbone, preprocessor_config.json, {PRETRAINING}/, recipe.yaml, {METRICS}, "
            "results.json and README.md"
        )
    trainer.accelerator.wait_for_everyone()


def print_plan(recipe: SSLRecipe) -> None:
    """What --dry_run shows: the recipe as resolved, and the plan of the run."""
    images, _ = load_data(recipe)
    say(f"# {recipe.path}, resolved\n{yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)}")
    say("\n".join(plan_lines(recipe, images, build_model(recipe, images))))


def main(arguments: list[str] | None = None) -> int:
    """Pre-train, or print the plan, as the arguments say. Returns the exit status (matrix_llm/run/command.py)."""
    command = Command(
        usage=USAGE,
        load_recipe=load_ssl_recipe,
        find_destination=find_destination,
        remove_push_settings=remove_push_settings,
        print_plan=print_plan,
        train=pretrain,
        push=push,
    )
    return run_command(command, arguments)


if __name__ == "__main__":
    exit_process(main())
