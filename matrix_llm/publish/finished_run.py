"""A finished run, read from its folder: its settings, its results, and the scores of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.files import parse_json
from matrix_llm.base.safe_yaml import read_yaml
from matrix_llm.base.text import visible
from matrix_llm.config import DataArguments, MatrixConfig, ModelArguments, Recipe
from matrix_llm.run.run_folder import DIAGNOSIS

RECIPE, RESULTS, CARD = "recipe.yaml", "results.json", "README.md"
DIAGNOSIS_FORMAT, DIAGNOSIS_VERSION = "matrix_llm.diagnosis", 1
PROCESSOR = "preprocessor_config.json"  # an image backbone has one, where a language model has a tokenizer

# The settings that a card or a push reads, with their values where recipe.yaml does not give them.
DEFAULTS: dict[str, Any] = {
    name: getattr(owner, name)
    for owner, names in {
        ModelArguments: ("model_name_or_path", "use_peft"),
        DataArguments: ("dataset",),
        MatrixConfig: (
            "token_loss",
            "token_loss_settings",
            "teacher_model_name_or_path",
            "mce_weight",
            "mce_warmup_steps",
            "mce_solver",
            "mce_order",
            "mce_embeddings",
        ),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class RunSettings:
    """What a run's card and its push need to know about it. Fields are named after the recipe's keys."""

    title: str
    """Name of the run's folder, and the heading of its card."""

    model_name_or_path: str | None
    """The base model: a folder, a name on the Hub, or None for a model trained from scratch."""

    use_peft: bool
    """Whether the run holds a LoRA adapter instead of a complete model."""

    dataset: str | dict | list | None
    """The training rows, as the recipe gives them: "builtin", a path, a name on the Hub, or several of these."""

    token_loss: str
    """The loss that the matrix cross-entropy is added to: a key of `loss.choice.LOSSES`."""

    token_loss_settings: dict[str, Any] | None
    """Its settings, as the recipe gives them."""

    teacher_model_name_or_path: str | None
    """The model whose distribution is its target, if there is one."""

    mce_weight: float
    """Weight of the matrix cross-entropy, at least 0; 0 is plain cross-entropy."""

    mce_warmup_steps: float
    """Steps over which the weight rises; below 1, a share of all steps."""

    mce_solver: str
    """"krylov", "exact" or "taylor"."""

    mce_order: int
    """Order of the Taylor solver, at least 1."""

    mce_embeddings: str
    """"lm_head", "input", "centred" or the path of a .safetensors file."""

    given: dict[str, Any]
    """Every setting that was given, as recipe.yaml stores them."""

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> RunSettings:
        """The settings of a run that has just been trained."""
        model, training = recipe.model, recipe.training
        return cls(
            title=Path(str(training.output_dir)).name,
            model_name_or_path=model.model_name_or_path,
            use_peft=model.use_peft,
            dataset=recipe.data.dataset,
            token_loss=training.token_loss,
            token_loss_settings=training.token_loss_settings,
            teacher_model_name_or_path=training.teacher_model_name_or_path,
            mce_weight=training.mce_weight,
            mce_warmup_steps=training.mce_warmup_steps,
            mce_solver=training.mce_solver,
            mce_order=training.mce_order,
            mce_embeddings=training.mce_embeddings,
            given=recipe.resolved,
        )


@dataclass(frozen=True)
class Score:
    """The accuracy on one benchmark under one answer-extraction convention."""

    accuracy: float
    """Share of problems solved, 0 to 1."""

    low: float
    """Lower end of the 95 % interval, 0 to 1."""

    high: float
    """Upper end of the 95 % interval, 0 to 1."""

    total: int
    """Number of problems."""


@dataclass(frozen=True)
class Evaluation:
    """One result file that eval/gsm8k.py or eval/hendrycks_math.py wrote."""

    name: str
    """The benchmark, e.g. "gsm8k", or the name of the user's own problem file."""

    scores: dict[str, Score]
    """{convention: score}; a convention extracts and compares answers."""

    is_complete: bool
    """Whether every problem was asked; `--limit` asks only some of them."""

    prompt: str
    """Name of the prompt template; "" where the file does not say."""

    engine: str
    """What generated the answers, e.g. "vllm"; "" where the file does not say."""


@dataclass(frozen=True)
class Diagnosis:
    """What `matrix-llm diagnose` found, as far as the card shows it."""

    model: str
    """Name of the last folder or repository of the model that was measured."""

    measured: list[tuple[str, str]]
    """(quantity, value) for each row of the card's table."""

    reading: list[str]
    """The figures in words."""


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        RecipeError: it is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise RecipeError(f"{path} is not JSON: {error}. Restore the file, or train the run again.") from None


