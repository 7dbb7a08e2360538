"""What of a finished run may go to the Hub, checked without a network: whole weights, a name that can be, no token in any file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from matrix_llm.base.errors import RecipeError, scrub
from matrix_llm.config import Recipe
from matrix_llm.publish.card import PROCESSOR, is_hub_name, is_image_run, stored_recipe
from matrix_llm.run.metrics import METRICS, PLOT

SENT = (
    *(
        "config.json",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
    ),
    *(
        "*.model",
        "*.jinja",
        "additional_chat_templates/*.jinja",
        "*.py",
        "results.json",
        METRICS,
        PLOT,
        "eval/*.json",
        PROCESSOR,
    ),
)  # and the weights, recipe.yaml and README.md; never pickles, optimizer states or checkpoints: what is not named stays here
STALE = ["model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors", "adapter_config.json"]


def _shapes(file: Path) -> dict[str, list[int]]:
    """{tensor: shape} from the header of a .safetensors, whose length is checked against what the header promises."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if 0 < length < size else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}  # type: ignore[union-attr]
        promised = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: entry["shape"] for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(f"{file} is not a safetensors file. Save the weights again before pushing.") from None
    if size != promised:
        raise RecipeError(
            f"{file} has {size:,} bytes, but its header promises {promised:,}: it was cut off. Save the weights again."
        )
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        what = (
            f"{len(empty)} of {len(shapes)} tensors are empty (first {empty[0]}, shape {shapes[empty[0]]})"
            if empty
            else "there is no tensor"
        )
        raise RecipeError(
            f"{file}: {what}, as ZeRO-3 leaves them where the weights were not gathered. Train with "
            "stage3_gather_16bit_weights_on_model_save: true, or consolidate the last checkpoint, then push."
        )
    return shapes


def check_weights(run: Path) -> list[Path]:
    """The files that hold a run's final weights: a model's (one file, or an index and its shards) or an adapter's.

    Raises:
        RecipeError: there are none, a tensor is empty or missing, or a file is cut off.
    """
    whole, index, adapter = (
        run / "model.safetensors",
        run / "model.safetensors.index.json",
        run / "adapter_model.safetensors",
    )
    if not whole.is_file() and not index.is_file():
        if not adapter.is_file():
            pickles = ", ".join(sorted(file.name for file in run.glob("pytorch_model*.bin")))
            why = (
                f"only pickles ({pickles}), which run code when loaded"
                if pickles
                else "no final weights (model.safetensors)"
            )
            raise RecipeError(
                f"{str(run)!r} holds {why}. Finish the run with --resume_from_checkpoint true, or save as safetensors."
            )
        if not (run / "adapter_config.json").is_file():
            raise RecipeError(
                f"{adapter} has no adapter_config.json beside it, so PEFT cannot load it. Save the adapter again."
            )
        _shapes(adapter)
        return [adapter, run / "adapter_config.json"]
    if not (run / "config.json").is_file():
        raise RecipeError(
            f"{str(run)!r} has weights but no config.json, so from_pretrained cannot load them. Save the model again."
        )
    if whole.is_file():  # from_pretrained prefers it to an index
        files, shapes, listed = [whole], _shapes(whole), None
    else:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({run / name for name in listed.values()})
        if gone := [shard.name for shard in shards if not shard.is_file()]:
            raise RecipeError(
                f"{index} lists {', '.join(gone)}, which {'is' if len(gone) == 1 else 'are'} not there. Save the weights again."
            )
        shapes = {name: shape for shard in shards for name, shape in _shapes(shard).items()}
        files = [index, *shards]
    expected, elements = _expected(run)
    missing = sorted((expected | set(listed or ())) - set(shapes))
    if (listed and set(listed) - set(shapes)) or sum(map(math.prod, shapes.values())) < elements:
        raise RecipeError(
            f"{str(run)!r}: the weights lack {len(missing)} of {len(expected)} tensors that config.json asks for "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Save them again."
        )
    return files


def _expected(run: Path) -> tuple[set[str], int]:
    """Names and number of elements of the parameters that config.json describes, tied ones once. Unknown architectures: nothing.

    Names alone prove nothing: some architectures are saved under other names than their modules have. Elements do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(run, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            return set(), 0
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # an architecture that only its own code can build; the headers have been checked all the same
        return set(), 0
    return {name for name, _ in model.named_parameters()}, sum(p.numel() for p in model.parameters())


def check_run(run: Path, token: str | None = None, *, base_model: str | None = None) -> tuple[Recipe, list[Path]]:
    """What would be sent, README.md and recipe.yaml aside, after every check that needs no network.

    Raises:
        RecipeError: no finished run, weights that cannot be loaded, no tokenizer, or a token in a file that would be sent.
    """
    recipe, weights = stored_recipe(run), check_weights(run)
    if not (run / "tokenizer_config.json").is_file() and not is_image_run(run):
        raise RecipeError(
            f"{str(run)!r} has no tokenizer_config.json. Save the tokenizer beside the weights, then push."
        )
    others = sorted({file for pattern in SENT for file in run.glob(pattern) if file.is_file()} - set(weights))
    for file in [*others, run / "recipe.yaml"]:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if file.name == "recipe.yaml":
            text = re.sub(r"(?m)^hub_token:.*$", "", text)  # left out of what is sent
        check_secrets(file, text, token)
    if base_model is not None:
        check_name(base_model, "--base-model")
    base = base_model or recipe.model.model_name_or_path
    if weights[0].name.startswith("adapter") and not is_hub_name(base):
        raise RecipeError(
            f"the adapter's base model {base!r} is a folder, which nobody else can load. Add --base-model user/name."
        )
    return recipe, [*weights, *others]


def check_secrets(file: Path, text: str, token: str | None) -> None:
    if scrub(text, token) != text:
        raise RecipeError(
            f"{file} holds an access token. Remove it there (and revoke it, if others could read the file), then push."
        )


def check_name(repo: str, where: str = "--repo") -> None:
    """
    Raises:
        RecipeError: the Hub has no such names.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"{where}={repo!r} is no name on the Hub: {innermost_reason(error)}") from None
    if repo.count("/") != 1:
        raise RecipeError(f"{where}={repo!r} does not say whose it is. Write it as user/name or organisation/name.")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:  # causes only: the context of a dropped `create` is the 404 that led to it
        yield error
        error = error.__cause__


def innermost_reason(error: BaseException) -> str:
    """The innermost reason, on one line."""
    deepest = list(causes(error))[-1]
    said = next((text for each in causes(error) if (text := getattr(each, "server_message", None))), None)
    text = " ".join(
        re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", str(said or deepest)).split()
    )  # a signed address is a secret, too
    return (text or type(deepest).__name__)[:300]
