"""What can be known of the model before rows are read and weights are loaded: from its configuration alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.config import ModelArguments, Recipe
from matrix_llm.loss.choice import NEEDS_NUMBERS, NEEDS_TEACHER
from matrix_llm.loss.settings import EMBEDDINGS
from matrix_llm.losses import number_tokens
from matrix_llm.model.lm_head import load_embeddings
from matrix_llm.model.load import build_config, check_generation_settings, load_config
from matrix_llm.model.pretrained import load_pretrained_config
from matrix_llm.model.teacher import check_base, check_same_tokens, check_teacher, load_teacher_tokenizer
from matrix_llm.model.tokenizer import load_tokenizer


class _TokenizerToTrain:
    """Stands for the tokenizer that `tokenizer_vocab_size` trains on the rows, which have not been read yet."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def check_model(recipe: Recipe, read: PretrainedConfig | None = None) -> None:
    """Refuse settings that do not fit the model: its architecture, its attention, its vocabulary, its experts.

    Args:
        read: the configuration of `model_name_or_path`, where it has been read already.

    Raises:
        RecipeError: no such model, or a setting that the model would refuse after its weights are loaded.
    """
    model, training = recipe.model, recipe.training
    config = _config_before_rows(model, training.trust_remote_code, read)
    check_generation_settings(model)
    if model.attn_implementation is not None and not recipe.missing:
        _check_attention(model.attn_implementation, config, training.trust_remote_code)
    if training.mce_embeddings not in EMBEDDINGS and model.tokenizer_vocab_size is None:
        load_embeddings(training.mce_embeddings, config.get_text_config().vocab_size)
    if training.token_loss == "asft" and training.teacher_model_name_or_path is None:
        check_base([model.init_lora_weights] if model.use_peft else None)
    if training.token_loss in (*NEEDS_TEACHER, *NEEDS_NUMBERS) and model.tokenizer_vocab_size is None:
        _check_tokens(recipe, config, read)
    if not hasattr(config.get_text_config(), "output_router_logits"):
        if training.router_aux_loss_coef:
            raise _no_experts("router_aux_loss_coef", training.router_aux_loss_coef, config)
        if (training.metric_for_best_model or "").endswith("aux_loss"):
            raise _no_experts("metric_for_best_model", training.metric_for_best_model, config)


def _config_before_rows(
    model: ModelArguments, trust_remote_code: bool, read: PretrainedConfig | None
) -> PretrainedConfig:
    if model.model_config is None:
        return load_pretrained_config(model, trust_remote_code, read)
    if model.tokenizer_vocab_size is None:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        return load_config(model, tokenizer, trust_remote_code=trust_remote_code)
    # The tokenizer may turn out smaller than asked for, so a smaller vocab_size is not refused yet
    size = min(model.tokenizer_vocab_size, model.model_config.get("vocab_size") or model.tokenizer_vocab_size)
    return build_config(model, cast(Any, _TokenizerToTrain(size)))


def _check_tokens(recipe: Recipe, config: PretrainedConfig, read: PretrainedConfig | None) -> None:
    """Refuse a teacher with other tokens than the model's, and for ntl a model without a token for each digit."""
    training = recipe.training
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=training.trust_remote_code, read=read)
    if training.token_loss in NEEDS_NUMBERS:
        number_tokens(tokenizer)
        return
    check_teacher(training, config.get_text_config().vocab_size)
    if training.teacher_model_name_or_path is not None:
        check_same_tokens(tokenizer, load_teacher_tokenizer(training), training.teacher_model_name_or_path)


def _check_attention(attention: str, config: PretrainedConfig, trust_remote_code: bool) -> None:
    """Build the model without memory for its weights: transformers then says whether it has this attention."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=trust_remote_code, dtype=torch.bfloat16
            )
    except (ValueError, ImportError, NotImplementedError) as error:
        reason = one_line(error)
        raise RecipeError(
            f"attn_implementation={attention!r} does not work with a {config.model_type} model: {reason}. Remove it, "
            "or choose sdpa or eager."
        ) from None


def _no_experts(key: str, value: Any, config: PretrainedConfig) -> RecipeError:
    return RecipeError(
        f"{key}={value!r}: a {config.model_type} model has no experts, so there is no auxiliary loss. Remove it."
    )
