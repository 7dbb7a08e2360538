"""The settings of a run: three dataclasses, and the function that builds them from a recipe.

A field's name is its key in the recipe and its flag on the command line. Names, types, ranges and combinations that
would silently train wrongly are all checked here, before any weight or row is loaded.

>>> # recipes/tiny.yaml is one flat mapping, with a line `mce_weight: 1.0` and so on
>>> # load_recipe("recipes/tiny.yaml", ["--learning-rate", "2e-5", "--packing"]).training.learning_rate == 2e-5
"""

import copy
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.gpus import GPUS
from matrix_llm.base.reader import Settings, find_from_repository
from matrix_llm.base.values import check_choice, check_fields, setting
from matrix_llm.data.entries import DatasetEntry, check_columns, check_exists, map_paths, question_source, read_entries
from matrix_llm.data.prompts import resolve_template
from matrix_llm.data.readers import Slice, Source, local_path

__all__ = ["DataArguments", "MatrixConfig", "ModelArguments", "Recipe", "RecipeError", "load_recipe"]


# ------------------------------------------------------------------------------------------------ training and loss


# metric_for_best_model: the direction of the metrics that MatrixTrainer logs
HIGHER_IS_BETTER = {
    **dict.fromkeys(["ce", "mce", "entropy", "aux_loss", "peak_memory_gib"], False),
    **dict.fromkeys(["accuracy", "mean_token_accuracy", "effective_rank", "tokens_per_second", "mfu"], True),
}


