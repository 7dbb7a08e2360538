"""The settings of a run: three dataclasses, and the function that builds them from a recipe.

A field's name is its key in the recipe and its flag on the command line. Names, types, ranges and combinations that
would silently train wrongly are all checked here, before any weight or row is loaded.

>>> # recipes/tiny.yaml is one flat mapping, with a line `mce_weight: 1.0` and so on
>>> # load_recipe("recipes/tiny.yaml", ["--learning-rate", "2e-5", "--packing"]).training.learning_rate == 2e-5
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.base.gpus import GPUS
from matrix_llm.base.reader import Settings, find_from_repository, find_recipe
from matrix_llm.base.values import check_choice, check_fields, read_numbers, setting
from matrix_llm.base.vllm_server import is_server, what_is_wrong
from matrix_llm.checks.combinations import check_combinations, check_training, find_missing
from matrix_llm.checks.evaluation import is_higher_better
from matrix_llm.checks.keys import check_keys
from matrix_llm.checks.sharding import Sharding
from matrix_llm.checks.token_loss import check_token_loss
from matrix_llm.data.entries import DatasetEntry, check_columns, map_paths, read_entries
from matrix_llm.data.forms import BOXED_ANSWERS
from matrix_llm.data.prompts import TRAIN_ON, resolve_template
from matrix_llm.data.readers import Source
from matrix_llm.loss.choice import LOSSES
from matrix_llm.loss.settings import EMBEDDINGS

__all__ = ["DataArguments", "MatrixConfig", "ModelArguments", "Recipe", "RecipeError", "load_recipe"]


# ------------------------------------------------------------------------------------------------ training and loss


@dataclass
class MatrixConfig(SFTConfig):
    """trl.SFTConfig plus the token losses and matrix cross-entropy (MCE). With mce_weight = 0 and token_loss = "ce" it
    means what SFTConfig means.

    Two defaults differ: `logging_nan_inf_filter` is False, and an unset `bf16` stays off where SFTConfig would refuse
    to be built (no GPU that computes in bfloat16, and `use_cpu` not given). The ranges of the inherited fields are in
    base/values.py.
    """

    token_loss: str = setting("ce", choices=list(LOSSES))
    """The loss of each token that MCE is added to: "ce" or another of docs/losses.md, such as "dft", "emo" or "kd"."""
    token_loss_settings: dict | None = None
    """Settings of `token_loss` by name, e.g. {"gamma": 2}; None: its defaults (docs/losses.md)."""
    teacher_model_name_or_path: str | None = None
    """The model whose distribution is the target of kd, soft_ce, soft_mce and asft: a folder or a Hub id."""
    mce_weight: float = setting(1.0, at_least=0)
    """Weight of the MCE term: loss = token_loss + mce_weight * MCE; 0 is plain SFT, at no extra cost."""
    mce_target: str = setting("label", choices=["label", "teacher"])
    """What MCE aims at: the label, or the 16 likeliest tokens of the teacher of token_loss."""
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
    """The token vectors that MCE compares: "lm_head", "centred" (the head's minus their mean), "input", or the path of
    a .safetensors file with one matrix."""
    mce_embedding_grad: bool = False
    """Whether the gradient of the MCE term also flows through the token vectors."""
    effective_rank_steps: int = setting(0, at_least=0)
    """Steps between measurements of the LM head's effective rank; 0: at the start and the end only."""
    early_stopping_patience: int | None = setting(None, at_least=1)
    """Evaluations in a row without a better metric_for_best_model, after which the run ends; None: it never does."""
    early_stopping_threshold: float = setting(0.0, at_least=0)
    """By how much the metric must improve to count as better."""
    logging_nan_inf_filter: bool = False
    """Whether NaN and infinite losses are filtered from the log; True would log them as 0.0 and hide a failed run."""

    def __post_init__(self):
        # 1. What can be checked at once
        if self.bf16 is None and not self.fp16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16 = False  # SFTConfig would set True, and refuse itself
        check_fields(self)
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)  # torch refuses the integer 0
        self._check_embeddings()
        check_token_loss(self)
        if self.uses_matrix_head:
            self._check_loss()
        if self.eval_packing and not self.packing and not self.padding_free:
            raise RecipeError(
                "eval_packing=True with packing=False: rows are packed, but batched without their positions, so they "
                "would see each other. Set packing: true as well, or remove eval_packing."
            )
        # 2. Which way our own metrics improve: for transformers, a name that does not end in "loss" is higher-is-better
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = is_higher_better(self.metric_for_best_model)
        # 3. What is known once SFTConfig has read its defaults and the DeepSpeed and FSDP settings
        super().__post_init__()
        self._check_early_stopping()
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and self.greater_is_better:
            kwargs: dict[str, Any] = self.lr_scheduler_kwargs or {}  # type: ignore[assignment]
            self.lr_scheduler_kwargs = {"mode": "max", **kwargs}  # their default is "min"
        if self.uses_matrix_head:
            self._check_sharding()

    @property
    def uses_matrix_head(self) -> bool:
        """Whether the loss is computed with the LM head (loss/), and not as SFTTrainer does."""
        return self.mce_weight > 0 or self.token_loss != "ce"

    def _check_embeddings(self) -> None:
        """Refuse token vectors that do not exist, and a gradient with no parameter to flow to."""
        if self.mce_embeddings in EMBEDDINGS:
            return
        if not self.mce_embeddings.endswith(".safetensors"):
            check_choice("mce_embeddings", self.mce_embeddings, EMBEDDINGS, also="a path to a .safetensors file")
        if not (file := Path(self.mce_embeddings).expanduser()).is_file():
            raise RecipeError(
                f"mce_embeddings={self.mce_embeddings!r}: no file at {file.absolute()}. Correct the path."
            )
        if self.mce_embedding_grad:
            raise RecipeError(
                f"mce_embedding_grad=True with mce_embeddings={self.mce_embeddings!r}: vectors read from a file are "
                "not a parameter of the model, so their gradient goes nowhere. Set mce_embedding_grad to false, or "
                "mce_embeddings to lm_head, centred or input."
            )

    def _check_early_stopping(self) -> None:
        """Refuse early stopping without a metric to stop by."""
        if self.early_stopping_patience is None:
            return
        for key, missing, way_out in (
            ("eval_strategy", self.eval_strategy == "no", "eval_strategy: steps"),
            ("metric_for_best_model", self.metric_for_best_model is None, "metric_for_best_model: eval_loss"),
        ):
            if missing:
                raise RecipeError(
                    f"early_stopping_patience={self.early_stopping_patience} counts evaluations without improvement, "
                    f"but {key} is not given. Write `{way_out}`, or remove early_stopping_patience."
                )

    def _check_loss(self) -> None:
        """Refuse settings that replace the forward which computes the loss, or change what it means."""
        if self.use_liger_kernel:
            raise self._loss_clash("use_liger_kernel", "its fused loss replaces the forward that computes the loss")
        if (self.packing or self.eval_packing) and self.packing_strategy == "wrapped":
            reason = "it lets rows see each other, so a token's loss depends on the rows it is packed with"
            raise self._loss_clash("packing_strategy", reason)

    def _check_sharding(self) -> None:
        """Refuse ways of sharding the model under which the MCE term would be lost or wrong."""
        if self.n_gpu > 1:
            raise self._clash(
                f"one process that sees {self.n_gpu} GPUs",
                "Trainer would split each batch over copies of the model, each with its own loss",
                f"Start it with `accelerate launch --num_processes {self.n_gpu}`, or set CUDA_VISIBLE_DEVICES=0.",
            )
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
        if sharding.context_parallel > 1:
            raise self._clash(
                f"context parallelism (cp_size={sharding.context_parallel})",
                "each process would hold a part of every row, and the MCE term was never shown to be right then",
                "Remove it, and shard with ZeRO-3 or FSDP2 instead.",
            )
        if sharding.fsdp_version == "1":
            raise self._clash(
                "FSDP version 1",
                "it flattens the LM head that the loss reads, and transformers is dropping it",
                "Launch with --fsdp_version 2, or with ds_configs/fsdp2.yaml.",
            )

    def _loss_clash(self, key: str, reason: str) -> RecipeError:
        plain = "set mce_weight to 0" if self.token_loss == "ce" else "set token_loss to ce and mce_weight to 0"
        return self._clash(f"{key}={getattr(self, key)!r}", reason, f"Remove {key}, or {plain}.")

    def _clash(self, what: str, reason: str, way_out: str) -> RecipeError:
        loss = f"mce_weight={self.mce_weight}" if self.token_loss == "ce" else f"token_loss={self.token_loss!r}"
        return RecipeError(f"{loss} together with {what} cannot work: {reason}. {way_out}")


