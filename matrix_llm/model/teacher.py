"""The second model of distillation and ASFT: loaded, checked against the student's vocabulary, run without gradient.

    TeacherModel   another model, whole or sharded like the student
    BaseModel      the student with its adapters off: ASFT's reference under LoRA

Both give hidden states only; their LM heads are read a chunk of positions at a time (loss/teachers.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from matrix_llm.base.errors import ModelError, RecipeError
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.config import MatrixConfig, ModelArguments
from matrix_llm.loss.choice import recipe_settings
from matrix_llm.loss.settings import LossSettings
from matrix_llm.loss.teachers import check_soft_target
from matrix_llm.model.lm_head import FrozenHead, add_matrix_head, lm_head_of
from matrix_llm.model.load import load_model
from matrix_llm.model.pretrained import load_pretrained

KEY = "teacher_model_name_or_path"
RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
ONLY_FOR_TRAINING = ("output_router_logits", "labels", "shift_labels", "num_items_in_batch")


def read_teacher_config(training: MatrixConfig) -> PretrainedConfig:
    """The teacher's configuration, without its weights.

    Raises:
        RecipeError: there is no such model.
    """
    name, remote = training.teacher_model_name_or_path, training.trust_remote_code
    return load_pretrained(KEY, name, AutoConfig.from_pretrained, trust_remote_code=remote)


def load_teacher_tokenizer(training: MatrixConfig) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer, to be compared with the student's.

    Raises:
        RecipeError: there is none.
    """
    name, remote = training.teacher_model_name_or_path, training.trust_remote_code
    return load_pretrained(KEY, name, AutoTokenizer.from_pretrained, trust_remote_code=remote)


def check_base(adapter_starts: Iterable[bool | str] | None) -> None:
    """Refuse asft without a teacher where the base cannot be its reference.

    Args:
        adapter_starts: the init_lora_weights of each adapter; None: no adapters are trained.

    Raises:
        RecipeError: no adapters, or adapters that start by changing the base.
    """
    if adapter_starts is None:
        raise RecipeError(
            f"token_loss='asft' needs the model as it was before training, but {KEY} is not given and no adapters "
            f"are trained (use_peft). Give the base model itself as {KEY}."
        )
    for start in adapter_starts:
        if isinstance(start, str) and start.startswith(("pissa", "olora")):
            raise RecipeError(
                f"token_loss='asft' with init_lora_weights={start!r}, which changes the base: without its adapters "
                f"it is another model. Give the base model as {KEY}, or set init_lora_weights: true."
            )


def check_teacher(training: MatrixConfig, vocabulary_size: int) -> None:
    """Refuse what the configurations alone show of the teacher, and a soft target that is too wide.

    Raises:
        RecipeError: no such model, fewer tokens than the student, soft_mce over a whole large vocabulary, or
            mce_steps where MCE takes none.
    """
    if training.teacher_model_name_or_path is not None:
        theirs = read_teacher_config(training).get_text_config().vocab_size
        if theirs < vocabulary_size:
            raise _too_few(training.teacher_model_name_or_path, theirs, vocabulary_size)
    if training.token_loss == "soft_mce":
        check_soft_target(recipe_settings("soft_mce", training.token_loss_settings)["top_k"], vocabulary_size)
    solver = LossSettings.from_config(training).solver_for(vocabulary_size)
    if training.mce_target == "teacher" and training.mce_steps is not None and solver.top_k is not None:
        raise RecipeError(
            f"mce_steps={training.mce_steps} with mce_target='teacher' and the {solver.top_k} tokens of mce_top_k: one "
            f"logarithm, without steps. Remove mce_steps, or set mce_top_k to the vocabulary's {vocabulary_size}."
        )


def _too_few(name: str, theirs: int, ours: int) -> RecipeError:
    return RecipeError(
        f"{KEY}={name!r} has vectors for {theirs} tokens, the student for {ours}: the teacher says nothing of the "
        "others. Resize the teacher's embeddings, or use another teacher."
    )


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher to which one of the student's tokens is another. It may have more tokens than the student.

    Raises:
        RecipeError: the first token that differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for token, number in sorted(ours.items(), key=lambda each: each[1]):
        if theirs.get(token) != number:
            raise RecipeError(
                f"{KEY}={name!r} has another vocabulary: {token!r} is token {number} of the student and "
                f"{theirs.get(token, 'none')} of the teacher. Distillation compares token by token: use a teacher with "
                "the student's tokenizer."
            )


