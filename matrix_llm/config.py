"""The settings of a run: three dataclasses, and the strict reader of a flat YAML recipe with command-line overrides.

Everything is checked here, before a weight or a row is loaded: names, types, ranges, and combinations that would train wrongly in silence.

>>> # recipes/tiny.yaml: "mce_weight: 1.0" and so on, one flat mapping
>>> # load_recipe("recipes/tiny.yaml", ["--learning-rate", "2e-5", "--packing"]).training.learning_rate == 2e-5
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.gpus import GPUS
from matrix_llm.base.reader import Settings, find_beside
from matrix_llm.base.values import check_choice, check_range
from matrix_llm.data.prompts import resolve_template
from matrix_llm.data.readers import local_path, looks_local

__all__ = ["DataArguments", "MatrixConfig", "ModelArguments", "Recipe", "RecipeError", "load_recipe"]


# ---------------------------------------------------------------------------------------------------------------- the settings
# A field's name is its key in the recipe and its flag on the command line.


@dataclass
class MatrixConfig(SFTConfig):
    """trl.SFTConfig plus the matrix cross-entropy. With mce_weight = 0 it means what SFTConfig means.

    Two defaults differ: `logging_nan_inf_filter` is False (True logs a NaN loss as 0.0), and an unset `bf16` stays off where SFTConfig
    would refuse to be built (no bf16 GPU, and `use_cpu` not given).
    """

    mce_weight: float = 1.0  # loss = CE + mce_weight * MCE; 0 is plain SFT, at no extra cost
    mce_warmup_steps: float = (
        0  # the weight rises linearly over so many steps; below 1, a share of all steps, as warmup_steps
    )
    mce_solver: str = field(default="krylov", metadata={"choices": ["exact", "krylov", "taylor"]})
    mce_steps: int | None = None  # Krylov steps; None: the library's measured default
    mce_order: int = 4  # order of the Taylor solver
    mce_sketch_dim: int | None = None  # width the embeddings are sketched to; None: no sketch
    mce_top_k: int | None = (
        None  # likeliest tokens kept exactly, the rest by its moments; None: 16, or all of a small vocabulary
    )
    mce_embeddings: str = "lm_head"  # which token vectors: "lm_head", "input", or a path to a .safetensors
    mce_embedding_grad: bool = False  # True: the gradient also flows through the token vectors of the MCE
    effective_rank_steps: int = 0  # log the effective rank of the LM head every so many steps; 0: at start and end only
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        if self.bf16 is None and not self.fp16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16 = False
        self._check_mce()
        super().__post_init__()
        self._check_engine()

    def _check_engine(self) -> None:
        """What the launcher and a DeepSpeed file ask for, known before a weight is loaded."""
        if self.eval_packing and not self.packing and not self.padding_free:
            raise RecipeError(
                "eval_packing=True with packing=False: rows are packed, but batched without their positions, so they would see each other. "
                "Set packing: true as well, or remove eval_packing."
            )
        if self.mce_weight == 0:
            return
        launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"

        def size(name: str) -> int:
            if self.parallelism_config is not None:
                return getattr(self.parallelism_config, name) or 1
            return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) if launched else 1

        blocks = self.deepspeed_plugin.deepspeed_config if self.deepspeed_plugin is not None else {}
        sliced = "each process would hold a slice of the vocabulary, and the loss needs all of it"
        version = str((self.fsdp_plugin_args or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))
        shards = bool(self.fsdp_plugin_args) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        for clash, what, reason, way_out in [
            (
                size("tp_size") > 1,
                f"tensor parallelism (tp_size={size('tp_size')})",
                sliced,
                "Shard with ZeRO-3 or FSDP2 instead.",
            ),
            (
                size("sp_size") > 1,
                f"sequence parallelism (sp_size={size('sp_size')})",
                "Trainer reduces the model's own loss across processes there, without the MCE term",
                "Remove it.",
            ),
            (
                int(blocks.get("tensor_parallel", {}).get("autotp_size", 1)) > 1,
                "a `tensor_parallel` block in the DeepSpeed config",
                sliced,
                "Remove the block and set stage 3 instead.",
            ),
            (
                shards and version == "1",
                "FSDP version 1",
                "it flattens the head that the loss reads, and transformers drops it",
                "Launch with --fsdp_version 2, or with ds_configs/fsdp2.yaml.",
            ),
        ]:
            if clash:
                raise RecipeError(f"mce_weight={self.mce_weight} together with {what} cannot work: {reason}. {way_out}")

    def _check_mce(self) -> None:
        check_range("mce_weight", self.mce_weight)
        for name in ("mce_warmup_steps", "mce_steps", "mce_order", "effective_rank_steps"):
            check_range(name, getattr(self, name))
        check_choice("mce_solver", self.mce_solver, ["exact", "krylov", "taylor"])
        for name in ("mce_sketch_dim", "mce_top_k"):
            value = getattr(self, name)
            if not (value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)):
                raise RecipeError(f"{name}={value!r} is not a size. Give null for none, or an integer of at least 1.")
        if self.mce_embeddings not in ("lm_head", "input"):
            if not self.mce_embeddings.endswith(".safetensors"):
                check_choice(
                    "mce_embeddings", self.mce_embeddings, ["lm_head", "input"], also="a path to a .safetensors file"
                )
            if not (file := Path(self.mce_embeddings).expanduser()).is_file():
                raise RecipeError(
                    f"mce_embeddings={self.mce_embeddings!r}: no file at {file.absolute()}. Correct the path."
                )
            if self.mce_embedding_grad:
                raise RecipeError(
                    f"mce_embedding_grad=True with mce_embeddings={self.mce_embeddings!r}: vectors read from a file are no parameter of "
                    "the model, so their gradient goes nowhere. Leave mce_embedding_grad at false, or use lm_head or input."
                )
        if self.mce_weight > 0:
            for name, clash, reason in [
                (
                    "label_smoothing_factor",
                    self.label_smoothing_factor > 0,
                    "MCE is defined against the one true token",
                ),
                (
                    "loss_type",
                    self.loss_type == "dft",
                    "it reweights each token's CE by its probability, and MCE has no such form",
                ),
                ("use_liger_kernel", self.use_liger_kernel, "its fused loss replaces the forward that computes MCE"),
                (
                    "packing_strategy",
                    (self.packing or self.eval_packing) and self.packing_strategy == "wrapped",
                    "it cuts rows anywhere and lets them see each other, so that a token's loss depends on its neighbours in the pack",
                ),
            ]:
                if clash:
                    raise RecipeError(
                        f"mce_weight={self.mce_weight} together with {name}={getattr(self, name)!r} cannot work: {reason}. "
                        f"Remove {name}, or set mce_weight to 0."
                    )


@dataclass
class ModelArguments:
    """Which model and tokenizer, and what of it is trained. Exactly one of model_name_or_path and model_config is given."""

    model_name_or_path: str | None = None  # a folder or a Hub id
    model_revision: str = "main"
    model_config: dict | None = None  # a model from scratch, e.g. {"model_type": "llama", "hidden_size": 64, ...}
    tokenizer_name_or_path: str | None = None  # default: the model's own
    tokenizer_vocab_size: int | None = (
        None  # train a byte-level BPE of this size on the training text (from scratch only)
    )
    dtype: str = field(
        default="float32", metadata={"choices": ["float32", "bfloat16", "float16", "auto"]}
    )  # of the master weights
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | str | None = None
    lora_modules_to_save: list[str] | None = None
    load_in_4bit: bool = False  # QLoRA: the frozen base in 4 bits, through bitsandbytes
    gpu: str | None = field(default=None, metadata={"choices": [*GPUS]})  # --dry_run says which sharding fits it

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.model_config is None):
            given = "both are" if self.model_config is not None else "neither is"
            raise RecipeError(
                f"model_name_or_path and model_config: {given} given, but a model is either loaded or built from scratch. Give exactly one."
            )
        if self.model_config is not None and not isinstance(self.model_config.get("model_type"), str):
            raise RecipeError(
                f"model_config={self.model_config!r} does not say which architecture to build. Add model_type, e.g. model_type: llama."
            )
        if self.model_config is not None and (self.tokenizer_name_or_path is None) == (
            self.tokenizer_vocab_size is None
        ):
            raise RecipeError(
                "model_config builds a model from scratch, which brings no tokenizer. Give exactly one of tokenizer_vocab_size (train one "
                "on the training text) and tokenizer_name_or_path."
            )
        if self.model_config is None and self.tokenizer_vocab_size is not None:
            raise RecipeError(
                f"tokenizer_vocab_size={self.tokenizer_vocab_size} would give a pretrained model token ids it has never seen. "
                "Remove it, or build the model from scratch with model_config."
            )
        if self.load_in_4bit and not self.use_peft:
            raise RecipeError("load_in_4bit=True freezes the weights, so nothing is left to train. Add use_peft: true.")
        if self.load_in_4bit and self.model_config is not None:
            raise RecipeError(
                "load_in_4bit=True freezes a pretrained base, and model_config has none. Give model_name_or_path instead."
            )


@dataclass
class DataArguments:
    """Which rows are trained and evaluated on, and how a row becomes tokens. The seeds are `seed` and `data_seed` of the training."""

    dataset: str | None = None  # "builtin", a .json/.jsonl/.parquet file, a folder of them, or a Hub id
    dataset_config: str | None = None  # the Hub dataset's configuration, e.g. "main" for openai/gsm8k
    dataset_split: str = "train"
    eval_dataset: str | None = None  # the same forms
    eval_split: str = "test"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    builtin_rows: int = 20000
    builtin_eval_rows: int = 200
    streaming: bool = False  # tokenise while training, cache nothing; needs max_steps
    streaming_buffer: int = 10000  # rows held for shuffling the stream; 1 keeps their order
    prompt_template: str = "metamath"  # a key of PROMPT_TEMPLATES, or a text holding {instruction} once
    response_separator: str = (
        " "  # white space between prompt and response; "" joins them as the MetaMath authors' training script does
    )
    too_long: str = field(default="drop", metadata={"choices": ["drop", "truncate", "error"]})
    leakage_check: list[str] | None = (
        None  # test sets whose questions are looked for in the training rows: paths, "openai/gsm8k:main"
    )
    leakage: str = field(
        default="report", metadata={"choices": ["report", "drop", "stop"]}
    )  # what is done about the rows found
    leakage_ngram: int = 13  # words in a sequence
    leakage_share: float = (
        0.5  # a row is found from this share of a test question's sequences on; equal questions always are
    )
    accuracy_rows: int = 0  # held-out problems decoded greedily before and after training
    accuracy_steps: int = 0  # and every so many optimizer steps between, logged as `accuracy`
    accuracy_max_new_tokens: int = 256

    def __post_init__(self):
        if self.dataset is None:
            raise RecipeError(
                'dataset is not given, so there is nothing to train on. Give "builtin", a file, a folder, or a Hub id.'
            )
        try:
            resolve_template(self.prompt_template)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if self.response_separator.strip():
            raise RecipeError(
                f"response_separator={self.response_separator!r} is no white space, so a model would have to write it before its answer. "
                "Put words at the end of prompt_template."
            )
        if self.accuracy_steps > 0 and self.accuracy_rows == 0:
            raise RecipeError(
                f"accuracy_steps={self.accuracy_steps} says when to measure accuracy, but accuracy_rows is 0. "
                "Set accuracy_rows to a number of held-out problems."
            )
        if self.accuracy_rows > 0 and self.eval_dataset is None and self.dataset != "builtin":
            raise RecipeError(
                f"accuracy_rows={self.accuracy_rows} needs held-out problems, but no eval_dataset is given. "
                "Give one, or set accuracy_rows to 0."
            )


@dataclass
class Recipe:
    model: ModelArguments
    data: DataArguments
    training: MatrixConfig
    path: Path
    resolved: dict[
        str, Any
    ]  # the keys actually given, YAML and overrides merged: what recipe.yaml in the output directory holds


# ------------------------------------------------------------------------------------------------------------------ names

_HINTS = {
    "warmup_ratio": "transformers 5 removed it: write `warmup_steps: 0.03` for 3 % of the steps",
    "overwrite_output_dir": "transformers 5 removed it: give another output_dir, or resume_from_checkpoint to go on",
    "logging_dir": "transformers 5 removed it: logs go to output_dir",
    "group_by_length": "transformers 5 removed it: write `train_sampling_strategy: group_by_length`",
    "evaluation_strategy": "it is called eval_strategy now",
    "max_seq_length": "it is called max_length now",
    "torch_dtype": "it is called dtype now",
    "no_cuda": "it is called use_cpu now",
    "per_gpu_train_batch_size": "it is called per_device_train_batch_size now",
    "push_to_hub_model_id": "it is called hub_model_id now",
    "save_safetensors": "transformers 5 removed it: weights are always saved as safetensors",
    "dataset_name": "it is called dataset here",
    "optimizer": "it is called optim",
    "lr": "it is called learning_rate",
    "epochs": "it is called num_train_epochs",
    "batch_size": "it is called per_device_train_batch_size",
    "config_name": "the dataset's configuration is dataset_config, a model from scratch is model_config",
    **dict.fromkeys(
        ["scheduler", "lr_scheduler", "scheduler_type", "lr_schedule"],
        "write `lr_scheduler_type: cosine` (or linear, ...)",
    ),
    **dict.fromkeys(
        ["warmup", "num_warmup_steps"], "write `warmup_steps: 100`, or a fraction of all steps: `warmup_steps: 0.03`"
    ),
}

SETTINGS = Settings({"model": ModelArguments, "data": DataArguments, "training": MatrixConfig}, _HINTS)


# ------------------------------------------------------------------------------------------------------------ cross-checks


def _check_together(model: ModelArguments, data: DataArguments, settings: dict[str, Any]) -> None:
    mce_weight = settings.get("mce_weight", MatrixConfig.mce_weight)
    for key in ("dataset", "eval_dataset"):
        source = getattr(data, key)
        if source is not None and looks_local(source) and local_path(source) is None:
            raise RecipeError(f"{key}={source!r}: nothing at {Path(source).expanduser().absolute()}. Correct the path.")
    _check_data(data, settings)
    name = model.model_name_or_path
    if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise RecipeError(
            f"model_name_or_path={name!r}: no folder at {Path(name).expanduser().absolute()}. Correct the path."
        )
    targets = model.lora_target_modules or []
    heads = (
        [targets]
        if isinstance(targets, str)
        else [each for each in targets if each.rsplit(".", 1)[-1] in ("lm_head", "embed_out")]
    )
    if isinstance(targets, str):
        heads = (
            [] if targets == "all-linear" else [each for each in ("lm_head", "embed_out") if _matches(targets, each)]
        )
    if model.use_peft and mce_weight > 0 and heads:
        raise RecipeError(
            f"mce_weight={mce_weight} needs the LM head, but lora_target_modules puts an adapter on `{heads[0]}`, whose weight the loss "
            f"reads directly. Remove it, or list `{heads[0]}` under lora_modules_to_save."
        )
    idle = [key for key in settings if key.startswith("lora_")]
    if idle and "use_peft" not in settings:
        raise RecipeError(
            f"{', '.join(idle)} given, but use_peft is not, so they would do nothing. Add use_peft: true, or remove them."
        )
    if settings.get("eval_strategy", "no") != "no" and data.eval_dataset is None:
        raise RecipeError(
            f"eval_strategy={settings['eval_strategy']!r} has no rows to evaluate on. Give eval_dataset, or set eval_strategy to no."
        )
    if isinstance(deepspeed := settings.get("deepspeed"), str):
        if not Path(deepspeed).is_file():
            raise RecipeError(f"deepspeed={deepspeed!r}: no file at {Path(deepspeed).absolute()}. Correct the path.")
        try:
            blocks = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RecipeError(f"deepspeed={deepspeed!r} line {error.lineno}: this is not JSON: {error.msg}.") from None
        if "scheduler" in blocks:
            raise RecipeError(
                f"deepspeed={deepspeed!r} carries a `scheduler` block, which replaces lr_scheduler_type in silence. Remove the block: the "
                "recipe decides."
            )


def _check_data(data: DataArguments, settings: dict[str, Any]) -> None:
    for source in data.leakage_check or []:
        if looks_local(source) and local_path(source) is None:
            raise RecipeError(
                f"leakage_check={source!r}: nothing at {Path(source).expanduser().absolute()}. Correct the path."
            )
    idle = [key for key in ("leakage", "leakage_ngram", "leakage_share") if key in settings]
    if idle and not data.leakage_check:
        raise RecipeError(
            f"{', '.join(idle)} given, but leakage_check names no test set. Give leakage_check a list of paths or Hub ids."
        )
    if not data.streaming:
        if "streaming_buffer" in settings:
            raise RecipeError(
                f"streaming_buffer={data.streaming_buffer} does nothing without streaming. Set streaming to true, or remove it."
            )
        return
    if settings.get("max_steps", -1) < 1:
        raise RecipeError(
            "streaming=True: a stream has no known end, so num_train_epochs means nothing. Set max_steps."
        )
    for key, clash, reason in [
        (
            "train_sampling_strategy",
            settings.get("train_sampling_strategy", "random") != "random",
            "a stream has one order",
        ),
        ("shuffle_dataset", settings.get("shuffle_dataset"), "streaming_buffer shuffles a stream"),
    ]:
        if clash:
            raise RecipeError(
                f"streaming=True together with {key}={settings[key]!r} cannot work: {reason}. Remove {key}, or streaming."
            )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise RecipeError(
            f"lora_target_modules={pattern!r} is not a regular expression: {error}. Give a list of module names."
        ) from None


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> Recipe:
    """Reads a flat YAML recipe, applies `--key value` overrides, checks everything and builds the three dataclasses.

    dry_run=True builds the training settings on the CPU whatever they ask for, so that a machine without a GPU can plan a bf16, DeepSpeed
    or FSDP run; the returned `training` then carries the recipe's own values, but must not be trained with.
    """
    path = Path(path).expanduser()
    resolved = SETTINGS.read(path, overrides)
    settings = dict(resolved)
    settings.setdefault("output_dir", f"runs/{path.stem}")
    for key in (
        "dataset",
        "eval_dataset",
        "deepspeed",
        "mce_embeddings",
        "model_name_or_path",
        "tokenizer_name_or_path",
    ):
        if isinstance(settings.get(key), str):
            settings[key] = find_beside(settings[key], path)
    if settings.get("leakage_check"):
        settings["leakage_check"] = [find_beside(each, path) for each in settings["leakage_check"]]
    given = SETTINGS.split(settings)
    try:
        model, data = ModelArguments(**given["model"]), DataArguments(**given["data"])
        _check_together(model, data, settings)
        training = _plan(given["training"]) if dry_run else MatrixConfig(**given["training"])
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"{path}: {error}") from None
    return Recipe(model=model, data=data, training=training, path=path, resolved=resolved)


def _plan(given: dict[str, Any]) -> MatrixConfig:
    """MatrixConfig for reading only: built without touching a GPU, DeepSpeed or FSDP, then given its own values back."""
    bf16 = given.get("bf16")
    if bf16 is None:
        bf16 = not given.get("fp16", False) and (given.get("use_cpu", False) or is_torch_bf16_gpu_available())
    hardware = {
        "use_cpu": True,
        "bf16": bf16,
        "tf32": None,
        "deepspeed": None,
        "fsdp": None,
        "fsdp_config": None,
        "torch_compile": False,
    }
    training = MatrixConfig(**{**given, **hardware})
    for key in hardware.keys() - {"bf16"}:
        setattr(training, key, given.get(key, getattr(MatrixConfig, key)))
    return training
