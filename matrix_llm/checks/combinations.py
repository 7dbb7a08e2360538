"""Settings that cannot work together, or of which one would do nothing.

`given` holds the recipe's own keys, without defaults: only there can we see a given setting that would do nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import FSDPOption

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import check_choice
from matrix_llm.checks.accuracy import check_accuracy_engine
from matrix_llm.checks.engines import check_engines
from matrix_llm.checks.evaluation import check_best_is_saved, check_metric
from matrix_llm.checks.machine import (
    MissingOnThisMachineError,
    check_attention,
    check_compile,
    check_loader,
    check_machine,
    check_reports,
    require,
)
from matrix_llm.checks.optimizer import check_optimizer, check_schedule
from matrix_llm.checks.sharding import environment_says
from matrix_llm.data.entries import DatasetEntry, check_exists, question_source
from matrix_llm.data.prompts import CHAT
from matrix_llm.data.readers import Slice, Source, local_path
from matrix_llm.data.wordproblems import SPLITS

if TYPE_CHECKING:
    from matrix_llm.config import DataArguments, MatrixConfig, ModelArguments


def check_combinations(
    model: ModelArguments, data: DataArguments, given: Mapping[str, Any], replaced: Collection[str]
) -> None:
    """Refuse settings of model and data that do not go together, or that name what is not there.

    Args:
        replaced: the settings given on the command line. What a recipe says of its own model or data set may have no
            effect on one that stands in for it.
    """
    _check_paths(model, data)
    _check_leakage(data, given)
    _check_streaming(data, given)
    _check_chat(model, data, given)
    _check_adapters(model, given)
    _check_evaluation(data, given)
    check_accuracy_engine(model, data, given)
    check_best_is_saved(given)
    check_engines(given)
    _check_sources(data, replaced)
    _check_revision(model, given, replaced)


def check_training(model: ModelArguments, training: MatrixConfig, given: Mapping[str, Any]) -> None:
    """Refuse what transformers and TRL would refuse, or ignore, after the rows are read and the weights loaded."""
    check_attention(model.attn_implementation)
    _check_template_file(training)
    check_loader(training)
    check_compile(training)
    check_schedule(training, given)
    check_metric(training, given)
    check_choice("include_num_input_tokens_seen", training.include_num_input_tokens_seen, ["no", "all", "non_padding"])
    if isinstance(given.get("gradient_checkpointing_kwargs"), str):
        raise RecipeError(
            f"gradient_checkpointing_kwargs={given['gradient_checkpointing_kwargs']!r} is a text, but must be a "
            "mapping. Write {use_reentrant: false}, for example."
        )
    if isinstance(given.get("fsdp"), str):
        for word in given["fsdp"].split():
            check_choice("fsdp", word, [each.value for each in FSDPOption])
    if training.packing and training.max_length is None:
        raise RecipeError(
            "packing=True with max_length=None: packs have no length. Write `max_length: 1024`, or remove packing."
        )
    if training.padding_free and not training.packing and training.max_length is not None:
        raise RecipeError(
            f"padding_free=True with max_length={training.max_length}: without packing, TRL cannot enforce max_length. "
            "Write `packing: true`, or `max_length: null`."
        )
    if model.dtype == "float16" and training.fp16:
        raise RecipeError(
            "fp16=True with dtype='float16': gradients in float16 cannot be unscaled. Write `dtype: float32`."
        )
    _check_adapter_sharding(model, given, training)


def find_missing(model: ModelArguments, training: MatrixConfig, given: Mapping[str, Any]) -> str:
    """What this machine lacks for a run: the first such thing, or nothing."""
    try:
        check_reports(list(training.report_to or []))
        check_machine(model, training)
        if given.get("accuracy_engine") == "vllm":
            require("vllm", "accuracy_engine='vllm'")
        check_optimizer(training, given)
    except MissingOnThisMachineError as error:
        return str(error)
    return ""


def _check_paths(model: ModelArguments, data: DataArguments) -> None:
    """Check that each value that can only be a path exists; anything else may be a Hub id."""
    for source in data.leakage_check or []:
        check_exists("leakage_check", question_source(source))
    name = model.model_name_or_path
    if name is not None and name.startswith((".", "/", "~")) and not (path := Path(name).expanduser()).is_dir():
        raise RecipeError(f"model_name_or_path={name!r}: no folder at {path.absolute()}. Correct the path.")


def _check_revision(model: ModelArguments, given: Mapping[str, Any], replaced: Collection[str]) -> None:
    """Refuse a revision of a local folder, unless the folder stands in on the command line for the recipe's model."""
    name = model.model_name_or_path
    is_meant = "model_revision" in replaced or "model_name_or_path" not in replaced
    if given.get("model_revision", "main") != "main" and is_meant and name and Path(name).expanduser().is_dir():
        raise RecipeError(
            f"model_revision={model.model_revision!r} does nothing: model_name_or_path={name!r} is a folder, and only "
            "models on the Hub have revisions. Remove it."
        )


