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
    try:
        recipe_settings(name, training.token_loss_settings)
    except RecipeError as error:
        raise RecipeError(f"token_loss_settings={training.token_loss_settings}: {error}") from None
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
    if name == "soft_mce" and training.mce_embedding_grad:
        raise RecipeError(
            "mce_embedding_grad=True with token_loss='soft_mce', whose gradient flows into the logits alone. Set "
            "mce_embedding_grad to false."
        )
    if training.mce_target == "teacher":
        clashes = {
            "token_loss": (name not in NEEDS_TEACHER, "has no teacher", f"Choose one of {', '.join(NEEDS_TEACHER)}"),
            "mce_weight": (training.mce_weight == 0, "leaves MCE out", "Give a weight above 0"),
            "mce_solver": (training.mce_solver == "taylor", "takes a label only", "Set it to krylov"),
            "mce_embedding_grad": (training.mce_embedding_grad, "has a gradient for labels only", "Set it to false"),
        }
        for key, (clash, reason, way_out) in clashes.items():
            if clash:
                raise RecipeError(
                    f"mce_target='teacher' with {key}={getattr(training, key)!r}, which {reason}. {way_out}, or set "
                    "mce_target to label."
                )
    loss = f"token_loss={name!r} and mce_weight={training.mce_weight:g}"
    if (epsilon := training.label_smoothing_factor) > 0 and training.uses_matrix_head:
        way_out = "Remove one of them."
        if name == "ce":
            way_out = (
                f"Write `token_loss: label_smoothing` and `token_loss_settings: {{epsilon: {epsilon}}}`, to smooth "
                "CE alone, instead of it, or set mce_weight to 0."
            )
        raise RecipeError(
            f"label_smoothing_factor={epsilon} with {loss}: transformers' smoothing replaces the loss. {way_out}"
        )
    if training.loss_type == "dft" and training.uses_matrix_head:
        way_out = "Remove one of them."
        if name in ("ce", "dft"):
            way_out = "Write `token_loss: dft` instead of it, to which MCE is added, or set mce_weight to 0."
        raise RecipeError(f"loss_type='dft' with {loss}: TRL's DFT replaces the loss. {way_out}")