def read_settings(run: Path) -> RunSettings:
    """The settings stored in a finished run. They are not checked again: its data may be on another machine by now.

    Raises:
        RecipeError: the folder is not a finished run, or its recipe.yaml is not a mapping of settings.
    """
    for name in (RECIPE, RESULTS):
        if not (run / name).is_file():
            raise RecipeError(f"{str(run)!r} has no {name}, so it is not a finished run. Give the output_dir of one.")
    try:
        given = read_yaml((run / RECIPE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        given = None
    if not isinstance(given, dict):
        raise RecipeError(
            f"{run / RECIPE} is not a YAML mapping of settings. Restore the file, or train the run again."
        )
    known = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    _check_known(known, run / RECIPE)
    return RunSettings(title=run.resolve().name, given=given, **known)


def _check_known(known: dict[str, Any], path: Path) -> None:
    """Refuse settings of another type than train.py takes: a stored recipe may be anybody's."""
    numbers, texts = ("mce_weight", "mce_warmup_steps", "mce_order"), ("mce_solver", "token_loss")
    for name, value in known.items():
        is_right = True
        if name in numbers:
            is_right = type(value) in (int, float) and math.isfinite(value)
        elif name in texts:
            is_right = isinstance(value, str)
        elif name == "use_peft":
            is_right = isinstance(value, bool)
        elif name == "token_loss_settings":
            is_right = value is None or isinstance(value, dict)
        elif name in ("model_name_or_path", "teacher_model_name_or_path"):
            is_right = value is None or isinstance(value, str)
        elif name == "dataset":
            is_right = isinstance(value, (str, dict, list, type(None)))
        if not is_right:
            raise RecipeError(
                f"{path}: {name} is of the type {type(value).__name__}, which no run has. Restore the file."
            )


def recipe_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as recipe.yaml may be published: without the access token."""
    public = {key: value for key, value in settings.items() if key != "hub_token"}
    text = yaml.dump(public, Dumper=_PublicDumper, sort_keys=False, allow_unicode=True)
    return "".join(f"\\U{ord(letter):08X}" if _needs_escape(letter) else letter for letter in text)


class _PublicDumper(yaml.SafeDumper):
    """Puts a text in double quotes, where escapes can be written, if a card could not show it as it is."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(map(_needs_escape, data)) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_PublicDumper.add_representer(str, _PublicDumper.represent_str)


def _needs_escape(letter: str) -> bool:
    """Whether a letter is invisible or turns the reading direction, or could end the code block of a card."""
    return letter in "`~" or (letter not in "\n\t" and visible(letter) != letter)


def is_image_run(run: Path) -> bool:
    """Whether ssl/pretrain.py made the run."""
    return (run / PROCESSOR).is_file()


def read_evaluations(run: Path) -> list[Evaluation]:
    """The result files in a run's eval/, sorted by file name. Other JSON files there are skipped.

    Raises:
        RecipeError: a result file cannot be read.
    """
    found = []
    for path in sorted((run / "eval").glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or "scores" not in content:
            continue  # e.g. the settings that eval/ stores next to each result
        try:
            found.append(_parse_evaluation(content))
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
        ):  # a field is missing, or of another type
            raise RecipeError(
                f"{path} is not a result file of eval/. Remove it, or regrade it with eval/regrade.py."
            ) from None
    return found


def read_diagnosis(run: Path) -> Diagnosis | None:
    """The diagnosis.json in a run's folder; None if there is none.

    Raises:
        RecipeError: the file is not one that `matrix-llm diagnose` of this version wrote.
    """
    path = run / DIAGNOSIS
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        if (content["format"], content["version"]) != (DIAGNOSIS_FORMAT, DIAGNOSIS_VERSION):
            raise ValueError
        return _parse_diagnosis(content)
    except (ValueError, KeyError, TypeError, AttributeError):  # a field is missing, or of another type
        raise RecipeError(
            f"{path} is not what `matrix-llm diagnose` writes. Remove it, or diagnose the run again."
        ) from None


def _parse_diagnosis(content: dict[str, Any]) -> Diagnosis:
    whole, mce = content["loss"]["all"]["all"], content["gradients"]["in use"]["all"]["all"]["mce"]["hidden"]
    measured = [
        ("trained positions measured", f"{content['rows']['positions']:,}, in {content['rows']['rows_used']:,} rows"),
        ("CE, MCE", f"{whole['ce']:.3f}, {whole['mce']['in use']:.3f} nats"),
        ("mean cosine of two token vectors", f"{content['head']['in use']['mean_cosine']:.3f}"),
    ]
    if mce["cosine"] is not None:
        ratio = f"cosine {mce['cosine']:.3f}, norm {mce['norm_ratio']:.2f}"
        measured.append(("MCE's gradient against CE's in the hidden states", ratio))
    return Diagnosis(Path(content["model"]["name"]).name, measured, [str(each) for each in content["reading"]])


def _parse_evaluation(content: dict[str, Any]) -> Evaluation:
    scores = {
        convention: Score(float(each["accuracy"]), float(each["low"]), float(each["high"]), int(each["total"]))
        for convention, each in content["scores"].items()
    }
    settings = content.get("settings", {})
    words = (content["name"], *scores, prompt := settings.get("prompt", ""), engine := settings.get("engine", ""))
    shares = [share for each in scores.values() for share in (each.accuracy, each.low, each.high)]
    if not all(isinstance(word, str) for word in words) or not all(0 <= share <= 1 for share in shares):
        raise ValueError
    return Evaluation(content["name"], scores, not content.get("limit"), prompt, engine)
