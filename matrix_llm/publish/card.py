"""The model card (README.md) of a run: how it was trained, what was measured, its recipe, and the installed versions.

`model_card` is for language models, `image_card` for image backbones; the texts are in templates/. `write_card` renders
the card of a finished run again, e.g. after an evaluation: `python -m matrix_llm.hub card runs/x`.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.base.files import read_jsonl, write_text
from matrix_llm.config import Recipe
from matrix_llm.data.entries import names_of
from matrix_llm.loss.choice import LOSSES, recipe_settings
from matrix_llm.publish.base_model import find_base_model, licence_in
from matrix_llm.publish.finished_run import (
    CARD,
    RESULTS,
    Diagnosis,
    Evaluation,
    RunSettings,
    Score,
    is_image_run,
    read_diagnosis,
    read_evaluations,
    read_json,
    read_settings,
    recipe_yaml,
)
from matrix_llm.publish.markdown import TEMPLATES, percent
from matrix_llm.publish.names import is_hub_name
from matrix_llm.run.metrics import METRICS, PLOT, last_values

PAPER = "https://arxiv.org/abs/2305.17326"
PACKAGES = ("matrix-llm", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed")
BENCHMARKS = {  # eval/'s name: (the Hub's title, the data set on the Hub)
    "gsm8k": ("GSM8K", "openai/gsm8k"),
    "math": ("MATH", "EleutherAI/hendrycks_math"),
    "math500": ("MATH-500", "HuggingFaceH4/MATH-500"),
    "aime24": ("AIME 2024", "HuggingFaceH4/aime_2024"),
    "aime25": ("AIME 2025", "math-ai/aime25"),
    "amc23": ("AMC 2023", "math-ai/amc23"),
    "olympiadbench": ("OlympiadBench (English text-only maths)", "Hothan/OlympiadBench"),
    "gsm_plus": ("GSM-Plus", "qintongli/GSM-Plus"),
    "gsm_plus_mini": ("GSM-Plus testmini", "qintongli/GSM-Plus"),
    "gsm_symbolic": ("GSM-Symbolic", "apple/GSM-Symbolic"),
    "gsm_symbolic_p1": ("GSM-Symbolic P1", "apple/GSM-Symbolic"),
    "gsm_symbolic_p2": ("GSM-Symbolic P2", "apple/GSM-Symbolic"),
}
LOGGED = (
    "ce", "mce", "token_loss", "divergence", "mean_token_accuracy",
    "eval_ce", "eval_mce", "eval_token_loss", "eval_divergence", "effective_rank",
)  # fmt: skip
LOGGED_FOR_IMAGES = (
    "loss",
    "online_probe_accuracy",
    "eval_online_probe_accuracy",
    "effective_rank",
    "feature_effective_rank",
    "effective_rank_rows",
)


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --------------------------------------------------------------------------------------------------- language models


def model_card(
    recipe: Recipe | RunSettings,
    entries: list[dict[str, Any]],
    results: Mapping[str, Any],
    evaluations: Sequence[Evaluation] = (),
    before: Sequence[Evaluation] = (),
    *,
    diagnosis: Diagnosis | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """The card of a finished run of train.py.

    Args:
        recipe: the recipe just trained, or the settings stored in a run.
        entries: the run's metrics.jsonl.
        results: the run's results.json: accuracy before and after training, row counts, wall time.
        evaluations: benchmark scores. Those on complete public benchmarks also enter the front matter's `model-index`.
        before: benchmark scores of the base model, shown where it was asked the same problems in the same way.
        diagnosis: of `matrix-llm diagnose`, if it was asked to put one on the card.
        licence: as the Hub spells it, e.g. "llama2" or "apache-2.0"; None: that of the base model, if it is a folder.
        base_model: the base model's name on the Hub, where the recipe names a folder; None: as `matrix-llm fetch`
            noted it in that folder.
    """
    run = recipe if isinstance(recipe, RunSettings) else RunSettings.of_recipe(recipe)
    found = find_base_model(run.model_name_or_path)
    base = base_model or found.name
    return _render(
        "language_model.md.jinja",
        _front_matter(run, base, licence or found.licence, evaluations),
        settings=run.given,
        title=run.title,
        base_model=base,
        base_note="" if base_model else found.note,
        use_peft=run.use_peft,
        dataset=", ".join(names_of(run.dataset)),
        token_loss="" if run.token_loss == "ce" else run.token_loss,
        token_loss_settings=_settings(run),
        teacher=find_base_model(run.teacher_model_name_or_path).name,
        mce_weight=f"{run.mce_weight:g}",
        warmup=_warmup(run.mce_warmup_steps),
        solver=_solver(run),
        vectors=_vectors(run.mce_embeddings),
        paper=PAPER,
        plot=PLOT,
        measured=_measured(entries, results),
        evaluations=evaluations,
        before=_scores_before(evaluations, before),
        diagnosis=diagnosis,
    )


def _front_matter(
    run: RunSettings, base: str | None, licence: str | None, evaluations: Sequence[Evaluation]
) -> ModelCardData:
    """What the Hub indexes."""
    eval_results = _eval_results(evaluations)
    tags = ["trl", "sft", "matrix-llm"]
    if run.use_peft:
        tags.append("lora")
    if run.mce_weight > 0:
        tags.append("matrix-cross-entropy")
    if run.token_loss in LOSSES and run.token_loss != "ce":
        tags.append(run.token_loss.replace("_", "-"))
    return ModelCardData(
        model_name=run.title if eval_results else None,  # the Hub wants it for a model-index, and only then
        eval_results=eval_results or None,
        library_name="peft" if run.use_peft else "transformers",
        pipeline_tag="text-generation",
        license=licence,
        tags=tags,
        base_model=base if is_hub_name(base) else None,
        datasets=[each for each in names_of(run.dataset) if "/" in each and is_hub_name(each)] or None,
    )


def _scores_before(after: Sequence[Evaluation], before: Sequence[Evaluation]) -> dict[tuple[str, str], Score]:
    """{(benchmark, convention): score of the base model}, where it was asked the same problems with the same prompt."""
    scores = {}
    for each in after:
        for base in before:
            if (base.name, base.prompt, base.is_complete) != (each.name, each.prompt, each.is_complete):
                continue
            for convention in base.scores.keys() & each.scores.keys():
                if base.scores[convention].total == each.scores[convention].total:
                    scores[each.name, convention] = base.scores[convention]
    return scores


def _eval_results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """Complete public benchmarks as `model-index` entries. Parts of one, or private problems, would mislead there."""
    found = []
    for each in evaluations:
        if each.name not in BENCHMARKS or not each.is_complete:
            continue
        title, dataset = BENCHMARKS[each.name]
        for convention, score in each.scores.items():
            result = EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=title,
                metric_type="accuracy",
                metric_name=f"accuracy, {convention} convention",
                metric_value=round(100 * score.accuracy, 2),
            )
            found.append(result)
    return found


def _measured(entries: list[dict[str, Any]], results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(quantity, value) for each row of the card's first table. What was not measured has no row."""
    measured = []
    for when in ("before", "after"):
        if (accuracy := results.get(f"accuracy_{when}")) is not None:
            interval = f"95 % interval {percent(accuracy['low'])} to {percent(accuracy['high'])}"
            quantity = f"greedy accuracy {when} training, {accuracy['total']} held-out problems"
            measured.append((quantity, f"{percent(accuracy['accuracy'])} % ({interval})"))
    measured += [(f"last logged {name}", f"{value:.4g}") for name, value in last_values(entries, LOGGED).items()]
    measured += [(name, str(results[name])) for name in ("steps", "train_rows", "train_seconds") if name in results]
    return measured


