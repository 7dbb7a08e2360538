"""Settings for peft and bitsandbytes: LoRA adapters, and a base model frozen in 4 or 8 bits. Both packages are
optional.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.checks.machine import require
from matrix_llm.config import ModelArguments

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"

# Fields of peft.LoraConfig that no key sets, and why. A test compares keys and this table with LoraConfig itself.
NOT_EXPOSED = {
    **dict.fromkeys(["peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version"], "PEFT's own records"),
    **dict.fromkeys(["base_model_name_or_path", "revision"], "follow model_name_or_path and model_revision"),
    **dict.fromkeys(["megatron_config", "megatron_core"], "for Megatron's layers, which this package does not train"),
    **dict.fromkeys(["eva_config", "corda_config", "lora_ga_config"], "for starts computed from data, refused"),
    **dict.fromkeys(["loftq_config", "use_qalora", "qalora_group_size"], "change the base in memory"),
    **dict.fromkeys(["velora_config", "kasa_config", "monteclora_config"], "variants that were not tried"),
    **dict.fromkeys(["arrow_config", "use_bdlora", "runtime_config"], "for serving several adapters"),
    "alora_invocation_tokens": "only some tokens of a row would see the adapter, so it cannot be merged",
    "layer_replication": "would train a model with more blocks than the base has",
    "fan_in_fan_out": "PEFT sets it by the layer's type",
    "lora_bias": "for adapters extracted from full fine-tunes; the key lora_bias sets LoraConfig.bias",
}


def lora_config(args: ModelArguments) -> LoraConfig | None:
    """The settings of the adapters as a `peft.LoraConfig`, or None without use_peft.

    Raises:
        RecipeError: peft is not installed, or refuses the settings.
    """
    if not args.use_peft:
        return None
    require("peft", "use_peft=True")
    from peft import LoraConfig

    args = copy.deepcopy(args)  # PEFT adds to the lists that it is given
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            revision=None if args.model_revision == "main" else args.model_revision,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            init_lora_weights=args.init_lora_weights,  # type: ignore[arg-type]
            target_modules=args.lora_target_modules,
            exclude_modules=args.lora_exclude_modules,
            target_parameters=args.lora_target_parameters,
            layers_to_transform=args.lora_layers_to_transform,
            layers_pattern=args.lora_layers_pattern,
            rank_pattern=args.lora_rank_pattern or {},
            alpha_pattern=args.lora_alpha_pattern or {},
            bias=args.lora_bias,  # type: ignore[arg-type]
            modules_to_save=args.lora_modules_to_save,
            trainable_token_indices=args.lora_trainable_token_indices,
            ensure_weight_tying=args.lora_ensure_weight_tying,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"PEFT refuses the lora_ settings: {one_line(error)}.") from None


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` with adapters, for a look at what they would be: PEFT's warnings are not printed."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def quantisation_options(args: ModelArguments) -> dict[str, Any]:
    """Options of `from_pretrained` for a base in 4 or 8 bits, each process on its own device; {} for full precision.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    if args.quantised_by is None:
        return {}
    require("bitsandbytes", f"{args.quantised_by}=True")
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    if args.load_in_8bit:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
        )
    return {"quantization_config": quantization, "device_map": {"": PartialState().device}}


# ------------------------------------------------------------------------------- adapters that start from the base


class UnchangedBase:
    """Saves PiSSA's and OLoRA's adapters as plain LoRA for the base as it was, and loads them again.

    Both start from a part of each weight, W = R + s B0 A0, and train s B A on top of R. A saved adapter knows neither R
    nor B0 A0, so on the base W it would give another model. Saved here is s [B, -B0] [A; A0], of twice the rank, which
    is right on W wherever it is loaded. Resuming takes A and B out of it, and makes R the one that it was trained on.
    """

    def __init__(self, model: PeftModel) -> None:
        from peft import get_peft_model_state_dict

        self._model = model
        self._save, self._load = model.save_pretrained, model.load_adapter
        factors = get_peft_model_state_dict(model, save_embedding_layers=False)
        if any(".lora_embedding_" in name for name in factors):
            raise RecipeError(
                "init_lora_weights: an adapter of an embedding cannot start from a part of it. Leave embeddings out of "
                "lora_target_modules, or set init_lora_weights: true."
            )
        self._initial = {name: value.detach().cpu().clone() for name, value in factors.items() if _is_factor(name)}

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """`PeftModel.save_pretrained`; the files then hold an adapter of the unchanged base."""
        from peft import LoraConfig

        self._save(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        file = Path(save_directory, WEIGHTS)
        weights = load_file(file)
        for name, start in self._initial.items():
            start = start.to(weights[name].dtype)
            both = (weights[name], start) if ".lora_A" in name else (weights[name], -start)
            weights[name] = torch.cat(both, dim=0 if ".lora_A" in name else 1)
        save_file(weights, file, metadata={"format": "pt"})
        config = LoraConfig.from_pretrained(save_directory)
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
        config.save_pretrained(save_directory)

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """`PeftModel.load_adapter` for a folder that `save_pretrained` wrote."""
        from peft import set_peft_model_state_dict

        file = Path(model_id, WEIGHTS)
        saved = load_file(file) if file.is_file() else {}
        if any(name not in saved or saved[name].numel() != 2 * start.numel() for name, start in self._initial.items()):
            return self._load(model_id, adapter_name, *args, **kwargs)  # not one of ours: PEFT says what is wrong
        trained, initial = dict(saved), {}
        for name in self._initial:
            axis = 0 if ".lora_A" in name else 1
            trained[name], start = (part.contiguous() for part in saved[name].chunk(2, dim=axis))
            initial[name] = start if axis == 0 else -start
        if any(not torch.equal(initial[name], start) for name, start in self._initial.items()):
            self._restore_base(initial, adapter_name)  # another machine decomposed the weights a little differently
        self._initial = initial
        return set_peft_model_state_dict(self._model, trained, adapter_name=adapter_name)

    def _restore_base(self, initial: dict[str, Tensor], adapter_name: str) -> None:
        """Take `initial` out of the base weights instead of what was taken out when the adapters were made."""
        from peft import set_peft_model_state_dict
        from peft.tuners.lora import LoraLayer

        for sign, factors in ((1, self._initial), (-1, initial)):
            set_peft_model_state_dict(self._model, factors, adapter_name=adapter_name)
            for layer in self._model.modules():
                if isinstance(layer, LoraLayer):
                    base: Any = layer.get_base_layer()
                    base.weight.data += sign * layer.get_delta_weight(adapter_name)  # type: ignore[operator]


def _is_factor(name: str) -> bool:
    return ".lora_A" in name or ".lora_B" in name


def keep_base_unchanged(model: Any) -> None:
    """Have a PEFT model whose adapters start from a part of its weights be saved for the base as it was.

    Call it before training. Other models are left as they are.

    Raises:
        RecipeError: rank-stabilised or weight-decomposed adapters, which cannot be saved so.
    """
    config: Any = getattr(model, "peft_config", {}).get("default")
    if not str(getattr(config, "init_lora_weights", None)).startswith(("pissa", "olora")):
        return
    if config.use_rslora or config.use_dora:
        raise RecipeError(
            f"init_lora_weights={config.init_lora_weights!r} with use_rslora or use_dora: the trained adapter could "
            "not be put back on the unchanged base. Remove one of them."
        )
    unchanged = UnchangedBase(model)
    model.save_pretrained, model.load_adapter = unchanged.save_pretrained, unchanged.load_adapter
