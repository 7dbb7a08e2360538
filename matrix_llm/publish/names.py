"""Names of models and data sets on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.data.readers import looks_local


def is_hub_name(source: str | None) -> bool:
    """Whether a recipe's model or data set can only be on the Hub, so that a card may link to it."""
    if source is None or looks_local(source) or Path(source).exists():
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def check_repository_name(name: str, key: str) -> None:
    """Refuse a name that no repository on the Hub can have, or that does not say whose it is.

    Args:
        name: "user/name" or "organisation/name".
        key: the setting or flag that gave it, for the message.

    Raises:
        RecipeError: the name cannot be used.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RecipeError(
            f"{key}={name!r} is not a valid Hub repository name: {one_line(error)}. Use user/name."
        ) from None
    if name.count("/") != 1:
        raise RecipeError(f"{key}={name!r} does not say whose repository it is. Use user/name or organisation/name.")
