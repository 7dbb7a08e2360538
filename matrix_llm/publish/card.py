"""The model card of a run: how a checkpoint was made and what it scored. `python -m matrix_llm.hub card runs/x` writes it anew."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.files import read_jsonl, write_text
from matrix_llm.config import DataArguments, MatrixConfig, ModelArguments, Recipe
from matrix_llm.data.readers import looks_local
from matrix_llm.run.metrics import METRICS, PLOT, last_values

PROCESSOR = "preprocessor_config.json"  # in the folder of an image backbone (ssl/pretrain.py), where a language model has a tokenizer
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
    rising = training.mce_warmup_steps
    until = (
        f", rising to it over the first {f'{rising:g} steps' if rising >= 1 else f'{100 * rising:g} % of the steps'},"
        if rising
        else ""
    )
    return (
        f"The loss is token cross-entropy plus {training.mce_weight:g} times{until} the token-level matrix cross-entropy "
        f"-e_y^T log(Q) e_y of section 7 of [Zhang et al., ICML 2024]({PAPER}), evaluated by {solver[training.mce_solver]}."
    )


BENCHMARK_DATASETS = {
    "gsm8k": ("GSM8K", "openai/gsm8k"),
    "math": ("MATH", "EleutherAI/hendrycks_math"),
    "math500": ("MATH-500", "HuggingFaceH4/MATH-500"),
}


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The result files that eval/gsm8k.py and eval/hendrycks_math.py wrote below a run, in the order of their names."""
    found = []
    for path in sorted((run / "eval").glob("*.json")):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(summary, dict) and "scores" in summary:
                found.append({**summary, "name": summary["name"]})
                for score in summary["scores"].values():
                    _ = [score[key] + 0.0 for key in ("accuracy", "low", "high", "total")]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RecipeError(
                f"{path} is not a result file as eval/ writes it. Remove it, or make it anew with eval/regrade.py."
            ) from None
    return found


