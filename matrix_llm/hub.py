"""The model card: how a checkpoint was made and what it scores. Pushing is `Trainer`'s (`push_to_hub` in the recipe)."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from matrix_llm.config import Recipe
from matrix_llm.report import PLOT, last_values

PAPER = "https://arxiv.org/abs/2305.17326"
PACKAGES = ("matrix-llm", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed")


def versions() -> dict[str, str]:
    """Installed versions of what a run depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _loss_sentence(recipe: Recipe) -> str:
    training = recipe.training
    if training.mce_weight == 0:
        return "The loss is token cross-entropy alone (`mce_weight: 0`)."
    solver = {
        "krylov": "Lanczos quadrature",
        "exact": "the dense matrix logarithm",
        "taylor": f"the Taylor series of order {training.mce_order}",
    }
    return (
        f"The loss is token cross-entropy plus {training.mce_weight:g} times the token-level matrix cross-entropy "
        f"-e_y^T log(Q) e_y of section 7 of [Zhang et al., ICML 2024]({PAPER}), evaluated by {solver[training.mce_solver]}."
    )


def model_card(recipe: Recipe, entries: list[dict[str, Any]], results: dict[str, Any]) -> ModelCard:
    """README.md of a finished run: what was measured in it, the recipe that made it, and nothing else.

    Args:
        recipe: the resolved recipe.
        entries: the run's metrics.jsonl.
        results: results.json: accuracy before and after, wall time, row counts.
    """
    base = recipe.model.model_name_or_path
    is_hub_id = base is not None and not Path(base).exists()
    dataset = recipe.data.dataset or ""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["trl", "sft", "matrix-llm", *(["matrix-cross-entropy"] if recipe.training.mce_weight > 0 else [])],
        base_model=base if is_hub_id else None,
        datasets=[dataset] if dataset.count("/") == 1 and not Path(dataset).exists() else None,
    )
    title = Path(str(recipe.training.output_dir)).name
    source = f"`{base}`" if base else "a random initialisation"
    lines = [
        f"# {title}",
        "",
        f"Fine-tuned from {source} on `{dataset}` with matrix_llm. {_loss_sentence(recipe)}",
        "",
        "## Measured in this run",
        "",
        "| quantity | value |",
        "|---|---|",
    ]
    for when in ("before", "after"):
        if (a := results.get(f"accuracy_{when}")) is not None:
            lines.append(
                f"| greedy accuracy {when} training, {a['total']} held-out problems | {100 * a['accuracy']:.1f} % "
                f"(95 % interval {100 * a['low']:.1f} to {100 * a['high']:.1f}) |"
            )
    names = ("ce", "mce", "mean_token_accuracy", "eval_ce", "eval_mce", "effective_rank")
    lines += [f"| last logged {name} | {value:.4g} |" for name, value in last_values(entries, names).items()]
    lines += [f"| {name} | {results[name]} |" for name in ("steps", "train_rows", "train_seconds") if name in results]
    lines += [
        "",
        f"![Cross-entropy and matrix cross-entropy]({PLOT})",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))
