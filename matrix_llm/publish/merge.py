"""A LoRA adapter merged into its base model: a plain folder that needs no PEFT to load.

1. the adapter, its base and the place are checked before weights are loaded
2. the base is loaded in full precision of its own dtype, and every weight of the adapter is put on it
3. the adapters are added to the weights; on a few tokens the logits must be what they were before
4. weights, tokenizer, generation settings and card are written to a temporary folder, which then takes its name
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from matrix_llm.base.errors import ModelError, RecipeError, one_line
from matrix_llm.base.files import write_text
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.base.weights import adapter_gaps, check_weights
from matrix_llm.checks.machine import require
from matrix_llm.model.adapters import WEIGHTS
from matrix_llm.model.load import repair_generation_settings, set_special_ids
from matrix_llm.model.older_readers import add_older_names
from matrix_llm.model.pretrained import load_pretrained
from matrix_llm.model.tokenizer import check_vocabulary
from matrix_llm.publish.card import card_of
from matrix_llm.publish.checks import check_inside
from matrix_llm.publish.finished_run import read_json, read_settings
from matrix_llm.publish.markdown import text
from matrix_llm.publish.names import is_hub_name
from matrix_llm.run.failures import cannot_write, why_not_written
from matrix_llm.run.run_folder import CARD, PLOT, RECIPE, RESULTS

if TYPE_CHECKING:
    from peft import PeftModel

SETTINGS = "adapter_config.json"
# Starts that change the base by what the adapter's files do not hold (matrix_llm saves its own without that need)
LOST_STARTS = ("pissa_niter", "corda", "loftq", "lora_ga")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # of the largest logit


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and the base that it names."""

    folder: Path
    """Holds adapter_model.safetensors and adapter_config.json."""
    base: str
    """A folder, or a name on the Hub."""
    revision: str | None
    """Branch, tag or commit of the base on the Hub."""
    quantised_by: str | None
    """"load_in_4bit" or "load_in_8bit" if the run's recipe says that the base was quantised."""


