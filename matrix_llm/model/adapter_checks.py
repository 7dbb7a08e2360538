"""Adapters that would adapt nothing, or what the loss reads, found before a row is read or a weight loaded.

The model is built from its configuration alone, on the meta device, and PEFT adds the adapters to it. What PEFT ignores
with a warning or in silence is then refused: each name of each list must match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from matrix_llm.base.errors import ModelError, RecipeError, one_line
from matrix_llm.base.values import nearest
from matrix_llm.config import ModelArguments
from matrix_llm.model.adapters import add_adapters, lora_config
from matrix_llm.model.pretrained import load_pretrained_config


def check_adapters(
    args: ModelArguments, *, trust_remote_code: bool = False, read: PretrainedConfig | None = None
) -> None:
    """Refuse adapters that cannot be made, that match nothing, or that lie on the LM head.

    Args:
        read: the configuration of `model_name_or_path`, where it has been read already.

    Raises:
        RecipeError, ModelError: with the key, the name that matches nothing and the nearest that exist; or peft is not
            installed.
    """
    # 1. the model without its weights, and its adapters
    settings = lora_config(args)
    config = None if settings is None else _configuration(args, trust_remote_code, read)
    if settings is None or config is None:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        names = _Names(model)
        try:
            adapted = add_adapters(model, settings)
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            names.check(args, settings, None)  # PEFT does not say which name of which key
            reason = one_line(error)
            # 0 for adapters on parameters, such as stacked experts
            way_out = "Set lora_dropout: 0." if "lora_dropout" in reason else "Correct them."
            raise RecipeError(f"the lora_ settings do not fit {type(model).__name__}: {reason}. {way_out}") from None

    # 2. what they adapt
    tuner: Any = adapted.base_model
    names.check(args, adapted.peft_config["default"], [*tuner.targeted_module_names, *tuner.targeted_parameter_names])
    _check_lm_head(model)
    _check_start(args, model)
    _check_tokens(args, model)
    _check_biases(args, model)
    _check_tying(args, model)


def _configuration(
    args: ModelArguments, trust_remote_code: bool, read: PretrainedConfig | None
) -> PretrainedConfig | None:
    """The model's configuration; None where `build_config` will refuse it, once there is a tokenizer."""
    if args.model_config is None:
        return load_pretrained_config(args, trust_remote_code, read)
    settings = dict(args.model_config)
    if args.tokenizer_vocab_size is not None:
        settings.setdefault("vocab_size", args.tokenizer_vocab_size)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, TypeError, StrictDataclassError):
        return None