@dataclass
class MatrixConfig(SFTConfig):
    """trl.SFTConfig plus the matrix cross-entropy (MCE). With mce_weight = 0 it means what SFTConfig means.

    Two defaults differ: `logging_nan_inf_filter` is False, and an unset `bf16` stays off where SFTConfig would refuse
    to be built (no GPU that computes in bfloat16, and `use_cpu` not given). The ranges of the inherited fields are in
    base/values.py.
    """

    mce_weight: float = setting(1.0, at_least=0)
    """Weight of the MCE term: loss = CE + mce_weight * MCE; 0 is plain SFT, at no extra cost."""
    mce_warmup_steps: float = setting(0, at_least=0)
    """Steps over which the weight rises linearly to mce_weight; below 1, that share of all steps, as warmup_steps."""
    mce_solver: str = setting("krylov", choices=["exact", "krylov", "taylor"])
    """How the matrix logarithm is evaluated: Lanczos quadrature, the dense logarithm, or the paper's Taylor series."""
    mce_steps: int | None = setting(None, at_least=1)
    """Krylov steps; None: 6."""
    mce_order: int = setting(4, at_least=1)
    """Order of the Taylor series, for `mce_solver: taylor` only."""
    mce_sketch_dim: int | None = setting(None, at_least=1)
    """Width of the random projection that the token vectors are sketched to; None: no sketch."""
    mce_top_k: int | None = setting(None, at_least=1)
    """Likeliest tokens kept exactly, the others by their second moments; None: 16, or all of a small vocabulary."""
    mce_embeddings: str = "lm_head"
    """The token vectors that MCE compares: "lm_head", "input", or the path of a .safetensors file with one matrix."""
    mce_embedding_grad: bool = False
    """Whether the gradient of the MCE term also flows through the token vectors."""
    effective_rank_steps: int = setting(0, at_least=0)
    """Steps between measurements of the LM head's effective rank; 0: at the start and the end only."""
    logging_nan_inf_filter: bool = False
    """Whether NaN and infinite losses are filtered from the log; True would log them as 0.0 and hide a failed run."""

    def __post_init__(self):
        # 1. What can be checked at once
        if self.bf16 is None and not self.fp16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16 = False  # SFTConfig would set True, and refuse itself
        check_fields(self)
        self._check_embeddings()
        if self.mce_weight > 0:
            self._check_loss()
        if self.eval_packing and not self.packing and not self.padding_free:
            raise RecipeError(
                "eval_packing=True with packing=False: rows are packed, but batched without their positions, so they "
                "would see each other. Set packing: true as well, or remove eval_packing."
            )
        # 2. Which way our own metrics improve: for transformers, a name that does not end in "loss" is higher-is-better
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            metric = f"_{self.metric_for_best_model}"  # eval_ce, or eval_NAME_ce of a named evaluation set
            known = [higher for name, higher in HIGHER_IS_BETTER.items() if metric.endswith(f"_{name}")]
            self.greater_is_better = known[0] if known else None
        # 3. What is known once SFTConfig has read the DeepSpeed and FSDP settings
        super().__post_init__()
        if self.mce_weight > 0:
            self._check_sharding()

    def _check_embeddings(self) -> None:
        """Refuse token vectors that do not exist, and a gradient with no parameter to flow to."""
        if self.mce_embeddings in ("lm_head", "input"):
            return
        if not self.mce_embeddings.endswith(".safetensors"):
            choices = ["lm_head", "input"]
            check_choice("mce_embeddings", self.mce_embeddings, choices, also="a path to a .safetensors file")
        if not (file := Path(self.mce_embeddings).expanduser()).is_file():
            raise RecipeError(
                f"mce_embeddings={self.mce_embeddings!r}: no file at {file.absolute()}. Correct the path."
            )
        if self.mce_embedding_grad:
            raise RecipeError(
                f"mce_embedding_grad=True with mce_embeddings={self.mce_embeddings!r}: vectors read from a file are "
                "not a parameter of the model, so their gradient goes nowhere. Set mce_embedding_grad to false, or "
                "mce_embeddings to lm_head or input."
            )

    def _check_loss(self) -> None:
        """Refuse settings that replace the loss MCE is added to, or change it in a way that has no meaning for MCE."""
        if self.label_smoothing_factor > 0:
            raise self._loss_clash("label_smoothing_factor", "MCE is defined against the one true token")
        if self.loss_type == "dft":
            reason = "it reweights each token's CE by its probability, and MCE has no such form"
            raise self._loss_clash("loss_type", reason)
        if self.use_liger_kernel:
            raise self._loss_clash("use_liger_kernel", "its fused loss replaces the forward that computes MCE")
        if (self.packing or self.eval_packing) and self.packing_strategy == "wrapped":
            reason = "it lets rows see each other, so a token's loss depends on the rows it is packed with"
            raise self._loss_clash("packing_strategy", reason)

    def _check_sharding(self) -> None:
        """Refuse ways of sharding the model under which the MCE term would be lost or wrong."""
        sharding = Sharding.of(self)
        no_vocabulary = "each process would hold a slice of the vocabulary, and the loss needs all of it"
        if sharding.tensor_parallel > 1:
            raise self._clash(
                f"tensor parallelism (tp_size={sharding.tensor_parallel})",
                no_vocabulary,
                "Shard with ZeRO-3 or FSDP2 instead.",
            )
        if sharding.deepspeed_tensor_parallel > 1:
            raise self._clash(
                "a `tensor_parallel` block in the DeepSpeed config",
                no_vocabulary,
                "Remove the block and set stage 3 instead.",
            )
        if sharding.sequence_parallel > 1:
            raise self._clash(
                f"sequence parallelism (sp_size={sharding.sequence_parallel})",
                "Trainer then reduces the model's own loss across processes, without the MCE term",
                "Remove it.",
            )
        if sharding.fsdp_version == "1":
            raise self._clash(
                "FSDP version 1",
                "it flattens the LM head that the loss reads, and transformers is dropping it",
                "Launch with --fsdp_version 2, or with ds_configs/fsdp2.yaml.",
            )

    def _loss_clash(self, key: str, reason: str) -> RecipeError:
        return self._clash(f"{key}={getattr(self, key)!r}", reason, f"Remove {key}, or set mce_weight to 0.")

    def _clash(self, what: str, reason: str, way_out: str) -> RecipeError:
        return RecipeError(f"mce_weight={self.mce_weight} together with {what} cannot work: {reason}. {way_out}")