def _check_sources(data: DataArguments, replaced: Collection[str]) -> None:
    """Check what can be known of each data set before a row is read, and that each setting for them has an effect.

    Args:
        replaced: the settings given on the command line. What a recipe says of its own data set may have no effect on
            one that stands in for it: recipes/gsm8k_small.yaml has dataset_config, and --dataset may give a file.
    """
    training = [("dataset", entry, data.training_source(entry, 0)) for entry in data.training_entries()]
    held_out = [("eval_dataset", entry, data.held_out_source(entry, 0)) for entry in data.held_out_entries()]
    # 1. Each exists, is of a known format, and has its split
    for key, entry, source in (*training, *held_out):
        check_exists(key, source)
        _check_part(key, source, is_stream=data.streaming and key == "dataset")
        if key not in replaced:
            _check_split(key, entry, source)
        if entry.config and (source.is_file or source.name == "builtin"):
            raise RecipeError(
                f"{key}: {entry.path} has no configurations, so config={entry.config!r} does nothing. Remove it."
            )
        if entry.revision and (source.name == "builtin" or local_path(source.name) is not None):
            raise RecipeError(
                f"{key}: {entry.path} is not on the Hub, so revision={entry.revision!r} does nothing. Remove it."
            )
    # 2. What only some kinds of data sets have
    sources = [source for _, _, source in (*training, *held_out)]
    folders = [source for source in sources if not source.is_file and source.name != "builtin"]
    hub = [source for source in folders if local_path(source.name) is None]
    idle = {
        "dataset_config": (data.dataset_config, folders, "a Hub data set or a folder has configurations"),
        "dataset_revision": (data.dataset_revision, hub, "a Hub data set has revisions"),
        "columns": (data.columns, [source for source in sources if source.name != "builtin"], "builtin has our own"),
    }
    for key, (value, users, reason) in idle.items():
        if value and not users and (key in replaced or "dataset" not in replaced):
            raise RecipeError(f"{key}={value!r} would do nothing here: {reason}. Remove it.")


def _check_split(key: str, entry: DatasetEntry, source: Source) -> None:
    part = Slice.of(source.split)
    of_all = "dataset_split" if key == "dataset" else "eval_split"
    setting_name = of_all if entry.split is None else "split"
    where = f"{key}={source.name!r} with the split {source.split!r}"
    if source.is_file and not source.has_splits and part.split not in ("train", "test"):
        raise RecipeError(f"{where}: a file holds one split, so its name would select nothing. Remove {setting_name}.")
    if source.name == "builtin" and part.split not in SPLITS:
        raise RecipeError(f"{where}: builtin has the splits {', '.join(SPLITS)}. Correct {setting_name}.")


def _check_part(key: str, source: Source, *, is_stream: bool) -> None:
    where = f"{key}={source.name!r} with the split {source.split!r}"
    if is_stream and Slice.of(source.split).needs_count:
        raise RecipeError(
            f"{where}: the length of a stream is not known. Give numbers of rows from the start (train[:1000]), or "
            "set streaming to false."
        )


def _check_template_file(training: MatrixConfig) -> None:
    template = training.chat_template_path
    if template is not None and not (file := Path(template).expanduser()).is_file():
        raise RecipeError(f"chat_template_path={template!r}: no file at {file.absolute()}. Give a Jinja file.")


def _check_leakage(data: DataArguments, given: Mapping[str, Any]) -> None:
    idle = [key for key in ("leakage", "leakage_ngram", "leakage_share") if key in given]
    if idle and not data.leakage_check:
        raise RecipeError(
            f"{', '.join(idle)} given, but leakage_check names no test set. Set leakage_check to a list of paths or "
            "Hub ids."
        )


def _check_chat(model: ModelArguments, data: DataArguments, given: Mapping[str, Any]) -> None:
    """With `prompt_template: chat` the chat template says everything; one must exist."""
    if data.prompt_template != CHAT:
        return
    if model.tokenizer_vocab_size is not None:
        raise RecipeError(
            f"prompt_template={CHAT!r} is the tokenizer's chat template, but a tokenizer trained on the rows "
            f"(tokenizer_vocab_size={model.tokenizer_vocab_size}) has none. Give tokenizer_name_or_path, or another "
            "prompt_template."
        )
    if "response_separator" in given:
        raise RecipeError(
            f"response_separator={data.response_separator!r} does nothing with prompt_template={CHAT!r}: the chat "
            "template says what goes between prompt and response. Remove response_separator."
        )