# ------------------------------------------------------------------------------------------------------------ model


# init_lora_weights: what a text may say, and PEFT's others with the reason why they are refused
ADAPTER_STARTS = ["gaussian", "orthogonal", "pissa", "olora"]
_NEEDS_DATA = "it is computed from rows of data, which PEFT's own scripts must do before training"
UNSUPPORTED_STARTS: dict[bool | str, str] = {
    False: "adapters would start at random and change the model before it is trained. Set it to true",
    "loftq": "it quantises the base in memory, so the adapter would not fit the saved one. Set load_in_4bit: true",
    "mica": "PEFT freezes half of each adapter, and its scale was not tried. Set it to orthogonal",
    **dict.fromkeys(["eva", "corda", "lora_ga"], f"{_NEEDS_DATA}. Set it to pissa"),
}


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
    use_rslora: bool = False
    """Whether the adapters are multiplied by lora_alpha / sqrt(lora_r) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Whether the length of each row of an adapted weight is trained apart from its direction (DoRA)."""
    init_lora_weights: bool | str = True
    """Start of the adapters: true (no change), "gaussian", "orthogonal", "pissa", "pissa_niter_N" or "olora"."""
    lora_target_modules: list[str] | str | None = None
    """Layers that get an adapter: names, a regular expression, or "all-linear"; None: PEFT's choice for the model."""
    lora_exclude_modules: list[str] | str | None = None
    """Layers among lora_target_modules that get none: names, or a regular expression."""
    lora_target_parameters: list[str] | None = None
    """Parameters that get an adapter where they are no layers of their own, e.g. a mixture's stacked experts."""
    lora_layers_to_transform: list[int] | None = None
    """Indices of the blocks that get adapters, from 0; None: all."""
    lora_layers_pattern: list[str] | str | None = None
    """Name of the list of blocks that lora_layers_to_transform counts in, where there are several."""
    lora_rank_pattern: dict | None = None
    """Other ranks for some layers: names or regular expressions, e.g. {"q_proj": 4}."""
    lora_alpha_pattern: dict | None = None
    """Other values of lora_alpha for some layers, in the same form."""
    lora_bias: str = setting("none", choices=["none", "all", "lora_only"])
    """Which biases of the model are trained as well: none, all, or those of adapted layers."""
    lora_modules_to_save: list[str] | None = None
    """Modules trained in full alongside the adapters, e.g. [lm_head]."""
    lora_trainable_token_indices: list[int] | None = None
    """Token ids whose embeddings are trained in full (with the LM head's vectors, if these are the same)."""
    lora_ensure_weight_tying: bool = False
    """Whether embeddings and LM head that are one weight stay one where they are trained."""
    load_in_4bit: bool = False
    """QLoRA: whether the frozen weights are stored in 4 bits, by bitsandbytes."""
    bnb_4bit_quant_type: str = setting("nf4", choices=["nf4", "fp4"])
    """The 4-bit number format."""
    use_bnb_nested_quant: bool = True
    """Whether the scales of 4-bit weights are quantised as well."""
    load_in_8bit: bool = False
    """Whether the frozen weights are stored in 8 bits, by bitsandbytes."""
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
        if self.load_in_4bit and self.load_in_8bit:
            raise RecipeError(
                "load_in_4bit=True together with load_in_8bit=True cannot work: a weight has one format. Remove one."
            )
        if self.quantised_by is not None and not self.use_peft:
            raise RecipeError(
                f"{self.quantised_by}=True freezes the weights, so nothing is left to train. Add use_peft: true."
            )
        if self.load_in_8bit and self.use_dora:
            raise RecipeError(
                "load_in_8bit=True together with use_dora=True cannot work: bitsandbytes has no scales of the weights "
                "when DoRA needs their lengths. Set load_in_4bit instead, or remove use_dora."
            )
        if self.use_peft:
            self._check_start()
            self._check_patterns()

    @property
    def quantised_by(self) -> str | None:
        """The setting that stores the frozen weights in fewer bits; None: they are not quantised."""
        if self.load_in_4bit:
            return "load_in_4bit"
        return "load_in_8bit" if self.load_in_8bit else None

    @property
    def changes_base(self) -> bool:
        """Whether the adapters start from a part of the base weights, which is taken out of them (PiSSA, OLoRA)."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    def _check_start(self) -> None:
        """Refuse starts of the adapters that need what a recipe cannot give, or that could not be saved."""
        start = self.init_lora_weights
        if start in UNSUPPORTED_STARTS:
            raise RecipeError(f"init_lora_weights={start!r} is not supported: {UNSUPPORTED_STARTS[start]}.")
        if start is not True and not re.fullmatch(r"pissa_niter_\d+", str(start)):
            check_choice("init_lora_weights", start, ADAPTER_STARTS, also="true, or pissa_niter_N with a number N")
        if not self.changes_base:
            return
        if self.use_dora:
            clash, reason = "use_dora=True", "the trained adapter could not be put back on the unchanged base"
        elif self.quantised_by is not None:
            clash, reason = f"{self.quantised_by}=True", "it takes a part out of weights in full precision"
        elif self.use_rslora:
            clash, reason = "use_rslora=True", "the saved adapter has twice the rank, and rsLoRA's scale follows it"
        else:
            return
        raise RecipeError(
            f"init_lora_weights={start!r} together with {clash} cannot work: {reason}. Set init_lora_weights: true, or "
            f"remove {clash.partition('=')[0]}."
        )

    def _check_patterns(self) -> None:
        """Refuse what PEFT would only find once the model is loaded: regular expressions, ranks, token ids."""
        for key in ("lora_target_modules", "lora_exclude_modules"):
            if isinstance(pattern := getattr(self, key), str):
                _check_expression(key, pattern, "Give a list of module names.")
        for key in ("lora_rank_pattern", "lora_alpha_pattern"):
            for name, value in (getattr(self, key) or {}).items():
                _check_expression(key, str(name), "Give the names of modules.")
                if type(value) is not int or value < 1:
                    raise RecipeError(f"{key}={{{name!r}: {value!r}}} cannot work: it must be an integer, at least 1.")
        if tokens := [each for each in self.lora_trainable_token_indices or [] if each < 0]:
            raise RecipeError(
                f"lora_trainable_token_indices={tokens!r} cannot work: token ids are at least 0. Correct the ids."
            )

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
        if self.quantised_by is not None:
            raise RecipeError(
                f"{self.quantised_by}=True quantises a pretrained model, but model_config builds one from scratch. "
                "Give model_name_or_path instead."
            )


def _check_expression(key: str, pattern: str, way_out: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{key}={pattern!r} is not a regular expression: {error}. {way_out}") from None


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
    """"metamath" (Alpaca), "plain", "chat" (the tokenizer's chat template), or a text that holds {instruction} once."""
    response_separator: str = " "
    """White space between prompt and response; "" joins them as the MetaMath authors' training script does."""
    boxed_answers: str = setting("sentence", choices=BOXED_ANSWERS)
    r"""Whether an answer or solution that ends in \boxed{x} gets a line "The answer is: x", or is kept as it is."""
    train_on: str = setting("all", choices=TRAIN_ON)
    """Which of the assistant's turns are trained: all that have no `weight: 0`, or only the last of each row."""
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
    accuracy_engine: str = "transformers"
    """What answers them: "transformers" (training waits), "vllm" (a process of its own) or a server's http://HOST:PORT."""
    accuracy_gpu_memory: float = setting(0.3, above=0, at_most=1)
    """Share of a GPU's memory that `accuracy_engine: vllm` may take, beside training."""

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
        if not is_server(self.accuracy_engine):
            check_choice("accuracy_engine", self.accuracy_engine, ["transformers", "vllm"], also="http://HOST:PORT")
        elif wrong := what_is_wrong(self.accuracy_engine):
            raise RecipeError(f"accuracy_engine={self.accuracy_engine!r} {wrong}.")
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
                boxed_answers=self.boxed_answers,
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
                boxed_answers=self.boxed_answers,
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
    missing: str = ""
    """For a plan: the first thing that a run on this machine would lack, such as a package."""


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
    "use_lora": "it is called use_peft",
    "quantization": "write `load_in_4bit: true` or `load_in_8bit: true`",
    "lora_use_dora": "it is called use_dora",
    "lora_use_rslora": "it is called use_rslora",
    "lora_init_lora_weights": "it is called init_lora_weights",
    "lora_task_type": "it is always CAUSAL_LM: remove it",
    "bnb_4bit_use_double_quant": "it is called use_bnb_nested_quant",
    "bnb_4bit_quant_storage": "it would let FSDP split 4-bit weights, which is refused: remove it",
    "bnb_4bit_compute_dtype": "4-bit layers always compute in bfloat16: remove it",
    **{
        name: f"it is called lora_{name}"
        for name in (
            *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "ensure_weight_tying"),
            *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
        )
    },
    "lr": "it is called learning_rate",
    "epochs": "it is called num_train_epochs",
    "batch_size": "it is called per_device_train_batch_size",
    "config_name": "the dataset's configuration is dataset_config, a model from scratch is model_config",
    # Axolotl's and LLaMA-Factory's names
    "base_model": "it is called model_name_or_path",
    **dict.fromkeys(["datasets", "train_file"], "it is called dataset, and may be a list"),
    **dict.fromkeys(
        ["val_size", "val_set_size"],
        "name the same rows as eval_dataset, with `dataset_split: train[:95%]` and `eval_split: train[95%:]`",
    ),
    **dict.fromkeys(["sequence_len", "cutoff_len"], "it is called max_length"),
    "micro_batch_size": "it is called per_device_train_batch_size",
    "num_epochs": "it is called num_train_epochs",
    "max_samples": "it is called max_train_rows",
    **dict.fromkeys(["adapter", "finetuning_type"], "write `use_peft: true` for LoRA, or nothing to train in full"),
    "lora_rank": "it is called lora_r",
    "lora_target": "it is called lora_target_modules",
    "lora_target_linear": "write `lora_target_modules: all-linear`",
    "sample_packing": "it is called packing",
    **dict.fromkeys(["train_on_inputs", "train_on_prompt"], "prompts are trained if `completion_only_loss: false`"),
    **dict.fromkeys(
        ["template", "chat_template"], "write `prompt_template: chat` for the tokenizer's, or give chat_template_path"
    ),
    "special_tokens": "write eos_token and pad_token",
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
    path = find_recipe(path)
    return make_recipe(SETTINGS.read(path, overrides), path, SETTINGS.read_overrides(overrides), dry_run=dry_run)


