"""The model: loaded or built from scratch, in float32 unless told otherwise, with the tokenizer's special ids.

transformers 5 uses the dtype of the checkpoint, so a bf16 checkpoint would silently train with bf16 master
weights.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME, logging

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.base.values import nearest
from matrix_llm.base.weights import check_weights
from matrix_llm.config import ModelArguments
from matrix_llm.model.adapters import quantisation_options
from matrix_llm.model.pretrained import load_pretrained, load_pretrained_config
from matrix_llm.model.tokenizer import check_vocabulary

logger = logging.get_logger(__name__)

# settings of a GenerationConfig that mean something only where tokens are sampled
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# still understood by transformers, though no longer fields of the configuration classes
LEGACY_CONFIG_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}
# these have max_position_embeddings, and no positions
WITHOUT_POSITIONS = {"jamba", "nemotron_h", "rwkv", "zamba"}
# the first position of these is pad_token_id + 1
FIRST_POSITION_AFTER_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def load_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 42,
    trust_remote_code: bool = False,
    read: PretrainedConfig | None = None,
    key: str = "model_name_or_path",
) -> PreTrainedModel:
    """The model in `args.dtype`, from a checkpoint or with random weights drawn from `seed`; its special ids are the
    tokenizer's.

    Args:
        read: the configuration of `model_name_or_path`, where it has been read already.
        key: the setting that holds its name, for errors.

    Raises:
        RecipeError: no such model, a model_config that does not fit, tokens without an embedding.
        ModelError: weights that are not those of the model: a tensor missing, unexpected or not finite.
    """
    # 1. options
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation

    # 2. weights: random, or a checkpoint's
    if args.model_config is not None:
        if dtype == "auto":  # there is no checkpoint to follow
            options["dtype"] = torch.float32
        config = build_config(args, tokenizer)
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    else:
        options |= quantisation_options(args)
        options |= {"revision": args.model_revision, "trust_remote_code": trust_remote_code}
        options["output_loading_info"] = True
        if read is not None:
            options["config"] = load_pretrained_config(args, trust_remote_code, read)
        model, info = load_pretrained(key, args.model_name_or_path, AutoModelForCausalLM.from_pretrained, **options)
        for sentence in check_weights(model, info, f"{key}={args.model_name_or_path!r}"):
            logger.warning(sentence)
        set_seed(seed)  # for the adapters, which are drawn before Trainer sets its seed

    # 3. model and tokenizer together. The attribute, not the weight: that one is empty here under ZeRO-3.
    if isinstance(embeddings := getattr(model.get_input_embeddings(), "num_embeddings", None), int):
        check_vocabulary(tokenizer, embeddings)
    set_special_ids(model, tokenizer)
    return model


def repair_generation_settings(model: PreTrainedModel) -> None:
    """Mend settings for sampling without `do_sample: true`, with which Llama-2-chat and Vicuna were published.

    transformers reads such a generation_config.json, and refuses to write it: the run would end without its weights.
    Where it does not say do_sample, it is set; where it says false, the settings for sampling, which do nothing, go.

    Raises:
        RecipeError: the settings contradict each other in another way, which only the user can decide.
    """
    settings = getattr(model, "generation_config", None)
    if settings is not None and (said := _repair(settings, str(model.name_or_path))):
        logger.warning(f"generation_config.json {said}")


def _repair(settings: GenerationConfig, name: str) -> str:
    """Mend the settings in place. Returns what was done, or nothing."""
    try:
        settings.validate(strict=True)
        return ""
    except ValueError:
        pass
    if settings.do_sample is False:
        said = "sets sampling options with do_sample: false: it is saved without them."
        for each in SAMPLING:
            setattr(settings, each, None)
    else:
        said = "sets sampling options without do_sample: it is saved with do_sample: true."
        settings.do_sample = True
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise RecipeError(
            f"the generation_config.json of {name!r} could not be saved after training: "
            f"{one_line(error)}. Correct the file."
        ) from None
    return said


def check_generation_settings(args: ModelArguments) -> None:
    """Refuse a generation_config.json that could not be read, or saved again, before the weights are read.

    Raises:
        RecipeError: with what is wrong in it.
    """
    if args.model_name_or_path is None:
        return
    name = os.path.expanduser(args.model_name_or_path)
    try:
        _repair(GenerationConfig.from_pretrained(name, revision=args.model_revision), args.model_name_or_path)
    except OSError:  # many models have none
        if os.path.isfile(os.path.join(name, GENERATION_CONFIG_NAME)):
            raise RecipeError(f"the generation_config.json of {name!r} is not JSON. Correct the file.") from None
    except RecipeError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = one_line(error)
        raise RecipeError(
            f"the generation_config.json of {args.model_name_or_path!r} cannot be used: {reason}. Correct the file."
        ) from None


def load_config(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    trust_remote_code: bool = False,
    read: PretrainedConfig | None = None,
) -> PretrainedConfig:
    """The configuration alone, of a checkpoint or from scratch: all that a plan needs, without weights.

    Without a tokenizer, that of a model from scratch has its vocabulary and special ids by default. `read` is the
    checkpoint's, where it has been read already.
    """
    if args.model_config is not None:
        return build_config(args, tokenizer)
    return load_pretrained_config(args, trust_remote_code, read)


def position_limit(config: PretrainedConfig) -> int | None:
    """The longest row that the model can read, in tokens; None if its positions have no end (ALiBi, recurrent models).

    Scaled rotary embeddings reach as far as their scaling says, whether or not max_position_embeddings includes it.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)  # GPT-2's n_positions and others answer to it, too
    if not isinstance(limit, int) or limit < 1 or text.model_type in WITHOUT_POSITIONS:
        return None
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "nope":
        return None
    if text.model_type in FIRST_POSITION_AFTER_PADDING:
        return limit - (text.pad_token_id or 0) - 1
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1
    if kind in ("linear", "dynamic"):
        return int(limit * factor)
    if kind == "yarn":
        return max(limit, int((rope.get("original_max_position_embeddings") or limit) * factor))
    return limit


def build_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    """The configuration of a from-scratch model (`model_config`), with the tokenizer's special ids if it is there.

    Strict, unlike transformers, which stores and ignores a misspelt key.

    Raises:
        RecipeError: unknown architecture or key (with the nearest valid one), or a value the architecture refuses.
    """
    settings = dict(args.model_config or {})
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"model_config: no architecture is called {model_type!r}.{nearest(model_type, list(CONFIG_MAPPING))}"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map) | LEGACY_CONFIG_KEYS
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    for key in settings:
        if key not in known:
            raise RecipeError(
                f"model_config: {key!r} is not a setting of a {model_type} model.{nearest(key, sorted(known))}"
            )
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if tokenizer is not None and settings.setdefault("vocab_size", len(tokenizer)) < len(tokenizer):
        raise RecipeError(
            f"model_config: vocab_size={settings['vocab_size']} is less than the tokenizer's {len(tokenizer)} tokens. "
            "Remove vocab_size: it then follows the tokenizer."
        )
    try:
        return AutoConfig.for_model(model_type, **{**settings, **ids})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"model_config: {one_line(error)}.") from None


def set_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's special ids into the model's configuration and generation settings.

    `generate` then stops and pads as the model was trained. An id that is already one of several stays so.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        wanted = getattr(tokenizer, name)
        for config in (model.config.get_text_config(), model.generation_config):
            if config is None:
                continue
            present = getattr(config, name, None)
            if isinstance(present, list) and wanted in present:  # Llama 3 stops at either of two ids
                continue
            setattr(config, name, wanted)
