"""Metrics that choose a checkpoint, stop a run early or lower the learning rate: they must exist, and be measured."""

from collections.abc import Mapping
from typing import Any

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import nearest
from matrix_llm.loss.choice import HAS_FLOOR

# Which way each metric improves. transformers takes every name that does not end in "loss" as higher-is-better.
HIGHER_IS_BETTER = {
    **dict.fromkeys(["ce", "mce", "token_loss", "divergence", "entropy", "aux_loss", "peak_memory_gib"], False),
    **dict.fromkeys(["accuracy", "mean_token_accuracy", "effective_rank", "tokens_per_second", "mfu"], True),
}
# What an evaluation of held-out rows returns. Speeds are not a measure of a checkpoint.
MEASURED = ["loss", "ce", "mce", "token_loss", "divergence", "entropy", "mean_token_accuracy", "aux_loss"]


def is_higher_better(metric: str) -> bool | None:
    """Which way one of our own metrics improves; None for another name.

    >>> is_higher_better("eval_ce"), is_higher_better("eval_gsm8k_mean_token_accuracy")
    (False, True)
    """
    found = [higher for name, higher in HIGHER_IS_BETTER.items() if f"_{metric}".endswith(f"_{name}")]
    return found[0] if found else None


def check_metric(training: Any, given: Mapping[str, Any]) -> None:
    """Refuse a metric that held-out rows do not give, that nothing reads, or that is wanted and not evaluated.

    Raises:
        RecipeError: metric_for_best_model, load_best_model_at_end, save_strategy or early_stopping_patience would end
            the run at its first evaluation, or do nothing.
    """
    metric, evaluates = training.metric_for_best_model, training.eval_strategy != "no"
    # 1. Who reads it
    readers = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy": training.save_strategy == "best",
        "early_stopping_patience": getattr(training, "early_stopping_patience", None),
        "lr_scheduler_type": training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
    }
    reader = next((key for key, reads in readers.items() if reads), None)
    if reader is None:
        choosing = ("metric_for_best_model", "greater_is_better")
        if key := next((key for key in choosing if given.get(key) is not None), None):
            raise RecipeError(
                f"{key}={given[key]!r} does nothing: no checkpoint is chosen by it. Write `load_best_model_at_end: "
                "true` or early_stopping_patience, or remove it."
            )
        return
    # 2. Whether it is there
    value = getattr(training, reader)
    value = getattr(value, "value", value)
    if not evaluates:
        raise RecipeError(
            f"{reader}={value!r} needs held-out rows during training, but eval_strategy is no. Write `eval_strategy: "
            "steps` and eval_dataset."
        )
    if metric is None:
        raise RecipeError(
            f"{reader}={value!r} needs a metric to compare. Write `metric_for_best_model: eval_loss`, or another of "
            f"{', '.join(MEASURED)}."
        )
    # 3. Whether it is one that exists: eval_ce, or eval_NAME_ce if eval_dataset names its data sets
    sets = given.get("eval_dataset")
    names = list(sets) if isinstance(sets, dict) and "path" not in sets else []
    known = [f"{name}_{each}" for name in names for each in MEASURED] if names else MEASURED
    wanted = metric.removeprefix("eval_")
    if wanted not in known:
        raise RecipeError(
            f"metric_for_best_model={metric!r} is not measured on held-out rows. Choose one of "
            f"{', '.join(f'eval_{each}' for each in known)}.{nearest(wanted, known)}"
        )
    if wanted.endswith("token_loss") and training.token_loss == "ce":
        raise RecipeError(
            f"metric_for_best_model={metric!r} with token_loss='ce': that is eval_ce. Write it, or choose a token_loss."
        )
    if wanted.endswith("divergence") and training.token_loss not in HAS_FLOOR:
        raise RecipeError(
            f"metric_for_best_model={metric!r} with token_loss={training.token_loss!r}: only {' and '.join(HAS_FLOOR)} "
            "measure it. Write `metric_for_best_model: eval_loss`."
        )
    # 4. CE and MCE are not measured of a run that trains another loss: its eval_loss is that loss
    others = {"loss_type": training.loss_type == "dft", "label_smoothing_factor": training.label_smoothing_factor > 0}
    other = next((key for key, trains in others.items() if trains), None)
    if other is not None and wanted.rpartition("_")[2] in ("ce", "mce"):
        raise RecipeError(
            f"metric_for_best_model={metric!r} is not measured with {other}={getattr(training, other)!r}, which trains "
            f"another loss. Write `metric_for_best_model: {metric[: -len(wanted.rpartition('_')[2])]}loss`."
        )


def check_best_is_saved(given: Mapping[str, Any]) -> None:
    """Refuse load_best_model_at_end where checkpoints are not saved when held-out rows are evaluated."""
    evaluated, saved = given.get("eval_strategy", "no"), given.get("save_strategy", "steps")
    if not given.get("load_best_model_at_end") or saved in ("best", evaluated):
        return
    way_out = f"`save_strategy: {evaluated}`" if evaluated != "no" else f"`eval_strategy: {saved}`"
    raise RecipeError(
        f"load_best_model_at_end=True with eval_strategy={evaluated!r} and save_strategy={saved!r}: the best weights "
        f"would not be measured and saved together. Write {way_out}."
    )
