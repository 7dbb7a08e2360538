"""The model card: how a checkpoint was made and what it scores. Pushing is `Trainer`'s (`push_to_hub` in the recipe).

python -m matrix_llm.hub card runs/x     # write runs/x/README.md anew, with the scores that eval/ has left in runs/x/eval/
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from matrix_llm.config import Recipe, RecipeError, load_recipe
from matrix_llm.files import write_text
from matrix_llm.report import METRICS, PLOT, last_values, read_metrics

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


BENCHMARK_DATASETS = {
    "gsm8k": ("GSM8K", "openai/gsm8k"),
    "math": ("MATH", "EleutherAI/hendrycks_math"),
    "math500": ("MATH-500", "HuggingFaceH4/MATH-500"),
}


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The result files that eval/gsm8k.py and eval/hendrycks_math.py wrote below a run, in the order of their names."""
    found = []
    for path in sorted((run / "eval").glob("*.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(summary, dict) and "scores" in summary:
            found.append(summary)
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


def model_card(
    recipe: Recipe, entries: list[dict[str, Any]], results: dict[str, Any], evaluations: list[dict[str, Any]] | None = None
) -> ModelCard:
    """README.md of a finished run: what was measured in it, the recipe that made it, and nothing else.

    Args:
        recipe: the resolved recipe.
        entries: the run's metrics.jsonl.
        results: results.json: accuracy before and after, wall time, row counts.
        evaluations: `read_evaluations`.
    """
    base = recipe.model.model_name_or_path
    is_hub_id = base is not None and not Path(base).exists()
    dataset = recipe.data.dataset or ""
    title = Path(str(recipe.training.output_dir)).name
    evaluations = evaluations or []
    eval_results = _eval_results(evaluations)
    data = ModelCardData(
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["trl", "sft", "matrix-llm", *(["matrix-cross-entropy"] if recipe.training.mce_weight > 0 else [])],
        base_model=base if is_hub_id else None,
        datasets=[dataset] if dataset.count("/") == 1 and not Path(dataset).exists() else None,
    )
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
        *_evaluation_lines(evaluations),
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


def write_card(run: Path) -> Path:
    """README.md of a finished run, made anew from what lies in its folder.

    Raises:
        RecipeError: the folder is not a finished run of train.py.
    """
    for name in ("recipe.yaml", "results.json"):
        if not (run / name).is_file():
            raise RecipeError(f"{str(run)!r} has no {name}, so it is not a finished run of matrix_llm/train.py. Give its output_dir.")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    card = model_card(load_recipe(run / "recipe.yaml", [], dry_run=True), read_metrics(run / METRICS), results, read_evaluations(run))
    write_text(run / "README.md", str(card))
    return run / "README.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m matrix_llm.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("card", help="write a run's README.md anew").add_argument("run", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(f"=> {write_card(options.run)}")
    except (RecipeError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
