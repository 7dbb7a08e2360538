"""The settings inside `fsdp_config` and the DeepSpeed config. The engines ignore a misspelt one, or refuse it late."""

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.files import parse_json
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
ACCELERATES = {"offload_params": "cpu_offload", "sharding_strategy": "reshard_after_forward"}  # its names for the same

# What DeepSpeed reads at the top of its config, and what accelerate puts there
DEEPSPEED = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state",
    "expert_parallel", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "msamp", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print", "tensor_parallel",
    "tensorboard", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
# Read by DeepSpeed 0.19.0; later versions refuse them, with the reason
DEEPSPEED_OLDER = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
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
        content = parse_json(path.read_bytes())
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where} line {error.lineno}: this is not JSON: {error.msg}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{where} is not UTF-8 text. Save the file as UTF-8.") from None
    except ValueError as error:
        raise RecipeError(f"{where}: this is not JSON: {error}.") from None
    if not isinstance(content, dict):
        example = " Start from a file in ds_configs/." if key == "deepspeed" else ""
        raise RecipeError(f"{where} does not hold a JSON object.{example}")
    return content


def check_fsdp(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that transformers would not read; a name such as "_comment" is none."""
    names: dict[str, Any] = {}
    for key in filter(_is_setting, settings):
        if (name := str(key).removeprefix("fsdp_")) in names:
            raise RecipeError(f"{where}: {names[name]!r} and {key!r} are the same setting. Remove one of them.")
        names[name] = key
    is_version_1 = "version" in names and _fsdp_version(where, settings[names["version"]]) == 1
    for name, key in names.items():
        if name in FSDP_VERSION_1 and not is_version_1:
            raise RecipeError(f"{where}: {key!r} is read by FSDP version 1 alone, and this is version 2. Remove it.")
        if name not in FSDP + FSDP_VERSION_1:
            known = FSDP + FSDP_VERSION_1 if is_version_1 else FSDP
            hint = f" transformers calls it {ACCELERATES[name]}." if name in ACCELERATES else nearest(name, known)
            raise RecipeError(f"{where}: {key!r} is not a setting of FSDP.{hint} Correct or remove it.")


def _is_setting(key: Any) -> bool:
    """Not a comment: JSON has none, so people write "_comment" or "//", which no engine reads."""
    return str(key)[:1].isalpha()


def _fsdp_version(where: str, given: Any) -> int:
    """As transformers reads it, which takes all but 2 for version 1."""
    try:
        version = int(given)
    except (TypeError, ValueError):
        version = 0
    if version not in (1, 2):
        raise RecipeError(f"{where}: version={given!r} is not 1 or 2. Write 2, or leave it out.")
    return version


def check_deepspeed(where: str, blocks: Mapping[str, Any]) -> None:
    """Refuse a `scheduler` block, and settings that DeepSpeed would not read; a name such as "_comment" is none.

    Those inside `zero_optimization`, `bf16` and `fp16` are compared where DeepSpeed is installed; the settings of other
    blocks are not looked at.
    """
    if "scheduler" in blocks:
        raise RecipeError(
            f"{where} holds a `scheduler` block, which would silently replace lr_scheduler_type. Remove the "
            "block: the recipe decides."
        )
    is_installed = importlib.util.find_spec("deepspeed") is not None
    for key in filter(_is_setting, blocks):
        if key in DEEPSPEED_OLDER and is_installed:
            _check_older(where, key)
        elif key not in DEEPSPEED + DEEPSPEED_OLDER:
            raise _not_deepspeeds(where, key, DEEPSPEED)
    if is_installed and blocks.keys() & DEFINED:
        for name, model in _block_models().items():
            _check_block(f"{where}: {name}", blocks.get(name), model)


def _check_older(where: str, key: str) -> None:
    """Refuse what the installed DeepSpeed has removed, before it does so itself: once the model is loaded."""
    with _without_warnings():
        from deepspeed.runtime import config
    if reason := getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}).get(key):
        raise RecipeError(f"{where}: {key!r} is not a setting of this DeepSpeed: {reason.strip()} Remove it.")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """For the import of DeepSpeed, which warns of what this machine lacks for training."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _block_models() -> dict[str, Any]:
    """DeepSpeed's own definitions of the blocks in DEFINED. Its import takes seconds, so it is not at the top."""
    with _without_warnings():
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
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