@dataclass(frozen=True)
class Sharding:
    """How the model is spread over processes, known before a weight is loaded."""

    tensor_parallel: int
    """Processes that share each layer's weights, by Accelerate's parallelism config."""
    sequence_parallel: int
    """Processes that share each row's tokens."""
    deepspeed_tensor_parallel: int
    """Processes that share each layer's weights, by the `tensor_parallel` block of the DeepSpeed config."""
    fsdp_version: str | None
    """"1", "2", or None without FSDP."""

    @classmethod
    def of(cls, training: SFTConfig) -> "Sharding":
        """From the settings where they say so, else from the environment that `accelerate launch` prepares."""
        blocks = training.deepspeed_plugin.deepspeed_config if training.deepspeed_plugin is not None else {}
        fsdp = training.fsdp_plugin_args or {}
        version = str(fsdp.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))
        return cls(
            tensor_parallel=cls._parallel_size(training, "tp_size"),
            sequence_parallel=cls._parallel_size(training, "sp_size"),
            deepspeed_tensor_parallel=int(blocks.get("tensor_parallel", {}).get("autotp_size", 1)),
            fsdp_version=version if fsdp or _environment_says("ACCELERATE_USE_FSDP") else None,
        )

    @staticmethod
    def _parallel_size(training: SFTConfig, name: str) -> int:
        if training.parallelism_config is not None:
            return getattr(training.parallelism_config, name) or 1
        if _environment_says("ACCELERATE_USE_PARALLELISM_CONFIG"):
            return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))
        return 1