def make_recipe(
    settings: Mapping[str, Any], path: Path, overrides: Collection[str] = (), *, dry_run: bool = False
) -> Recipe:
    """A recipe from settings whose names and types `SETTINGS` has checked.

    Args:
        path: the recipe file, for messages, for relative paths and for the default of output_dir.
        overrides: the names that the command line gave.
        dry_run: see `load_recipe`.

    Raises:
        RecipeError: a setting or a combination of settings cannot work.
    """
    # 1. What is given
    resolved = dict(settings)
    given = copy.deepcopy(resolved)  # a change to a dataclass must not change what the run writes down
    resolved.pop("hub_token", None)  # a secret: it is passed on, and never written

    # 2. Relative paths, and a folder for the run
    given["output_dir"] = given.get("output_dir") or f"runs/{path.stem}"
    if given.get("report_to") is None:
        given.pop("report_to", None)  # transformers would report to a service of the name None
    for key in _PATHS:
        if key == "mce_embeddings" and given.get(key) in EMBEDDINGS:
            continue  # a name, even where the repository has a folder of that name
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
        check_keys(given)
        check_combinations(model, data, given, overrides)
        training = _build_training(parts["training"], dry_run)
        # 4. What the training settings ask of transformers, TRL and this machine
        check_training(model, training, given)
        missing = find_missing(model, training, given)
        if missing and not dry_run:
            raise RecipeError(missing)
    except RecipeError as error:
        raise RecipeError(" ".join(f"{path}: {error}".splitlines())) from None
    return Recipe(model=model, data=data, training=training, path=path, resolved=resolved, missing=missing)


