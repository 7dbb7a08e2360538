"""Tokenizers, configurations and weights from a folder or the Hub, with failures reported in one line."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import ModelArguments


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
        raise RecipeError(
            f"{key}={name!r} {cannot}: {reason} Correct the name, log in, or download it first and give the folder."
        ) from error


def load_pretrained_config(args: ModelArguments, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of `model_name_or_path`, without its weights."""
    return load_pretrained(
        "model_name_or_path",
        args.model_name_or_path,
        AutoConfig.from_pretrained,
        revision=args.model_revision,
        trust_remote_code=trust_remote_code,
    )
