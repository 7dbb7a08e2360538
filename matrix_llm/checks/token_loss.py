"""Which loss a recipe trains on: `token_loss`, its settings, and its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matrix_llm.base.errors import RecipeError
from matrix_llm.loss.choice import NEEDS_TEACHER, recipe_settings

if TYPE_CHECKING:
    from matrix_llm.config import MatrixConfig


def check_token_loss(training: MatrixConfig) -> None:
    """Refuse settings of the loss that are unknown, out of range, or would do nothing.

    Raises:
        RecipeError: with the key, its value, and the way out.
    """
    name, teacher = training.token_loss, training.teacher_model_name_or_path
    recipe_settings(name, training.token_loss_settings)
    if name in NEEDS_TEACHER and teacher is None and name != "asft":  # whose reference can be the base under LoRA
        raise RecipeError(
            f"token_loss={name!r} has another model's distribution as its target, but teacher_model_name_or_path is "
            "not given. Give a folder or a Hub id."
        )
    if teacher is not None and name not in NEEDS_TEACHER:
        raise RecipeError(
            f"teacher_model_name_or_path={teacher!r} with token_loss={name!r}, which reads no teacher. Remove it, or "
            f"set token_loss to one of {', '.join(NEEDS_TEACHER)}."
        )
    if training.label_smoothing_factor > 0 and (training.mce_weight > 0 or name != "ce"):
        epsilon = (
            f"token_loss: label_smoothing with token_loss_settings: {{epsilon: {training.label_smoothing_factor}}}"
        )
        way_out = f"Write `{epsilon}`, which smooths CE alone" if name == "ce" else "Remove one of them"
        raise RecipeError(
            f"label_smoothing_factor={training.label_smoothing_factor} with token_loss={name!r} and mce_weight="
            f"{training.mce_weight}: transformers' smoothing replaces the loss. {way_out}."
        )
    if training.loss_type == "dft" and (training.mce_weight > 0 or name != "ce"):
        way_out = "Write `token_loss: dft`, to which MCE is added" if name in ("ce", "dft") else "Remove one of them"
        raise RecipeError(
            f"loss_type='dft' with token_loss={name!r} and mce_weight={training.mce_weight}: TRL's DFT replaces the "
            f"loss. {way_out}, and remove loss_type."
        )
