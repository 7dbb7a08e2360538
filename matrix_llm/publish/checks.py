"""What a finished run must contain before it can be pushed, checked without a network.

The weights must be complete and loadable, the tokenizer must be there, and no file that would be sent may hold an
access token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.secrets import file_holds_secret, holds_secret
from matrix_llm.publish.finished_run import (
    CARD,
    PROCESSOR,
    RECIPE,
    RESULTS,
    RunSettings,
    is_image_run,
    read_json,
    read_settings,
    recipe_yaml,
)
from matrix_llm.publish.names import check_repository_name, is_hub_name
from matrix_llm.run.metrics import METRICS, PLOT

# What is sent besides the weights, the card and recipe.yaml. Anything not named here is never sent: pickles,
# optimizer states, checkpoints, generated texts.
SENT = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.py",
    RESULTS,
    METRICS,
    PLOT,
    "eval/*.json",
    PROCESSOR,
)

Shapes = dict[str, list[int]]  # of a file's or a model's tensors, by name


def check_run(run: Path, token: str | None = None, *, base_model: str | None = None) -> tuple[RunSettings, list[Path]]:
    """Every check that needs no network.

    Args:
        token: the access token in use; the files are searched for it and for anything that looks like a token.
        base_model: name on the Hub of an adapter's base model, where the recipe names a folder.

    Returns:
        the run's settings, and the files to send besides README.md and recipe.yaml.

    Raises:
        RecipeError: not a finished run, weights that cannot be loaded, no tokenizer, an adapter whose base model nobody
            else could load, or a token in a file that would be sent.
    """
    # 1. nothing is read through a link that leads out of the run
    check_inside(run, *(run / name for name in (RECIPE, RESULTS, CARD)))

    # 2. complete: results, weights, tokenizer
    settings, weights = read_settings(run), check_weights(run)
    if not (run / "tokenizer_config.json").is_file() and not is_image_run(run):
        raise RecipeError(
            f"{str(run)!r} has no tokenizer_config.json. Save the tokenizer next to the weights, then push."
        )

    # 3. loadable by others: an adapter needs a base model that is on the Hub
    if base_model is not None:
        check_repository_name(base_model, "--base-model")
    base = base_model or settings.model_name_or_path
    if weights[0].name.startswith("adapter") and not is_hub_name(base):
        raise RecipeError(f"the adapter's base model {base!r} is not on the Hub. Name it with --base-model user/name.")

    # 4. no file from elsewhere, and no secrets
    others = sorted({file for pattern in SENT for file in run.glob(pattern) if file.is_file()} - set(weights))
    check_inside(run, *weights, *others)
    for file in (*weights, *others):
        if file_holds_secret(file, token):
            raise _secret_in(file)
    check_secrets(run / RECIPE, recipe_yaml(settings.given), token)  # as it is sent: without hub_token
    return settings, [*weights, *others]


def check_inside(run: Path, *files: Path) -> None:
    """Refuse files that are links, or stand in a folder that is one, to a place outside the run: they are not its own.

    Raises:
        RecipeError: names the file and where it leads.
    """
    root = run.resolve()
    for file in files:
        try:
            there = file.resolve()
        except (OSError, RuntimeError):  # a link that leads to itself
            raise RecipeError(f"{file} is a link that leads nowhere. Remove it, then push.") from None
        if not there.is_relative_to(root):
            raise RecipeError(
                f"{file} leads to {there}, outside the run. A push sends the run's own files only: remove the link, or "
                "copy what it leads to."
            )


def check_secrets(file: Path, text: str, token: str | None) -> None:
    """Refuse `text`, the content of `file`, where it holds `token` or anything that looks like a token or password."""
    if holds_secret(text, token):
        raise _secret_in(file)


def _secret_in(file: Path) -> RecipeError:
    return RecipeError(
        f"{file} holds an access token or a password. Remove it there, revoke it if others could read the file, then "
        "push."
    )


# ------------------------------------------------------------------------------------------------------------ weights


def check_weights(run: Path) -> list[Path]:
    """The files that hold a run's final weights: a model's (one file, or an index and its shards) or an adapter's.

    Raises:
        RecipeError: there are none, a file is damaged, or a tensor is empty or missing.
    """
    # In the order in which from_pretrained and PEFT look for them.
    if (run / "model.safetensors").is_file():
        return _check_model(run, [run / "model.safetensors"])
    if (index := run / "model.safetensors.index.json").is_file():
        return _check_sharded_model(run, index)
    if (adapter := run / "adapter_model.safetensors").is_file():
        return _check_adapter(run, adapter)
    if pickles := sorted(file.name for file in run.glob("pytorch_model*.bin")):
        found = f"only pickles ({', '.join(pickles)}), which run code when loaded"
    else:
        found = "no final weights (model.safetensors)"
    raise RecipeError(
        f"{str(run)!r} holds {found}. Finish the run with --resume_from_checkpoint true, or save safetensors."
    )


def _check_adapter(run: Path, adapter: Path) -> list[Path]:
    settings = run / "adapter_config.json"
    if not settings.is_file():
        raise RecipeError(f"{str(run)!r} has an adapter but no adapter_config.json. Save the adapter again.")
    tensor_shapes(adapter)
    return [adapter, settings]


def _check_sharded_model(run: Path, index: Path) -> list[Path]:
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise RecipeError(f"{index} has no weight_map of file names. Save the weights again.")
    if strange := sorted({name for name in listed.values() if Path(name).name != name}):
        raise RecipeError(f"{index} lists {strange[0]!r}, which is not the name of a file of the run. Save them again.")
    shards = sorted({run / name for name in listed.values()})
    if gone := [shard.name for shard in shards if not shard.is_file()]:
        raise RecipeError(f"{index} lists {', '.join(gone)}, but there is no such file. Save the weights again.")
    return [index, *_check_model(run, shards, listed)]


def _check_model(run: Path, files: list[Path], listed: Iterable[str] = ()) -> list[Path]:
    """`files`, which must hold every tensor `listed` in an index and every parameter that config.json asks for."""
    if not (run / "config.json").is_file():
        raise RecipeError(f"{str(run)!r} has weights but no config.json to load them by. Save the model again.")
    shapes: Shapes = {}
    for file in files:
        shapes |= tensor_shapes(file)
    expected = _expected_shapes(run)
    # Names alone prove nothing: some architectures are saved under names that differ from those of their modules. The
    # number of elements does.
    elements = sum(map(math.prod, shapes.values()))
    is_short = elements < sum(map(math.prod, expected.values()))
    if is_short or not shapes.keys() >= set(listed):
        missing = sorted({*expected, *listed} - shapes.keys())
        examples = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise RecipeError(
            f"{str(run)!r}: the weights lack {len(missing)} of {len(expected)} tensors that config.json asks for "
            f"({examples}). Save them again."
        )
    return files


def tensor_shapes(file: Path) -> Shapes:
    """The shape of each tensor in a safetensors file. Only its header is read.

    Raises:
        RecipeError: the file is damaged, has no tensor or has empty ones.
    """
    try:
        with safe_open(file, framework="numpy") as opened:  # refuses a file whose length does not match its header
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise RecipeError(
            f"{file} is not a complete safetensors file: {error}. It may have been cut off, or be a Git LFS pointer. "
            "Save or copy the weights again."
        ) from None
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        found = "holds no tensor"
        if empty:
            found = f"holds {len(empty)} empty tensors of {len(shapes)}, e.g. {empty[0]} of shape {shapes[empty[0]]}"
        raise RecipeError(
            f"{file} {found}, as happens under ZeRO-3 when the weights are not gathered. Train with "
            "stage3_gather_16bit_weights_on_model_save: true, or consolidate the last checkpoint, then push."
        )
    return shapes


def _expected_shapes(run: Path) -> Shapes:
    """The parameters that config.json describes, tied ones once; none if the architecture cannot be built here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    read_json(run / "config.json")
    try:
        config = AutoConfig.from_pretrained(run, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            return {}  # packed weights have different shapes
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # only its own code can build it, and that may fail in any way; the headers have been checked
        return {}
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}