def _settings(run: RunSettings) -> str:
    """The settings of the token loss, with its defaults: "gamma 2"; "" for CE, which has none."""
    try:
        settings = recipe_settings(run.token_loss, run.token_loss_settings)
    except RecipeError:  # a stored recipe may be anybody's, or of a later version
        settings = run.token_loss_settings or {}
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _solver(run: RunSettings) -> str:
    if run.mce_solver == "taylor":
        return f"the Taylor series of order {run.mce_order}"
    titles = {"krylov": "Lanczos quadrature", "exact": "the dense matrix logarithm"}
    return titles.get(run.mce_solver, run.mce_solver)


def _vectors(embeddings: str) -> str:
    """The token vectors e_i in words; "" for those of the paper, the LM head's."""
    titles = {"lm_head": "", "centred": "the LM head's vectors minus their mean", "input": "the input embeddings"}
    return titles.get(embeddings, "vectors of a file")


def _warmup(steps: float) -> str:
    """How long the weight rises, in words: "20 steps", or "10 % of the steps" for 0.1; "" for 0."""
    if steps == 0:
        return ""
    return f"{steps:g} steps" if steps >= 1 else f"{100 * steps:g} % of the steps"


# --------------------------------------------------------------------------------------------------- image backbones


def image_card(
    *,
    title: str,
    architecture: str,
    needs_import: str | None,
    dataset: str,
    method: str,
    method_title: str,
    paper: str,
    settings: Mapping[str, Any],
    entries: list[dict[str, Any]],
    results: Mapping[str, Any],
) -> ModelCard:
    """The card of a run of ssl/pretrain.py.

    Args:
        title: name of the run's folder.
        architecture: class of the backbone.
        needs_import: the module that registers the architecture with transformers, if it is not one of theirs.
        dataset: the recipe's data set.
        method: key of the pre-training method, for the tags.
        method_title: its name in its paper.
        paper: where it was published.
        settings: the settings given, as recipe.yaml stores them.
        entries: the run's metrics.jsonl.
        results: the run's results.json.
    """
    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised", "matrix-llm", method],
    )
    counted = ("images", "steps", "processes", "skipped_images", "train_seconds")
    measured = [(name, f"{value:.4g}") for name, value in last_values(entries, LOGGED_FOR_IMAGES).items()]
    measured += [(name, str(results[name])) for name in counted]
    return _render(
        "image_backbone.md.jinja",
        front_matter,
        settings=settings,
        title=title,
        architecture=architecture,
        needs_import=needs_import,
        dataset=dataset,
        method_title=method_title,
        paper=paper,
        measured=measured,
    )