def merge(
    run: str,
    out: Path,
    *,
    dtype: str | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Merge the adapter of `run` into its base, and write the complete model to `out`.

    Args:
        run: a run's folder, another folder with an adapter, or a name on the Hub.
        dtype: of the weights, e.g. "bfloat16"; None: the base's own.
        base_model: the base, instead of the one that the adapter names.
        trust_remote_code: run the Python code that came with the base.

    Returns:
        What was merged into what, in which dtype: the line on the card.

    Raises:
        RecipeError: no adapter, no base, a quantised base, or `out` is not a new or empty folder.
        ModelError: the adapter does not fit the base, or the merged model is not the one that was trained.
        CheckpointError: `out` could not be written.
    """
    # 1. checks
    require("peft", "merging an adapter")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{str(out)!r} exists and is not an empty folder. Give another place.")
    adapter = find_adapter(run, base_model, trust_remote_code=trust_remote_code)
    tokenizer = _load_tokenizer(adapter, trust_remote_code)

    # 2. one model
    merged = load_merged(
        adapter,
        tokenizer,
        dtype="auto" if dtype is None else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
    )
    repair_generation_settings(merged)

    # 3. its files
    line = _describe(adapter, run, merged)
    _write(out, merged, tokenizer, adapter, _card(adapter, out.name, line))
    return line


def load_merged(
    adapter: Adapter,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | str,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base with the adapter added to its weights, and the tokenizer's special ids.

    Args:
        dtype: of the weights; "auto": the base's own.
        trust_remote_code: whether the base's own code may run.

    Raises:
        RecipeError: no base, or tokens beyond its embeddings.
        ModelError: the adapter does not fit the base, or the merged model is not the one that was trained.
    """
    model, info = load_pretrained(
        "the base model",
        adapter.base,
        AutoModelForCausalLM.from_pretrained,
        output_loading_info=True,
        revision=adapter.revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )
    check_weights(model, info, f"the base model {adapter.base!r}")
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    adapted = _put_on(model, adapter)
    expected = _few_logits(adapted)
    merged = _merge_weights(adapted)
    _check_same(expected, _few_logits(merged), merged.dtype)
    set_special_ids(merged, tokenizer)
    return merged


# --------------------------------------------------------------------------------------------------- what to merge


def find_adapter(run: str, base_model: str | None = None, *, trust_remote_code: bool = False) -> Adapter:
    """The adapter in a folder or on the Hub, and its base; no weights are read.

    Raises:
        RecipeError: there is none that can be merged.
    """
    # 1. the adapter
    folder = _find_folder(run)
    if not (folder / SETTINGS).is_file():
        raise RecipeError(_why_no_adapter(run, folder))
    if not (folder / WEIGHTS).is_file():
        pickles = " but pickles (.bin), which run code when loaded" if list(folder.glob("adapter_model*.bin")) else ""
        raise RecipeError(f"{run!r} has no {WEIGHTS}{pickles}. Save the adapter as safetensors.")
    settings = read_json(folder / SETTINGS)
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights")
    if kind != "LORA":
        raise RecipeError(f"{run!r} holds an adapter of the type {kind}; only LORA (with DoRA) is merged. Use PEFT.")
    if str(start).startswith(LOST_STARTS):
        raise RecipeError(
            f"{run!r} was saved with init_lora_weights={start!r}, which changed the base by what no file holds. "
            "Save it with PEFT's path_initial_model_for_weight_conversion."
        )

    # 2. its base
    base, revision = base_model, None
    if base is None:
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise RecipeError(f"{run!r} names no base model in {SETTINGS}. Name it with --base-model.")
    if not Path(base).expanduser().is_dir() and (folder / base / "config.json").is_file():
        base = str(folder / base)  # relative to the adapter
    if not Path(base).expanduser().is_dir() and not is_hub_name(base):
        raise RecipeError(f"the base model {base!r} of {run!r} is not there. Name it with --base-model.")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_pretrained("the base model", base, AutoConfig.from_pretrained, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(
            f"the base model {base!r} is stored quantised, so adding to its weights would round the adapter away. Name "
            "the same model in full precision with --base-model."
        )
    return Adapter(folder, base, revision, _quantised_by(folder))


def _find_folder(run: str) -> Path:
    folder = Path(run).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(run) or run.count("/") != 1:
        raise RecipeError(f"{run!r}: no such folder. Give the folder of a run, or of an adapter.")
    try:
        wanted = ["adapter_*", "tokenizer*", "*.jinja", "*.model", "vocab*", "merges.txt", "*token*.json", CARD, RECIPE]
        return Path(snapshot_download(run, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the Hub client's errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RecipeError(
            f"{run!r} is neither a folder nor an adapter that the Hub gives: {reason} Correct the name, or log in."
        ) from None


def _why_no_adapter(run: str, folder: Path) -> str:
    saved = sorted(file.parent.name for file in folder.glob(f"*/{SETTINGS}"))
    if saved:
        return f"{run!r} holds no adapter itself, but {', '.join(saved)} do. Give one of them."
    if (folder / "config.json").is_file():
        return f"{run!r} holds a complete model, with no adapter to merge. Use it as it is."
    return f"{run!r} has no {SETTINGS}, so it holds no adapter. Give the folder of a finished LoRA run."


def _quantised_by(folder: Path) -> str | None:
    """The recipe's setting, where there is a recipe; a checkpoint's is in the folder above."""
    recipes = [place / RECIPE for place in (folder, folder.parent) if (place / RECIPE).is_file()]
    if not recipes:
        return None
    lines = recipes[0].read_text(encoding="utf-8").splitlines()
    return next((key for key in ("load_in_4bit", "load_in_8bit") if f"{key}: true" in lines), None)


def _load_tokenizer(adapter: Adapter, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (adapter.folder / "tokenizer_config.json").is_file():
        return load_pretrained("the adapter's tokenizer", str(adapter.folder), AutoTokenizer.from_pretrained, **options)
    options["revision"] = adapter.revision
    return load_pretrained("the base model", adapter.base, AutoTokenizer.from_pretrained, **options)


# ------------------------------------------------------------------------------------------------------ the weights


def _put_on(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """`model` with every weight of the adapter, and no other."""
    from peft import PeftModel

    where = f"the adapter {str(adapter.folder)!r} does not fit {adapter.base!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is refused below
            adapted = PeftModel.from_pretrained(model, str(adapter.folder))
        missing, unknown = adapter_gaps(adapted, adapter.folder)
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{where}: {' '.join(lines[:2])} Name the right base with --base-model.") from None
    if missing:
        raise ModelError(f"{where}: it holds no {missing[0]}. Name the right base with --base-model.")
    if unknown:
        raise ModelError(f"{where}, which has no place for {unknown[0]}. Name the right base with --base-model.")
    return adapted


def _merge_weights(adapted: PeftModel) -> PreTrainedModel:
    """The base model with the adapters added to its weights.

    Raises:
        ModelError: NaN or infinity in the result.
    """
    _separate_tied_ends(adapted.get_base_model())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, which are taken care of here
            merged: Any = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be merged: {one_line(error)}. Use another one.") from None
    for name, parameter in merged.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"the merged weight {name} holds NaN or infinity. Use another checkpoint of the run.")

    return merged


def _separate_tied_ends(model: Any) -> None:
    """Give the LM head its own weight where only the embeddings tied to it have an adapter: merging would change it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_output_embeddings()
    adapts = [isinstance(end, BaseTunerLayer) for end in (model.get_input_embeddings(), head)]
    if model.config.get_text_config().tie_word_embeddings and adapts == [True, False]:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def _few_logits(model: Any) -> Tensor:
    """(1, 8, V) logits of a few tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=model.device).unsqueeze(0) * 7 % size
    with torch.no_grad(), evaluation_mode(model):
        return model(input_ids=ids, use_cache=False).logits.float()


def _check_same(expected: Tensor, found: Tensor, dtype: torch.dtype) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    if not error <= TOLERANCE.get(dtype, 0.1):
        raise ModelError(
            f"the merged model is not the adapted one: their logits differ by {error.item():.2g} of the largest. Set "
            "--dtype float32, or use the adapter as it is."
        )


# -------------------------------------------------------------------------------------------------------- the files


def _describe(adapter: Adapter, run: str, merged: PreTrainedModel) -> str:
    dtype = str(merged.dtype).removeprefix("torch.")
    base = adapter.base if is_hub_name(adapter.base) else Path(adapter.base).name
    line = f"These are complete weights in {dtype}: the LoRA adapter {Path(run).name}, merged into {base}."
    if adapter.quantised_by is not None:
        line += (
            f" It was trained with {adapter.quantised_by} and is merged into the weights before quantisation, so "
            "answers can differ a little from those during training."
        )
    return line


def _card(adapter: Adapter, name: str, line: str) -> ModelCard:
    """The card of a complete model, with `line` at its top; that of a finished run tells how it was trained."""
    if (adapter.folder / RESULTS).is_file() and (adapter.folder / RECIPE).is_file():
        settings = dataclasses.replace(read_settings(adapter.folder), use_peft=False)
        base = adapter.base if is_hub_name(adapter.base) else None
        card = ModelCard(card_of(adapter.folder, settings, None, base))
        title, _, body = card.text.lstrip().partition("\n")
        card.text = f"{title}\n\n{text(line)}\n{body}"
        return card
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    if is_hub_name(adapter.base):
        data.base_model = adapter.base
    return ModelCard(f"---\n{data}\n---\n\n# {text(name)}\n\n{text(line)}\n")


def _write(
    out: Path, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Adapter, card: ModelCard
) -> None:
    staged = out.with_name(f".{out.name}.merging")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        merged.save_pretrained(staged)
        tokenizer.save_pretrained(str(staged))
        add_older_names(staged, tokenizer)
        write_text(staged / CARD, str(card))
        if (adapter.folder / PLOT).is_file():  # shown on the card
            check_inside(adapter.folder, adapter.folder / PLOT)
            shutil.copy(adapter.folder / PLOT, staged / PLOT)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        os.rename(staged, out)
    except Exception as error:
        if (reason := why_not_written(error)) is None:
            raise
        raise cannot_write(out, reason, out) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