def _environment_says(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


# ------------------------------------------------------------------------------------------------------------ model


@dataclass
class ModelArguments:
    """Which model and tokenizer, and which weights are trained. Give model_name_or_path or model_config, not both."""

    model_name_or_path: str | None = None
    """A pretrained model: a folder or a Hub id."""
    model_revision: str = "main"
    """Branch, tag or commit of the model on the Hub."""
    model_config: dict | None = None
    """For a model built from scratch: transformers' settings, e.g. {"model_type": "llama", "hidden_size": 64, ...}."""
    tokenizer_name_or_path: str | None = None
    """A folder or a Hub id; None: the model's own tokenizer."""
    tokenizer_vocab_size: int | None = setting(None, at_least=260, note="256 bytes, 3 special tokens and one merge")
    """From scratch only: vocabulary size of a byte-level BPE that is trained on the training text."""
    dtype: str = setting("float32", choices=["float32", "bfloat16", "float16", "auto"])
    """Precision that the weights are stored in, whatever the checkpoint holds; `bf16: true` computes in bfloat16."""
    attn_implementation: str | None = None
    """transformers' attention, e.g. "sdpa" or "flash_attention_2"; None: transformers chooses."""
    use_peft: bool = False
    """Whether LoRA adapters are trained and the model's own weights frozen."""
    lora_r: int = setting(16, at_least=1)
    """Rank of the adapters."""
    lora_alpha: int = setting(32, at_least=1)
    """Scale of the adapters, which are multiplied by lora_alpha / lora_r."""
    lora_dropout: float = setting(0.05, at_least=0, below=1)
    """Dropout on the adapters' input."""
    lora_target_modules: list[str] | str | None = None
    """Layers that get an adapter: names, a regular expression, or "all-linear"; None: PEFT's choice for the model."""
    lora_modules_to_save: list[str] | None = None
    """Modules trained in full alongside the adapters, e.g. [lm_head]."""
    load_in_4bit: bool = False
    """QLoRA: whether the frozen weights are stored in 4 bits, by bitsandbytes."""
    gpu: str | None = setting(None, choices=GPUS)
    """The GPU that --dry_run plans for, e.g. "h100-80gb"."""

    def __post_init__(self):
        check_fields(self)
        if (self.model_name_or_path is None) == (self.model_config is None):
            given = "both are" if self.model_config is not None else "neither is"
            raise RecipeError(
                f"model_name_or_path and model_config: {given} given, but a model is either loaded or built from "
                "scratch. Give exactly one."
            )
        if self.model_config is not None:
            self._check_scratch(self.model_config)
        elif self.tokenizer_vocab_size is not None:
            raise RecipeError(
                f"tokenizer_vocab_size={self.tokenizer_vocab_size} would give a pretrained model token ids it has "
                "never seen. Remove it, or build the model from scratch with model_config."
            )
        if self.load_in_4bit and not self.use_peft:
            raise RecipeError("load_in_4bit=True freezes the weights, so nothing is left to train. Add use_peft: true.")

    def _check_scratch(self, model_config: dict) -> None:
        if not isinstance(model_config.get("model_type"), str):
            raise RecipeError(
                f"model_config={model_config!r} does not say which architecture to build. Add model_type, e.g. "
                "model_type: llama."
            )
        if (self.tokenizer_name_or_path is None) == (self.tokenizer_vocab_size is None):
            raise RecipeError(
                "model_config builds a model from scratch, which comes without a tokenizer. Give exactly one of "
                "tokenizer_vocab_size (train one on the training text) and tokenizer_name_or_path."
            )
        if self.load_in_4bit:
            raise RecipeError(
                "load_in_4bit=True stores a pretrained model in 4 bits, but model_config builds one from scratch. Give "
                "model_name_or_path instead."
            )


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class DataArguments:
    """Which rows to train and evaluate on, and how a row becomes tokens. The seeds are in MatrixConfig."""

    dataset: dict | str | list[str | dict] | None = None
    """Training rows: "builtin", a file, a folder, a Hub id; or a list of these, or of {path, weight, split, ...}."""
    dataset_config: str | None = None
    """Configuration of a Hub data set or of a folder, e.g. "main" for openai/gsm8k."""
    dataset_split: str = "train"
    """Split of `dataset`, or a part of one: "train[:1000]", "train[:10%]"."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the data set on the Hub; None: its main branch."""
    columns: dict | None = None
    """{our name: theirs} for fields with other names in the rows, e.g. {question: problem, answer: solution}."""
    eval_dataset: dict | str | list[str | dict] | None = None
    """Held-out rows, given in the same way as `dataset`; {name: data set} evaluates each by itself."""
    eval_split: str = "test"
    """Split of `eval_dataset`, or a part of one."""
    max_train_rows: int | None = setting(None, at_least=1)
    """Maximum number of training rows to read of each data set; None: all."""
    max_eval_rows: int | None = setting(None, at_least=1)
    """Maximum number of held-out rows to read of each data set; None: all."""
    builtin_rows: int = setting(20000, at_least=1)
    """Training problems generated for `dataset: builtin`."""
    builtin_eval_rows: int = setting(200, at_least=1)
    """Held-out problems generated for `eval_dataset: builtin`."""
    streaming: bool = False
    """Whether to tokenise rows during training and cache nothing; needs max_steps."""
    streaming_buffer: int = setting(10000, at_least=1)
    """Rows held in memory to shuffle a stream; 1 keeps their order."""
    prompt_template: str = "metamath"
    """"metamath" (Alpaca), "plain", or a text that holds {instruction} once."""
    response_separator: str = " "
    """White space between prompt and response; "" joins them as the MetaMath authors' training script does."""
    too_long: str = setting("drop", choices=["drop", "truncate", "error"])
    """What happens to rows of more than max_length tokens."""
    leakage_check: list[str] | None = None
    """Test sets whose questions are looked for in the training rows: paths, or Hub ids such as "openai/gsm8k:main"."""
    leakage: str = setting("report", choices=["report", "drop", "stop"])
    """What happens to training rows that contain a test question."""
    leakage_ngram: int = setting(13, at_least=1)
    """Length in words of the sequences that are compared."""
    leakage_share: float = setting(0.5, above=0, at_most=1)
    """Share of a test question's sequences that a row must contain to count; an equal question always counts."""
    accuracy_rows: int = setting(0, at_least=0)
    """Held-out problems answered by greedy decoding before and after training; 0: none."""
    accuracy_steps: int = setting(0, at_least=0)
    """Optimizer steps between accuracy measurements during training, logged as `accuracy`; 0: none during training."""
    accuracy_max_new_tokens: int = setting(256, at_least=1)
    """Maximum length of an answer to such a problem, in tokens."""

    def __post_init__(self):
        check_fields(self)
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
                f"response_separator={self.response_separator!r} is more than white space, so the model would have to "
                "write it before its answer. Put words at the end of prompt_template."
            )
        if self.accuracy_steps > 0 and self.accuracy_rows == 0:
            raise RecipeError(
                f"accuracy_steps={self.accuracy_steps} says when to measure accuracy, but accuracy_rows is 0. Set "
                "accuracy_rows to a number of held-out problems."
            )
        training, held_out = self.training_entries(), self.held_out_entries()
        if self.columns:
            check_columns("columns", self.columns)
        weighted = next((entry for entry in held_out if entry.weight != 1), None)
        if weighted is not None:
            raise RecipeError(
                f"eval_dataset gives {weighted.path} the weight {weighted.weight}, but every held-out row counts once. "
                "Remove the weight, or set max_rows."
            )
        if self.accuracy_rows > 0 and not held_out and all(entry.path != "builtin" for entry in training):
            raise RecipeError(
                f"accuracy_rows={self.accuracy_rows} needs held-out problems, but eval_dataset is not given. Give it, "
                "or set accuracy_rows to 0."
            )

    def training_entries(self) -> list[DatasetEntry]:
        """The data sets of `dataset`."""
        return read_entries("dataset", self.dataset)

    def held_out_entries(self) -> list[DatasetEntry]:
        """The data sets of `eval_dataset`; with names if it gives them."""
        return read_entries("eval_dataset", self.eval_dataset, may_have_names=True)

    def training_source(self, entry: DatasetEntry, seed: int) -> Source:
        """The rows of one of `training_entries`. The seed is that of "builtin"."""
        return entry.source(
            Source(
                entry.path,
                config=self.dataset_config,
                split=self.dataset_split,
                max_rows=self.max_train_rows,
                builtin_rows=self.builtin_rows,
                seed=seed,
                columns=self.columns or {},
                revision=self.dataset_revision,
            )
        )

    def held_out_source(self, entry: DatasetEntry, seed: int) -> Source:
        """The rows of one of `held_out_entries`. A revision is that of `dataset`, so it needs the same path."""
        is_trained_on = any(each.path == entry.path for each in self.training_entries())
        return entry.source(
            Source(
                entry.path,
                config=self.dataset_config,
                split=self.eval_split,
                max_rows=self.max_eval_rows,
                builtin_rows=self.builtin_eval_rows,
                seed=seed,
                columns=self.columns or {},
                revision=self.dataset_revision if is_trained_on else None,
            )
        )


