"""The settings inside `fsdp_config` and the DeepSpeed config. The engines ignore a misspelt one, or refuse it late."""

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import nearest

# What transformers reads of fsdp_config, each with or without the prefix fsdp_
FSDP = (
    "version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params", "reshard_after_forward",
    "cpu_offload", "cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing", "xla", "xla_fsdp_v2",
    "xla_fsdp_grad_ckpt", "xla_fsdp_settings",
)  # fmt: skip
FSDP_VERSION_1 = (
    "forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers",
)  # fmt: skip

# What DeepSpeed reads at the top of its config, and what accelerate puts there
DEEPSPEED = (
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor", "data_efficiency", "data_types",
    "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state",
    "expert_parallel", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "msamp", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print", "tensor_parallel",
    "tensorboard", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
DEFINED = {"zero_optimization", "bf16", "bfloat16", "fp16"}  # DeepSpeed has a pydantic model of each


def check_engines(given: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed or FSDP config that cannot be read, or holds a setting that the engine does not read.

    Raises:
        RecipeError: with the setting and the nearest that exists.
    """
    if isinstance(given.get("deepspeed"), str):
        check_deepspeed(f"deepspeed={given['deepspeed']!r}", _read_json("deepspeed", given["deepspeed"]))
    elif isinstance(given.get("deepspeed"), dict):
        check_deepspeed("deepspeed", given["deepspeed"])
    if isinstance(given.get("fsdp_config"), str):
        check_fsdp(f"fsdp_config={given['fsdp_config']!r}", _read_json("fsdp_config", given["fsdp_config"]))
    elif isinstance(given.get("fsdp_config"), dict):
        check_fsdp("fsdp_config", given["fsdp_config"])


def _read_json(key: str, name: str) -> dict[str, Any]:
    path, where = Path(name), f"{key}={name!r}"
    if not path.is_file():
        raise RecipeError(f"{where}: no file at {path.absolute()}. Correct the path.")
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where} line {error.lineno}: this is not JSON: {error.msg}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{where} is not UTF-8 text. Save the file as UTF-8.") from None
    if not isinstance(content, dict):
        example = " Start from a file in ds_configs/." if key == "deepspeed" else ""
        raise RecipeError(f"{where} does not hold a JSON object.{example}")
    return content


def check_fsdp(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that transformers would not read."""
    names = {str(key).removeprefix("fsdp_"): key for key in settings}
    is_version_1 = "version" in names and str(settings[names["version"]]) == "1"
    for name, key in names.items():
        if name in FSDP_VERSION_1 and not is_version_1:
            raise RecipeError(f"{where}: {key!r} is read by FSDP version 1 alone, and this is version 2. Remove it.")
        if name not in FSDP + FSDP_VERSION_1:
            known = FSDP + FSDP_VERSION_1 if is_version_1 else FSDP
            raise RecipeError(f"{where}: {key!r} is not a setting of FSDP.{nearest(name, known)} Correct or remove it.")


def check_deepspeed(where: str, blocks: Mapping[str, Any]) -> None:
    """Refuse a `scheduler` block, and settings that DeepSpeed would not read.

    Those inside `zero_optimization`, `bf16` and `fp16` are compared where DeepSpeed is installed; the settings of other
    blocks are not looked at.
    """
    if "scheduler" in blocks:
        raise RecipeError(
            f"{where} holds a `scheduler` block, which would silently replace lr_scheduler_type. Remove the "
            "block: the recipe decides."
        )
    for key in blocks:
        if key not in DEEPSPEED:
            raise _not_deepspeeds(where, key, DEEPSPEED)
    if blocks.keys() & DEFINED and importlib.util.find_spec("deepspeed") is not None:
        for name, model in _block_models().items():
            _check_block(f"{where}: {name}", blocks.get(name), model)


def _block_models() -> dict[str, Any]:
    """DeepSpeed's own definitions of the blocks in DEFINED. Its import takes seconds, so it is not at the top."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of what this machine lacks for training
    try:
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    finally:
        logging.disable(before)
    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }


def _check_block(where: str, settings: Any, model: Any) -> None:
    if not isinstance(settings, dict):  # DeepSpeed says what is wrong with another type
        return
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        fields |= {name: field, field.alias or name: field}
    for key, value in settings.items():
        if key not in fields:
            raise _not_deepspeeds(where, key, fields)
        for inner in _models_of(fields[key].annotation):
            _check_block(f"{where}.{key}", value, inner)


def _models_of(annotation: Any) -> Iterator[Any]:
    """The pydantic models in a type such as Optional[Model]."""
    for each in (annotation, *get_args(annotation)):
        if hasattr(each, "model_fields"):
            yield each


def _not_deepspeeds(where: str, key: Any, known: Any) -> RecipeError:
    return RecipeError(
        f"{where}: {key!r} is not a setting of DeepSpeed.{nearest(key, list(known))} Correct or remove it."
    )