def _render(template: str, front_matter: ModelCardData, *, settings: Mapping[str, Any], **variables: Any) -> ModelCard:
    body = TEMPLATES.get_template(template).render(
        recipe=recipe_yaml(settings),
        versions=[f"{name} {version}" for name, version in versions().items()],
        **variables,
    )
    return ModelCard(f"---\n{front_matter.to_yaml()}\n---\n\n{body}")


# ------------------------------------------------------------------------------------------- cards of finished runs


def card_of(run: Path, settings: RunSettings, licence: str | None, base_model: str | None) -> str:
    """The card of the language model in `run`.

    Without `licence` it takes that of the run's old card, or else of the base model if that is a folder.
    """
    licence = licence or licence_in(run)
    entries, results, evaluations = read_jsonl(run / METRICS), read_json(run / RESULTS), read_evaluations(run)
    base, diagnosis = settings.model_name_or_path, read_diagnosis(run)
    try:
        card = model_card(
            settings,
            entries,
            results,
            evaluations,
            before=read_evaluations(Path(base)) if base and evaluations else [],  # of a folder: eval/ writes into it
            diagnosis=diagnosis,
            licence=licence,
            base_model=base_model,
        )
        return str(card)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RecipeError(
            f"{run / RESULTS} does not hold what train.py writes ({one_line(error)}). Restore it, or train the run "
            "again."
        ) from error


def write_card(run: Path, *, licence: str | None = None, base_model: str | None = None) -> Path:
    """Render README.md of a finished run again from what is in its folder, and return its path.

    Raises:
        RecipeError: the folder is not a finished run of train.py.
    """
    if is_image_run(run):
        raise RecipeError(
            f"{str(run)!r} holds an image backbone, whose card ssl/pretrain.py wrote. Edit its {CARD}; a push sends it "
            "unchanged."
        )
    write_text(run / CARD, card_of(run, read_settings(run), licence, base_model))
    return run / CARD