def _build_training(given: dict[str, Any], dry_run: bool) -> MatrixConfig:
    """MatrixConfig; a setting that transformers or TRL refuses, in whatever way, is named."""
    if isinstance(given.get("lr_scheduler_kwargs"), dict):
        given["lr_scheduler_kwargs"] = read_numbers(given["lr_scheduler_kwargs"])
    build = _build_without_hardware if dry_run else _build_with_hardware
    try:
        return build(given)
    except RecipeError:
        raise
    except _REFUSED_BY_LIBRARIES as error:
        reason = one_line(error)
        culprit = next((key for key in given if key != "output_dir" and key in reason), None)
        culprit = culprit or next((key for key in given if _is_culprit(key, given, build)), None)
        where = f"{culprit}={given[culprit]!r} is refused: " if culprit else ""
        way_out = f" Correct or remove {culprit}." if culprit else ""
        raise RecipeError(f"{where}{reason}.{way_out}") from error


_REFUSED_BY_LIBRARIES = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, OSError, ImportError)


def _build_with_hardware(given: dict[str, Any]) -> MatrixConfig:
    return MatrixConfig(**given)


def _is_culprit(key: str, given: dict[str, Any], build: Callable[[dict[str, Any]], MatrixConfig]) -> bool:
    """Whether the settings could be built without this one."""
    try:
        build({name: value for name, value in given.items() if name != key})
    except _REFUSED_BY_LIBRARIES:
        return False
    return True


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