def _eval_results(evaluations: list[dict[str, Any]]) -> list[EvalResult]:
    """Whole public benchmarks in the `model-index` form that the Hub reads; a part of one, or a file of one's own, stays out."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=BENCHMARK_DATASETS[summary["name"]][1],
            dataset_name=BENCHMARK_DATASETS[summary["name"]][0],
            metric_type="accuracy",
            metric_name=f"accuracy, {convention} convention",
            metric_value=round(100 * score["accuracy"], 2),
        )
        for summary in evaluations
        if summary["name"] in BENCHMARK_DATASETS and not summary.get("limit")
        for convention, score in summary["scores"].items()
    ]


def _evaluation_lines(evaluations: list[dict[str, Any]]) -> list[str]:
    if not evaluations:
        return []
    lines = [
        "## Benchmarks",
        "",
        "| benchmark | convention | accuracy | 95 % interval | problems | prompt | engine |",
        "|---|---|---|---|---|---|---|",
    ]
    for summary in evaluations:
        settings = summary.get("settings", {})
        for convention, score in summary["scores"].items():
            interval = f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"
            lines.append(
                f"| {summary['name']} | {convention} | {100 * score['accuracy']:.1f} % | {interval} | {score['total']} "
                f"| {settings.get('prompt', '')} | {settings.get('engine', '')} |"
            )
    return [*lines, ""]


def recipe_and_versions(resolved: dict[str, Any]) -> list[str]:
    """The last two sections of every card."""
    return [
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(
            {k: v for k, v in resolved.items() if k != "hub_token"}, sort_keys=False, allow_unicode=True
        ).strip(),
        "```",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
    ]


def model_card(
    recipe: Recipe,
    entries: list[dict[str, Any]],
    results: dict[str, Any],
    evaluations: list[dict[str, Any]] | None = None,
    *,
    licence: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """README.md of a finished run: what was measured in it, the recipe that made it, and nothing else.

    Args:
        recipe: the resolved recipe.
        entries: the run's metrics.jsonl.
        results: results.json: accuracy before and after, wall time, row counts.
        evaluations: `read_evaluations`.
        licence: as the Hub spells it, e.g. "llama2" or "apache-2.0".
        base_model: the base model's Hub name, where the recipe names a folder.
    """
    base, adapter = base_model or recipe.model.model_name_or_path, recipe.model.use_peft
    dataset = recipe.data.dataset or ""
    title = Path(str(recipe.training.output_dir)).name
    evaluations = evaluations or []
    eval_results = _eval_results(evaluations)
    data = ModelCardData(
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=licence,
        tags=[
            *("trl", "sft", "matrix-llm"),
            *(["lora"] if adapter else []),
            *(["matrix-cross-entropy"] if recipe.training.mce_weight > 0 else []),
        ],
        base_model=base if is_hub_name(base) else None,
        datasets=[dataset] if dataset.count("/") == 1 and is_hub_name(dataset) else None,
    )
    source = f"`{base}`" if base else "a random initialisation"
    lines = [
        f"# {title}",
        "",
        f"{'A LoRA adapter, trained on top of' if adapter else 'Fine-tuned from'} {source} on `{dataset}` with matrix_llm. "
        + _loss_sentence(recipe),
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
        *_evaluation_lines(evaluations),
        *recipe_and_versions(recipe.resolved),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def is_hub_name(source: str | None) -> bool:
    """Whether a recipe's model or data set can only be one of the Hub's, which a card may link to."""
    return (
        source is not None
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None
        and not (looks_local(source) or Path(source).exists())
    )


def stored_recipe(run: Path) -> Recipe:
    """recipe.yaml of a run, without the checks of a run to come: its data may lie on another machine by now."""
    for name in ("recipe.yaml", "results.json"):
        if not (run / name).is_file():
            raise RecipeError(
                f"{str(run)!r} has no {name}, so it is not a finished run of matrix_llm/train.py. Give its output_dir."
            )
    settings = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))

    def part(cls: type, *names: str) -> Any:
        return SimpleNamespace(**{name: settings.get(name, getattr(cls, name)) for name in names})

    training = part(MatrixConfig, "mce_weight", "mce_warmup_steps", "mce_solver", "mce_order")
    training.output_dir = str(run.resolve())  # it may have been moved
    model, data = part(ModelArguments, "model_name_or_path", "use_peft"), part(DataArguments, "dataset")
    return Recipe(model=model, data=data, training=training, path=run / "recipe.yaml", resolved=settings)


def is_image_run(run: Path) -> bool:
    return (run / PROCESSOR).is_file()


def _licence_of(folder: Path) -> str | None:
    """The licence that a folder's README.md states."""
    try:
        return (
            ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
            if (folder / "README.md").is_file()
            else None
        )
    except (OSError, ValueError):
        return None


def card_of(run: Path, recipe: Recipe, licence: str | None, base_model: str | None) -> str:
    results, base = json.loads((run / "results.json").read_text(encoding="utf-8")), recipe.model.model_name_or_path
    licence = licence or _licence_of(run) or (_licence_of(Path(base)) if base else None)
    return str(
        model_card(
            recipe, read_jsonl(run / METRICS), results, read_evaluations(run), licence=licence, base_model=base_model
        )
    )


def write_card(run: Path, *, licence: str | None = None, base_model: str | None = None) -> Path:
    """README.md of a finished run, made anew from what lies in its folder. Without `licence`, the one of the old card or the base stays.

    Raises:
        RecipeError: the folder is not a finished run of train.py.
    """
    if is_image_run(run):
        raise RecipeError(
            f"{str(run)!r} is a run of ssl/pretrain.py, which wrote its card. Edit README.md there; push sends it as it is."
        )
    write_text(run / "README.md", card_of(run, stored_recipe(run), licence, base_model))
    return run / "README.md"
