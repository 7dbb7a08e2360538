"""Tokenizers, configurations and weights from a folder or the Hub, with failures reported in one line."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import ModelArguments, Recipe


def load_pretrained(key: str, name: str | None, loader: Any, **options: Any) -> Any:
    """loader(name, **options).

    Args:
        key: the setting that holds `name`, for the error.
        name: a folder, or a repository of the Hub.
        loader: a `from_pretrained`.

    Raises:
        RecipeError: no such folder, or `loader` could not read it; one line, with the loader's own reason.
    """
    path = os.path.expanduser(str(name))
    _refuse_gguf(key, path)
    if str(name).startswith((".", "/", "~")) and not os.path.isdir(path):
        raise RecipeError(f"{key}={name!r}: no folder at {os.path.abspath(path)}. Correct the path.")
    try:
        return loader(path if os.path.isdir(path) else name, **options)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        # The Hub client's errors are OSErrors; the others are what files that do not fit together raise
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if "trust_remote_code" in str(error):
            raise RecipeError(
                f"{key}={name!r} comes with Python code of its own, which is not run unless that is asked for. Read "
                "the code, then set trust_remote_code to true (--trust_remote_code)."
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        cannot = "is a folder that cannot be read" if os.path.isdir(path) else "is neither a folder nor on the Hub"
        way_out = "Correct the name, log in, or download it first and give the folder."
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            way_out = f"It holds adapters alone. Add them to their base, and give that: matrix-llm merge {name} FOLDER"
        raise RecipeError(f"{key}={name!r} {cannot}: {reason} {way_out}") from error


def _refuse_gguf(key: str, path: str) -> None:
    """Refuse a .gguf file, or a folder that holds nothing else: transformers would say that it is no folder."""
    files = os.listdir(path) if os.path.isdir(path) else []
    if path.endswith(".gguf") or ("config.json" not in files and any(file.endswith(".gguf") for file in files)):
        raise RecipeError(
            f"{key}={path!r} is a .gguf file, or a folder with one. Make a plain folder of it first, and give that: "
            f"matrix-llm fetch {path} FOLDER"
        )


def load_pretrained_config(
    args: ModelArguments, trust_remote_code: bool, read: PretrainedConfig | None = None
) -> PretrainedConfig:
    """The configuration of `model_name_or_path`, without its weights: a copy of `read`, if it has been read already.

    On the Hub each reading is at least one request. A run reads it once, and passes it on as `read`.
    """
    if read is not None:
        return copy.deepcopy(read)  # models and checks change what they are given
    return load_pretrained(
        "model_name_or_path",
        args.model_name_or_path,
        AutoConfig.from_pretrained,
        revision=args.model_revision,
        trust_remote_code=trust_remote_code,
    )


def read_config(recipe: Recipe) -> PretrainedConfig | None:
    """The configuration of the recipe's `model_name_or_path`; None for a model from scratch."""
    if recipe.model.model_config is not None:
        return None
    return load_pretrained_config(recipe.model, recipe.training.trust_remote_code)