# ----------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class Recipe:
    """All the settings of a run."""

    model: ModelArguments
    """Model, tokenizer and adapters."""
    data: DataArguments
    """Training rows, held-out rows and the leakage check."""
    training: MatrixConfig
    """The loss, the optimizer, checkpoints and logging."""
    path: Path
    """Path of the recipe file."""
    resolved: dict[str, Any]
    """The keys that were given, file and overrides merged, without hub_token; saved as recipe.yaml. Read-only."""


# Names that people often try but that do not exist here, with what to write instead.
_HINTS = {
    "warmup_ratio": "transformers 5 removed it: write `warmup_steps: 0.03` for 3 % of the steps",
    "overwrite_output_dir": "transformers 5 removed it: give another output_dir, or resume_from_checkpoint to continue",
    "logging_dir": "transformers 5 removed it: logs go to output_dir",
    "group_by_length": "transformers 5 removed it: write `train_sampling_strategy: group_by_length`",
    "evaluation_strategy": "it is called eval_strategy now",
    "max_seq_length": "it is called max_length now",
    "torch_dtype": "it is called dtype now",
    "no_cuda": "it is called use_cpu now",
    "per_gpu_train_batch_size": "it is called per_device_train_batch_size now",
    "push_to_hub_model_id": "it is called hub_model_id now",
    "save_safetensors": "transformers 5 removed it: weights are always saved as safetensors",
    "dataset_name": "it is called dataset",
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

# Settings that may be relative paths
_PATHS = ("deepspeed", "mce_embeddings", "model_name_or_path", "tokenizer_name_or_path")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> Recipe:
    """Read a flat YAML recipe, apply `--key value` overrides, check everything and build the three dataclasses.

    Args:
        dry_run: build the training settings without the hardware they ask for, so that a machine without a GPU can plan
            a bf16, DeepSpeed or FSDP run. `training` carries the recipe's own values, but must not be trained with.

    Raises:
        RecipeError: the recipe cannot be read, or a setting or a combination of settings cannot work.
    """
    # 1. What is given: names, types and ranges are checked
    path = Path(path).expanduser()
    resolved = SETTINGS.read(path, overrides)
    given = copy.deepcopy(resolved)  # a change to a dataclass must not change what the run writes down
    resolved.pop("hub_token", None)  # a secret: it is passed on, and never written

    # 2. Relative paths, and a folder for the run
    given.setdefault("output_dir", f"runs/{path.stem}")
    for key in _PATHS:
        if isinstance(given.get(key), str):
            given[key] = find_from_repository(given[key], path)
    for key in ("dataset", "eval_dataset"):
        if key in given:
            given[key] = map_paths(given[key], lambda source: find_from_repository(source, path))
    if given.get("leakage_check"):
        given["leakage_check"] = [find_from_repository(source, path) for source in given["leakage_check"]]

    # 3. Each dataclass checks itself; then the combinations that concern more than one of them
    parts = SETTINGS.split(given)
    try:
        model, data = ModelArguments(**parts["model"]), DataArguments(**parts["data"])
        _check_combinations(model, data, given)
        _check_sources(data, replaced=SETTINGS.read_overrides(overrides).keys())
        training = _build_training(parts["training"], dry_run)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    return Recipe(model=model, data=data, training=training, path=path, resolved=resolved)


def _build_training(given: dict[str, Any], dry_run: bool) -> MatrixConfig:
    try:
        return _build_without_hardware(given) if dry_run else MatrixConfig(**given)
    except RecipeError:
        raise
    except (ValueError, NotImplementedError, OSError) as error:  # how transformers and TRL refuse a setting
        raise RecipeError(" ".join(str(error).split())) from error


def _build_without_hardware(given: dict[str, Any]) -> MatrixConfig:
    """MatrixConfig to read from: built for the CPU without DeepSpeed or FSDP, then given its own values back."""
    bf16 = given.get("bf16")
    if bf16 is None:
        bf16 = not given.get("fp16", False) and (given.get("use_cpu", False) or is_torch_bf16_gpu_available())
    without = {
        "use_cpu": True,
        "tf32": None,
        "deepspeed": None,
        "fsdp": None,
        "fsdp_config": None,
        "torch_compile": False,
    }
    training = MatrixConfig(**{**given, **without, "bf16": bf16})
    for key in without:
        setattr(training, key, given.get(key, getattr(MatrixConfig, key)))
    return training


# ----------------------------------------------------------------------------------------------------- combinations
# `given` holds the recipe's own keys, without defaults: only there can we see a given setting that would do nothing.


def _check_combinations(model: ModelArguments, data: DataArguments, given: Mapping[str, Any]) -> None:
    _check_paths(model, data)
    _check_leakage(data, given)
    _check_streaming(data, given)
    _check_adapters(model, given)
    _check_evaluation(data, given)
    if isinstance(given.get("deepspeed"), str):
        _check_deepspeed_file(Path(given["deepspeed"]))


def _check_paths(model: ModelArguments, data: DataArguments) -> None:
    """Check that each value that can only be a path exists; anything else may be a Hub id."""
    for source in data.leakage_check or []:
        check_exists("leakage_check", question_source(source))
    name = model.model_name_or_path
    if name is not None and name.startswith((".", "/", "~")) and not (path := Path(name).expanduser()).is_dir():
        raise RecipeError(f"model_name_or_path={name!r}: no folder at {path.absolute()}. Correct the path.")


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
    if source.name == "builtin" and part.split not in ("train", "test"):
        raise RecipeError(f"{where}: builtin has the splits train and test. Correct {setting_name}.")


def _check_part(key: str, source: Source, *, is_stream: bool) -> None:
    where = f"{key}={source.name!r} with the split {source.split!r}"
    if is_stream and Slice.of(source.split).needs_count:
        raise RecipeError(
            f"{where}: the length of a stream is not known. Give numbers of rows from the start (train[:1000]), or "
            "set streaming to false."
        )


def _check_leakage(data: DataArguments, given: Mapping[str, Any]) -> None:
    idle = [key for key in ("leakage", "leakage_ngram", "leakage_share") if key in given]
    if idle and not data.leakage_check:
        raise RecipeError(
            f"{', '.join(idle)} given, but leakage_check names no test set. Set leakage_check to a list of paths or "
            "Hub ids."
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
    idle = [key for key in given if key.startswith("lora_")]
    if idle and "use_peft" not in given:
        raise RecipeError(
            f"{', '.join(idle)} given, but use_peft is not, so they would do nothing. Add use_peft: true, or remove "
            "them."
        )
    mce_weight = given.get("mce_weight", MatrixConfig.mce_weight)
    lm_head = _adapted_lm_head(model.lora_target_modules) if model.use_peft else None
    if lm_head is not None and mce_weight > 0:
        raise RecipeError(
            f"mce_weight={mce_weight} needs the LM head, but lora_target_modules puts an adapter on `{lm_head}`, whose "
            f"weight the loss reads directly. Remove it, or list `{lm_head}` under lora_modules_to_save."
        )


def _adapted_lm_head(targets: list[str] | str | None) -> str | None:
    """The LM head's name, if lora_target_modules selects it."""
    names = ("lm_head", "embed_out")
    if targets is None or targets == "all-linear":  # PEFT leaves the LM head out of all-linear
        return None
    if isinstance(targets, list):
        return next((target for target in targets if target.rsplit(".", 1)[-1] in names), None)
    try:
        return next((name for name in names if re.fullmatch(targets, name)), None)
    except re.error as error:
        raise RecipeError(
            f"lora_target_modules={targets!r} is not a regular expression: {error}. Give a list of module names."
        ) from None


def _check_evaluation(data: DataArguments, given: Mapping[str, Any]) -> None:
    strategy = given.get("eval_strategy", "no")
    if strategy != "no" and data.eval_dataset is None:
        raise RecipeError(
            f"eval_strategy={strategy!r} has no rows to evaluate on. Give eval_dataset, or set eval_strategy to no."
        )


def _check_deepspeed_file(path: Path) -> None:
    where = f"deepspeed={str(path)!r}"
    if not path.is_file():
        raise RecipeError(f"{where}: no file at {path.absolute()}. Correct the path.")
    try:
        blocks = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where} line {error.lineno}: this is not JSON: {error.msg}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{where} is not UTF-8 text. Save the file as UTF-8.") from None
    if not isinstance(blocks, dict):
        raise RecipeError(f"{where} does not hold a JSON object. Start from a file in ds_configs/.")
    if "scheduler" in blocks:
        raise RecipeError(
            f"{where} holds a `scheduler` block, which would silently replace lr_scheduler_type. Remove the "
            "block: the recipe decides."
        )