class _Names:
    """The names of a model's modules and parameters before it is adapted."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model_type = type(model).__name__
        modules = {name: module for name, module in model.named_modules() if name}
        self.modules = list(modules)
        self.parameters = [name for name, _ in model.named_parameters()]
        self.trainable = [name for name, module in modules.items() if next(module.parameters(), None) is not None]
        self.layers = [name for name, m in modules.items() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)]

    def check(self, args: ModelArguments, settings: Any, targeted: list[str] | None) -> None:
        """Refuse each name that matches nothing.

        Args:
            settings: the `LoraConfig`, in which PEFT has replaced names that transformers renamed.
            targeted: the layers and parameters that have adapters; None: PEFT could not make them.
        """
        # 1. names of modules
        saved = args.lora_modules_to_save or []
        self._check_each("lora_modules_to_save", saved, self.trainable, _is_ending)
        spared = [name for name in self.modules if any(_is_ending(name, entry) for entry in saved)]
        if args.lora_target_modules != "all-linear":
            among = self.modules if targeted is None else [*targeted, *spared]
            self._check_each("lora_target_modules", settings.target_modules, among, _is_named)
        self._check_each("lora_exclude_modules", args.lora_exclude_modules, self.modules, _is_named)

        # 2. names of parameters
        among = self.parameters if targeted is None else targeted
        self._check_each("lora_target_parameters", settings.target_parameters, among, _is_named)

        # 3. what chooses among those that are adapted
        among = self.modules if targeted is None else targeted
        for key in ("lora_rank_pattern", "lora_alpha_pattern"):
            self._check_each(key, getattr(args, key), among, _is_fitting)
        pattern = args.lora_layers_pattern
        patterns = [pattern] if isinstance(pattern, str) else pattern
        self._check_each("lora_layers_pattern", patterns, among, _is_in_list)
        self._check_each("lora_layers_to_transform", args.lora_layers_to_transform, among, _is_at_index)

    def _check_each(
        self, key: str, entries: Iterable[Any] | str | None, names: list[str], matches: Callable[[str, Any], bool]
    ) -> None:
        """Refuse the first of `entries` that matches none of `names`. A text is one regular expression."""
        if isinstance(entries, str):
            entries, matches = [entries], _is_whole
        for entry in sorted(entries or [], key=str):
            if any(matches(name, entry) for name in names):
                continue
            offered = sorted({name.rsplit(".", 1)[-1] for name in self._offered(key)})
            if any(matches(name, entry) for name in self._offered(key)):
                reason = "is not among the layers that the other lora_ settings choose."
            else:
                reason = f"matches nothing in {self.model_type}.{nearest(str(entry).rsplit('.', 1)[-1], offered)}"
            raise RecipeError(f"{key}: {entry!r} {reason} Correct it or remove it; there are: {', '.join(offered)}.")

    def _offered(self, key: str) -> list[str]:
        """The names that `key` may have been meant to match."""
        if key == "lora_modules_to_save":
            return self.trainable
        if key == "lora_target_parameters":
            return self.parameters
        if not key.startswith("lora_layers"):
            return self.layers
        blocks = [name for name in self.modules if re.search(r"\.\d+$", name)]
        return blocks if key == "lora_layers_to_transform" else [name.rsplit(".", 1)[0] for name in blocks]


# How PEFT compares a module's full name with what a setting says


def _is_ending(name: str, entry: str) -> bool:
    return name.endswith(entry)


def _is_whole(name: str, entry: str) -> bool:
    return re.fullmatch(entry, name) is not None


def _is_named(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _is_fitting(name: str, entry: str) -> bool:
    return re.match(rf"(.*\.)?({entry})$", name) is not None


def _is_in_list(name: str, entry: str) -> bool:
    return re.match(rf".*\.{entry}\.(\d+)\.", name) is not None


def _is_at_index(name: str, entry: int) -> bool:
    return re.search(rf"\.{entry}(\.|$)", name) is not None


def _check_lm_head(model: PreTrainedModel) -> None:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    key = "lora_target_parameters" if isinstance(head, ParamWrapper) else "lora_target_modules"
    raise ModelError(
        f"{key} puts an adapter on the LM head (`{name}`), whose weight the loss reads directly, so the adapter would "
        f"never be trained. Name it under lora_exclude_modules, or under lora_modules_to_save to train it in full."
    )


def _check_start(args: ModelArguments, model: PreTrainedModel) -> None:
    """PiSSA and OLoRA take as many directions out of a linear layer as the rank says: it must have them."""
    from peft.tuners.lora import LoraLayer

    start = f"init_lora_weights={args.init_lora_weights!r}"
    for name, layer in model.named_modules():
        if not args.changes_base or not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            raise RecipeError(
                f"{start}: `{name}` is not a linear layer, so no part of it can start the adapter. Leave it out of "
                "lora_target_modules, or set init_lora_weights: true."
            )
        if layer.r["default"] > (largest := min(base.weight.shape)):
            raise RecipeError(
                f"{start} with rank {layer.r['default']}: `{name}` has only {largest} directions. Set lora_r to at "
                f"most {largest}, or init_lora_weights: true."
            )


def _check_tokens(args: ModelArguments, model: PreTrainedModel) -> None:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for name, layer in model.named_modules():
        if isinstance(layer, TrainableTokensLayer):
            base: Any = layer.base_layer
            size, largest = base.weight.shape[0], max(layer.token_indices["default"], default=-1)
            if largest >= size or largest < 0:
                raise RecipeError(
                    f"lora_trainable_token_indices={args.lora_trainable_token_indices!r}: `{name}` has the token ids 0 "
                    f"to {size - 1}. Correct the ids, or remove the key."
                )


def _check_biases(args: ModelArguments, model: PreTrainedModel) -> None:
    if args.lora_bias == "none":
        return
    biases = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    if not any(".lora_" not in name for name in biases):
        raise RecipeError(
            f"lora_bias={args.lora_bias!r}: no layer that it concerns has a bias, so it would do nothing. Remove it."
        )


def _check_tying(args: ModelArguments, model: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not args.lora_ensure_weight_tying:
        return
    ends: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
    is_tied = model.config.get_text_config().tie_word_embeddings
    if not is_tied or not any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        reason = "the adapters leave the embeddings alone" if is_tied else "embeddings and LM head are two weights here"
        raise RecipeError(f"lora_ensure_weight_tying=True would do nothing: {reason}. Remove it.")
