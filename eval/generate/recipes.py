"""The recipe.yaml that a training run saved with a model: it names the prompt that the model was trained with."""

from pathlib import Path
from typing import Any

from matrix_llm.base.errors import EvalError

from ..text import first_line
from .models import Source


def read_recipe(source: Source) -> dict[str, Any] | None:
    """The recipe in a model's folder, above a checkpoint-123 folder, or in a Hub repository; None if there is none."""
    folder = Path(source.adapter or source.base)
    if not folder.is_dir():
        path = _download_recipe(source)
        return _read(path) if path else None
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    path = next((place / "recipe.yaml" for place in places if (place / "recipe.yaml").is_file()), None)
    return _read(path) if path else None


def _download_recipe(source: Source) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.base, "recipe.yaml", revision=source.base_commit))
    except Exception:  # most repositories have none, and there may be no network: the Hub's client has a class for each
        return None


def _read(path: Path) -> dict[str, Any]:
    import yaml

    from matrix_llm.base.safe_yaml import read_yaml

    try:
        recipe = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvalError(
            f"{path} cannot be read ({first_line(error)}). Repair it, or name a prompt with --prompt."
        ) from None
    if not isinstance(recipe, dict):
        raise EvalError(f"{path} is not a mapping of settings. Repair it, or name a prompt with --prompt.")
    return recipe
