"""Pre-train an image backbone without labels, from one recipe.

    accelerate launch matrix_llm/ssl/pretrain.py recipes/ssl/digits.yaml [--key value ...]
    python matrix_llm/ssl/pretrain.py recipes/ssl/imagenet_r50_100ep.yaml --dry_run

1. the recipe, its overrides and the output directory are checked; nothing has been loaded yet
2. images are found; --dry_run prints the plan and stops
3. model, trainer, training; metrics.jsonl grows as it goes
4. the backbone for `AutoModel.from_pretrained`, preprocessor_config.json, pretraining/ (heads and target network
too), recipe.yaml,
   results.json and README.md (the card) are moved into place
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import json
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import yaml

from matrix_llm.base.errors import ImageDataError, RecipeError, scrub
from matrix_llm.base.files import write_text
from matrix_llm.publish.push import destination_of, push
from matrix_llm.run.run_folder import (
    PARTIAL,
    begin,
    check_output_dir,
    leave,
    move_into_place,
    one_line,
    resume_path,
    say,
    say_stopped,
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

    settings, channels = recipe.model, recipe.augment.channels
    backbone = {**(settings.backbone_config or RESNET_50)}
    if backbone.setdefault("num_channels", channels) != channels:
        raise RecipeError(
            f"backbone_config has num_channels={backbone['num_channels']}, but images have channels={channels}. "
            "Make them equal."
        )
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


def card(recipe: SSLRecipe, model: "SSLModel", entries: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """README.md: how the backbone was made, and what this run measured."""
    from huggingface_hub import ModelCard, ModelCardData

    from matrix_llm.publish.card import recipe_and_versions
    from matrix_llm.run.metrics import last_values

    title = Path(str(recipe.training.output_dir)).name
    small = type(model.backbone).__name__.startswith("SmallResNet")
    names = (
        "loss",
        "online_probe_accuracy",
        "eval_online_probe_accuracy",
        "effective_rank",
        "feature_effective_rank",
        "effective_rank_rows",
    )
    tags = ["self-supervised", "matrix-llm", recipe.model.method]
    data = ModelCardData(library_name="transformers", pipeline_tag="image-feature-extraction", tags=tags)
    lines = [
        f"# {title}",
        "",
        f"A {type(model.backbone).__name__} pre-trained without labels on `{recipe.data.dataset}` by {model.method.title} "
        f"({model.method.paper}), with matrix_llm. Not fine-tuned: put a head on it.",
        "",
        "```python",
        *(["import matrix_llm.ssl.modeling  # the stem for small images"] if small else []),
        "from transformers import AutoModel",
        "",
        f'backbone = AutoModel.from_pretrained("{title}")',
        "```",
        "",
        "| quantity, last logged | value |",
        "|---|---|",
        *[f"| {name} | {value:.4g} |" for name, value in last_values(entries, names).items()],
        *[f"| {name} | {results[name]} |" for name in ("images", "steps", "processes", "skipped_images", "train_seconds")],
        "",
        "Effective ranks are those of one batch of `effective_rank_rows` images, biased low. The online probe is trained along on "
        "augmented images; it is not the linear evaluation protocol, whose results are below `eval/`.",
        "",
        *recipe_and_versions(recipe.resolved),
    ]  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def pretrain(recipe: SSLRecipe, stop: "StopOnSignal", arguments: list[str]) -> None:
    """Steps 2 to 4 of the module's list. A run that `stop` ends early leaves a checkpoint and prints how to go on."""
    from accelerate.utils import gather_object

    from matrix_llm.base.files import read_jsonl
    from matrix_llm.publish.card import versions
    from matrix_llm.run.metrics import METRICS, MetricsFileCallback
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
    resume = resume_path(training)
    if trainer.is_world_process_zero():
        begin(output, recipe.resolved, {})
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
        staging = output / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        model.backbone.save_pretrained(staging)
        model.save_pretrained(staging / PRETRAINING)
        move_into_place(staging, output)
        results["versions"] = versions()
        write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
        write_text(output / "README.md", card(recipe, model, read_jsonl(output / METRICS), results))
        (output / PARTIAL).unlink(missing_ok=True)
        say(
            f"=> {output}/ holds the backbone, preprocessor_config.json, {PRETRAINING}/, recipe.yaml, {METRICS}, "
            "results.json and README.md"
        )
    trainer.accelerator.wait_for_everyone()


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr where the recipe or the images cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    dry_run = any(a in ("--dry_run", "--dry-run") for a in arguments)
    arguments = [a for a in arguments if a not in ("--dry_run", "--dry-run")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    from matrix_llm.run.preemption import stop_on_signals

    try:
        recipe = load_ssl_recipe(arguments[0], arguments[1:], dry_run=dry_run)
        if dry_run:
            images, _ = load_data(recipe)
            say(f"# {recipe.path}, resolved\n{yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)}")
            say("\n".join(plan_lines(recipe, images, build_model(recipe, images))))
            return 0
        destination = destination_of(recipe)
        check_output_dir(recipe.training, recipe.resolved)
        with stop_on_signals() as stop:
            pretrain(recipe, stop, arguments)
        if destination is not None and not stop.stopped:
            say(f"=> {push(Path(str(recipe.training.output_dir)), destination)}")
    except (RecipeError, ImageDataError, ValueError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {scrub(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: aborted, without saving.", file=sys.stderr)
        return 130
    except Exception as error:
        line = one_line(error, Path(str(recipe.training.output_dir)))
        if line is None:
            raise
        print(f"error: {scrub(line)}" if line else "", end="\n" if line else "", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