class TeacherModel:
    """Another model, frozen.

    Args:
        args: its teacher_model_name_or_path is loaded, in bfloat16 if the run computes in it, else in the student's
            dtype.
        student: for its dtype, attention and vocabulary.
        tokenizer: the student's.
        accelerator: shards the teacher as it does the student.

    Raises:
        RecipeError: no such model, another vocabulary, or a model whose logits are not known to be those of its head.
    """

    def __init__(
        self,
        args: MatrixConfig,
        student: PreTrainedModel,
        tokenizer: Any,
        accelerator: Accelerator,
    ) -> None:
        name = args.teacher_model_name_or_path
        assert name is not None
        remote = args.trust_remote_code

        # 1. the same tokens, before the weights
        check_same_tokens(tokenizer, load_teacher_tokenizer(args), name)

        # 2. the weights
        dtype = "bfloat16" if args.bf16 else str(student.dtype).removeprefix("torch.")
        attention = student.config._attn_implementation
        settings = ModelArguments(model_name_or_path=name, dtype=dtype, attn_implementation=attention)
        with _whole_on_every_process():
            model = load_model(settings, tokenizer, seed=args.seed, trust_remote_code=remote, key=KEY)
        model.requires_grad_(False)
        try:
            theirs = _size(lm_head_of(model).weight)
            add_matrix_head(model, LossSettings(mce_weight=0))
        except ModelError as error:
            raise RecipeError(f"{KEY}={name!r} cannot be a teacher: {error} Use another teacher.") from None
        if theirs < (ours := _size(lm_head_of(student).weight)):
            raise _too_few(name, theirs, ours)
        self.head = FrozenHead(model)
        self._model = _shard(model, accelerator)

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """(B, T, H) the last hidden states."""
        return self._model(**_without_training(inputs), hidden_only=True)

    @property
    def model(self) -> nn.Module:
        """The model as it runs."""
        return self._model


class BaseModel:
    """The student with its adapters off.

    Args:
        trainer: whose model, wrapped by DDP, FSDP or DeepSpeed, is run.
        peft_model: the `PeftModel` in it.

    Raises:
        RecipeError: no adapters, or adapters that start by changing the base.
    """

    def __init__(self, trainer: Any, peft_model: Any) -> None:
        has_adapters = is_peft_model(peft_model)
        check_base([each.init_lora_weights for each in peft_model.peft_config.values()] if has_adapters else None)
        self._trainer, self._peft_model = trainer, peft_model
        self.head = FrozenHead(peft_model.get_base_model())

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """(B, T, H) the last hidden states."""
        model = self._trainer.model_wrapped
        with self._peft_model.disable_adapter(), evaluation_mode(model):
            return model(**_without_training(inputs), hidden_only=True)


def _size(weight: Any) -> int:
    return getattr(weight, "ds_shape", weight.shape)[0]  # empty under ZeRO-3


@contextlib.contextmanager
def _whole_on_every_process() -> Iterator[None]:
    """Load a model whole on every process.

    With accelerate's cpu_ram_efficient_loading only the first process of FSDP reads the weights, and sends them when
    the model is prepared; TRL's `prepare_fsdp` sends nothing, so the others would keep a part of a random teacher.
    """
    before = os.environ.get(RAM_EFFICIENT)
    os.environ[RAM_EFFICIENT] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[RAM_EFFICIENT]
        else:
            os.environ[RAM_EFFICIENT] = before


def _without_training(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ONLY_FOR_TRAINING}


def _shard(model: PreTrainedModel, accelerator: Accelerator) -> Any:
    """As TRL does with its own teachers and references."""
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    if accelerator.distributed_type == "DEEPSPEED":
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == "FSDP":
        sharded: Any = prepare_fsdp(model, accelerator)
        return sharded.eval()
    return accelerator.prepare_model(model, evaluation_mode=True).eval()
