"""What becomes of each key of `trl.SFTConfig` in a recipe: none is accepted and ignored.

Rows are tokenised before the trainer sees them, and a recipe computes no metrics of its own, so some of SFTConfig's
keys would do nothing here. Those are refused, each with what to write instead. A key that none of the three tables
knows, because TRL or transformers is newer than they are, is refused as well.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import checkpoint
from trl import SFTConfig

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import nearest

# Read by transformers' Trainer, by TRL's SFTTrainer or by Accelerate, as in any SFTTrainer script
BY_TRAINER = {
    "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "optim_target_modules", "gradient_accumulation_steps", "max_grad_norm",
    "label_smoothing_factor", "bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache", "neftune_noise_alpha",
    "torch_empty_cache_steps", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps",
    "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_accumulation_steps",
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "load_best_model_at_end",
    "metric_for_best_model", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism",
    "seed", "use_cpu", "accelerator_config", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns",
    "train_sampling_strategy", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug",
    "skip_memory_metrics", "router_aux_loss_coef", "shuffle_dataset", "packing", "packing_strategy",
    "padding_free", "pad_to_multiple_of", "loss_type", "activation_offloading",
}  # fmt: skip

# Read by this package, where the trainer does not see them or does something else
BY_US = {
    "output_dir", "average_tokens_across_devices", "logging_nan_inf_filter", "save_total_limit",
    "greater_is_better", "data_seed", "resume_from_checkpoint", "push_to_hub", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_revision", "trust_remote_code", "chat_template_path", "dataset_num_proc",
    "eos_token", "pad_token", "max_length", "eval_packing", "completion_only_loss", "assistant_only_loss", "do_train",
    "do_eval",
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """Why a key is refused. Its default is always accepted."""

    reason: str
    """Why it cannot be honoured."""
    way_out: str
    """What to write instead."""
    harmless: tuple[Any, ...] = ()
    """Values that say what happens anyway."""


_NO_METRICS = "a recipe computes no metrics from predictions"
_ROWS_ARE_OURS = "rows are read and tokenised before the trainer sees them"

REFUSED = {
    # rows
    "dataset_text_field": Refusal(_ROWS_ARE_OURS, "Write `columns: {{text: {value}}}`."),
    "dataset_kwargs": Refusal(_ROWS_ARE_OURS, "Remove it."),
    "truncation_mode": Refusal(
        "`too_long: truncate` cuts the end of a row, and TRL is dropping keep_end", "Remove it, or raise max_length."
    ),
    "length_column_name": Refusal("tokenised rows carry no such column; their lengths are measured", "Remove it."),
    # model
    "model_init_kwargs": Refusal(
        "the model is loaded before the trainer is built", "Write dtype, attn_implementation or model_revision."
    ),
    # evaluation
    "do_predict": Refusal("training predicts nothing", "Remove it; the scripts in eval/ answer test questions."),
    "bf16_full_eval": Refusal(
        "evaluation after training would cast the weights before they are saved", "Write `bf16: true`."
    ),
    "fp16_full_eval": Refusal(
        "evaluation after training would cast the weights before they are saved", "Write `fp16: true`."
    ),
    "eval_do_concat_batches": Refusal(_NO_METRICS, "Remove it."),
    "eval_use_gather_object": Refusal(_NO_METRICS, "Remove it."),
    "include_for_metrics": Refusal(_NO_METRICS, "Remove it."),
    "batch_eval_metrics": Refusal(_NO_METRICS, "Remove it."),
    "label_names": Refusal("every row's labels are called labels", "Remove it.", (["labels"],)),
    # batches
    "auto_find_batch_size": Refusal(
        "it would halve the batch, and with it the effective batch of the plan, without a word",
        "Choose per_device_train_batch_size by the memory that --dry_run estimates.",
    ),
    # processes
    "parallelism_config": Refusal("a recipe cannot hold it", "Give the sizes to `accelerate launch`."),
    "local_rank": Refusal("the launcher numbers the processes", "Remove it."),
    # checkpoints
    "enable_jit_checkpoint": Refusal("SIGTERM already saves a checkpoint here", "Remove it."),
    # the Hub
    "hub_always_push": Refusal("only the finished run is pushed", "Remove it."),
}

KNOWN = BY_TRAINER | BY_US | REFUSED.keys()

# Keys that do nothing until another one is set: that one, and what it might say. Where the other one is given, and says
# no, it was switched off on purpose: nothing is refused.
NEEDS = {
    **dict.fromkeys(["eval_steps", "eval_delay"], ("eval_strategy", "steps")),
    **dict.fromkeys(["hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy"], ("push_to_hub", "true")),
    "packing_strategy": ("packing", "true"),
    **dict.fromkeys(["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"], ("report_to", "trackio")),
    **dict.fromkeys(
        [
            "dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order",
            "dataloader_prefetch_factor",
        ],
        ("dataloader_num_workers", "2"),
    ),
    "project": ("report_to", "trackio"),
    "liger_kernel_config": ("use_liger_kernel", "true"),
    "fsdp_config": ("fsdp", "true"),
    "eval_on_start": ("eval_dataset", "..."),
    "early_stopping_threshold": ("early_stopping_patience", "3"),
    "mce_order": ("mce_solver", "taylor"),
    **dict.fromkeys(["max_eval_rows", "eval_split", "builtin_eval_rows"], ("eval_dataset", "...")),
    **dict.fromkeys(["accuracy_max_new_tokens", "accuracy_engine"], ("accuracy_rows", "100")),
}  # fmt: skip


def check_keys(given: Mapping[str, Any]) -> None:
    """Refuse a given key of SFTConfig that would do nothing, or that is not known here.

    Args:
        given: the recipe's own keys, without defaults.

    Raises:
        RecipeError: with the key, its value, the reason and the way out.
    """
    defaults = {field.name: _default(field) for field in dataclasses.fields(SFTConfig)}
    for key, value in given.items():
        if key in defaults and key not in KNOWN and value != defaults[key]:
            raise RecipeError(
                f"{key}={value!r}: this version of transformers or TRL has a setting that matrix_llm does not know, so "
                "it may do nothing. Remove it."
            )
        refusal = REFUSED.get(key)
        if refusal is not None and value is not None and value not in (defaults.get(key), *refusal.harmless):
            way_out = refusal.way_out.format(value=value)
            raise RecipeError(f"{key}={value!r} cannot be honoured: {refusal.reason}. {way_out}")
    _check_modes(given)
    _check_needs(given, defaults)
    _check_nested(given)


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _check_modes(given: Mapping[str, Any]) -> None:
    """do_train and do_eval may say what happens anyway."""
    if given.get("do_train") is False:
        raise RecipeError(
            "do_train=False cannot be honoured: a recipe trains. Remove it; --dry_run trains nothing, and the scripts "
            "in eval/ score a model."
        )
    evaluates = given.get("eval_dataset") is not None
    if given.get("do_eval") not in (None, evaluates):
        way_out = "remove eval_dataset" if evaluates else "give eval_dataset"
        raise RecipeError(
            f"do_eval={given['do_eval']!r} cannot be honoured: held-out rows are evaluated if eval_dataset names some. "
            f"Remove do_eval, or {way_out}."
        )


def _check_needs(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for key, (other, example) in NEEDS.items():
        if given.get(key) not in (None, defaults.get(key)) and other not in given:
            raise RecipeError(
                f"{key}={given[key]!r} does nothing, because {other} is not given. Write `{other}: {example}`, or "
                f"remove {key}."
            )


def _check_nested(given: Mapping[str, Any]) -> None:
    """Refuse keys inside a mapping that would be ignored, or would change what the plan has printed."""
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state", "selective", "every_n_layers"}
        known -= {"function", "args", "kwargs"}
        for name in given[key] if isinstance(given.get(key), dict) else ():
            if name not in known:
                raise RecipeError(f"{key}: {name!r} is not a setting of it.{nearest(name, known) or ' Remove it.'}")
    accelerator = given.get("accelerator_config")
    if not isinstance(accelerator, dict):
        return
    if accelerator.get("split_batches"):
        raise RecipeError(
            "accelerator_config: split_batches=True would make per_device_train_batch_size the batch of all processes. "
            "Remove it, and divide per_device_train_batch_size by their number."
        )
    if "num_steps" in (accelerator.get("gradient_accumulation_kwargs") or {}):
        raise RecipeError(
            "accelerator_config: num_steps would change the accumulation behind the plan. Write "
            "gradient_accumulation_steps."
        )
