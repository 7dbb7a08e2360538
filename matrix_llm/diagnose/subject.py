"""What is diagnosed: a model, rows and the settings of a recipe, from what the command line names.

RECIPE        a recipe's own model, rows, template and loss
RUN [ROWS]    the model in a run's folder, with the settings of its recipe.yaml
MODEL ROWS    any model and rows, with the default settings
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import SETTINGS, Recipe, load_recipe, make_recipe
from matrix_llm.loss.choice import NEEDS_TEACHER
from matrix_llm.model.early_checks import check_model
from matrix_llm.model.load import load_model
from matrix_llm.publish.merge import SETTINGS as ADAPTER
from matrix_llm.publish.merge import Adapter, find_adapter, load_merged
from matrix_llm.run.prepare import limit_max_length, prepare_data
from matrix_llm.run.run_folder import RECIPE

READ = 2000  # rows of each data set, unless max_train_rows says otherwise


@dataclass(frozen=True)
class Subject:
    """A model and rows, not loaded yet."""

    recipe: Recipe
    """The settings; its model is the one to diagnose."""
    name: str
    """The model as it was named: a folder, a name on the Hub, or "a random initialisation"."""
    adapter: Adapter | None
    """The LoRA adapter that is merged into the model, if the model is one."""


def find_subject(model: str, rows: str | None, overrides: Sequence[str]) -> Subject:
    """The settings for what the command line names; no weight is read.

    Args:
        model: a recipe, a run's folder, a model's folder or a name on the Hub.
        rows: "builtin", a file, a folder or a name on the Hub; None: those of the recipe or of the run.
        overrides: `--key value` words.

    Raises:
        RecipeError: no such thing, or settings that cannot work.
    """
    folder = Path(model).expanduser()
    stored = folder / RECIPE
    named: dict[str, Any] = {} if rows is None else {"dataset": rows}
    # 1. a recipe
    if not stored.is_file() and rows is None:
        if folder.is_dir():
            raise RecipeError(
                f"{model!r} is a folder without {RECIPE}, so it does not say on which rows. Write "
                f"`diagnose {model} ROWS`, or give a recipe."
            )
        recipe = load_recipe(model, overrides, dry_run=True)
        name = recipe.model.model_name_or_path
        return Subject(recipe, name or "a random initialisation", None)
    if rows is not None and folder.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{model!r} is a recipe, which names its own rows. Write --dataset {rows} for others.")
    # 2. a run, or a model and rows
    given = SETTINGS.read(stored) if stored.is_file() else {}
    changed = SETTINGS.read_overrides(overrides)
    if rows is not None and "dataset" in changed:
        raise RecipeError(f"dataset={changed['dataset']!r}, but the rows are {rows!r}. Give one of them.")
    adapter = find_adapter(model, changed.get("model_name_or_path")) if (folder / ADAPTER).is_file() else None
    if adapter is None and "model_name_or_path" in changed:
        raise RecipeError(
            f"model_name_or_path={changed['model_name_or_path']!r}, but the model is {model!r}. Give one of them."
        )
    named |= _model_settings(model, folder, given, adapter)
    settings = {**given, **named, **changed}
    for key in ("model_config", "tokenizer_vocab_size"):  # of a run from scratch, whose weights and tokenizer are there
        settings.pop(key, None)
    path = stored if stored.is_file() else Path("diagnose")
    recipe = make_recipe(settings, path, {*changed, *named}, dry_run=True)
    return Subject(recipe, model, adapter)


def _model_settings(model: str, folder: Path, given: dict[str, Any], adapter: Adapter | None) -> dict[str, Any]:
    """The settings that name the model and its tokenizer."""
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if adapter is None:
        named = {"model_name_or_path": model}
        if given.get("tokenizer_name_or_path") and has_tokenizer:
            named["tokenizer_name_or_path"] = model
        return named
    named = {"model_name_or_path": adapter.base, "model_revision": adapter.revision or "main"}
    return {**named, "tokenizer_name_or_path": model} if has_tokenizer else named


def not_applied(recipe: Recipe) -> list[str]:
    """The recipe's settings that a diagnosis does not follow, as "key=value: why"."""
    model, training, lines = recipe.model, recipe.training, []
    if model.dtype not in ("float32", "auto"):
        lines.append(f"dtype={model.dtype}: weights and forward are float32 here")
    if _is_for_gpus(model.attn_implementation):
        lines.append(f"attn_implementation={model.attn_implementation}: the model's default attention here")
    if model.quantised_by is not None:
        lines.append(f"{model.quantised_by}=True: weights are not quantised here")
    if training.mce_weight == 0:
        lines.append("mce_weight=0: CE + MCE is shown with the weight 1")
    if training.token_loss in NEEDS_TEACHER:
        lines.append(f"token_loss={training.token_loss}: not shown, since no teacher is loaded here")
    if training.teacher_model_name_or_path is not None:
        lines.append(f"teacher_model_name_or_path={training.teacher_model_name_or_path}: not loaded here")
    if training.mce_embedding_grad:
        lines.append("mce_embedding_grad=True: the gradient through the token vectors is not shown")
    if recipe.data.leakage_check:
        lines.append("leakage_check: test questions are not looked for")
    return lines


def _is_for_gpus(attention: str | None) -> bool:
    """Flash attention and kernels of the Hub, which know neither float32 nor the CPU."""
    return attention is not None and ("flash" in attention or "/" in attention)


def read_rows(recipe: Recipe, say: Callable[[str], None]) -> Any:
    """`Prepared` of the recipe's training rows alone: the first 2,000 of each data set unless it says max_train_rows.

    All are read where a tokenizer is trained on them.

    Raises:
        DataError, RecipeError: as for training.
    """
    check_model(recipe)
    limit_max_length(recipe, say=say)
    most = recipe.data.max_train_rows
    if most is None and recipe.model.tokenizer_vocab_size is None:
        most = READ
    data = dataclasses.replace(
        recipe.data, eval_dataset=None, accuracy_rows=0, accuracy_steps=0, leakage_check=None, max_train_rows=most
    )
    return prepare_data(dataclasses.replace(recipe, data=data), say=say, dry_run=True)


def read_model(subject: Subject, tokenizer: Any) -> PreTrainedModel:
    """The model in float32, with an adapter merged into it.

    Raises:
        RecipeError, ModelError: it cannot be read, or does not fit the tokenizer.
    """
    recipe = subject.recipe
    if subject.adapter is not None:
        return load_merged(subject.adapter, tokenizer, dtype=torch.float32)
    args = dataclasses.replace(recipe.model, dtype="float32", load_in_4bit=False, load_in_8bit=False)
    if _is_for_gpus(args.attn_implementation):
        args = dataclasses.replace(args, attn_implementation=None)
    return load_model(args, tokenizer, seed=recipe.training.seed, trust_remote_code=recipe.training.trust_remote_code)