def _check_streaming(data: DataArguments, given: Mapping[str, Any]) -> None:
    if not data.streaming:
        if "streaming_buffer" in given:
            raise RecipeError(
                f"streaming_buffer={data.streaming_buffer} does nothing without streaming. Set streaming to true, or "
                "remove streaming_buffer."
            )
        return
    if given.get("max_steps", -1) < 1:
        raise RecipeError(
            "streaming=True: the length of a stream is not known, so num_train_epochs means nothing. Set max_steps."
        )
    if given.get("train_sampling_strategy", "random") != "random":
        raise _streaming_clash("train_sampling_strategy", given, "a stream has one order")
    if given.get("shuffle_dataset"):
        raise _streaming_clash("shuffle_dataset", given, "streaming_buffer shuffles a stream")


def _streaming_clash(key: str, given: Mapping[str, Any], reason: str) -> RecipeError:
    return RecipeError(
        f"streaming=True together with {key}={given[key]!r} cannot work: {reason}. Remove {key}, or streaming."
    )


def _check_adapters(model: ModelArguments, given: Mapping[str, Any]) -> None:
    others = ("use_dora", "use_rslora", "init_lora_weights")
    idle = [key for key in given if key.startswith("lora_") or key in others]
    if idle and "use_peft" not in given:
        raise RecipeError(
            f"{', '.join(idle)} given, but use_peft is not, so they would do nothing. Add use_peft: true, or remove "
            "them."
        )
    idle = [key for key in given if key in ("bnb_4bit_quant_type", "use_bnb_nested_quant")]
    if idle and "load_in_4bit" not in given:
        raise RecipeError(
            f"{', '.join(idle)} given, but load_in_4bit is not, so they would do nothing. Add load_in_4bit: true, or "
            "remove them."
        )
    if model.lora_layers_pattern and not model.lora_layers_to_transform:
        raise RecipeError(
            f"lora_layers_pattern={model.lora_layers_pattern!r} says where blocks are counted, but "
            "lora_layers_to_transform names none. Give both, or remove lora_layers_pattern."
        )
    if model.lora_layers_to_transform and isinstance(model.lora_target_modules, str):
        raise RecipeError(
            f"lora_layers_to_transform={model.lora_layers_to_transform} together with "
            f"lora_target_modules={model.lora_target_modules!r} cannot work: PEFT counts blocks for lists of names. "
            "Give lora_target_modules as a list, or name the blocks in a regular expression."
        )


def _check_adapter_sharding(model: ModelArguments, given: Mapping[str, Any], training: MatrixConfig) -> None:
    """Refuse ZeRO-3 and FSDP where the frozen weights cannot be split over processes."""
    if not model.use_peft or not (model.quantised_by or model.changes_base):
        return
    is_fsdp = bool(given.get("fsdp")) or environment_says("ACCELERATE_USE_FSDP")
    if not is_fsdp and _zero_stage(given.get("deepspeed"), training) != 3:
        return
    engine = "FSDP" if is_fsdp else "ZeRO stage 3"
    if model.quantised_by:
        what, reason = f"{model.quantised_by}=True", "quantised weights cannot be split over processes"
    else:
        what = f"init_lora_weights={model.init_lora_weights!r}"
        reason = "it decomposes whole weights, and each process would hold a part"
    raise RecipeError(
        f"{what} together with {engine} cannot work: {reason}. Use plain data parallelism, ZeRO-1 or ZeRO-2, or remove "
        f"{what.partition('=')[0]}."
    )


def _zero_stage(deepspeed: Any, training: MatrixConfig) -> int:
    """DeepSpeed's stage by the recipe or the launcher; 0 without DeepSpeed."""
    if training.deepspeed_plugin is not None:
        return training.deepspeed_plugin.zero_stage
    if isinstance(deepspeed, str):  # a plan is made without the plugin
        deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    if isinstance(deepspeed, dict):
        return deepspeed.get("zero_optimization", {}).get("stage", 0)
    return 0


def _check_evaluation(data: DataArguments, given: Mapping[str, Any]) -> None:
    strategy = given.get("eval_strategy", "no")
    if strategy != "no" and data.eval_dataset is None:
        raise RecipeError(
            f"eval_strategy={strategy!r} has no rows to evaluate on. Give eval_dataset, or set eval_strategy to no."
        )
