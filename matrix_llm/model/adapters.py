"""Settings for peft and bitsandbytes: LoRA adapters, and a base model frozen in 4 bits. Both packages are optional."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import ModelArguments

if TYPE_CHECKING:
    from peft import LoraConfig


def _require(package: str, setting: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RecipeError(f"{setting} needs the package {package}, which is not installed. Run: pip install {package}")


def lora_config(args: ModelArguments) -> LoraConfig | None:
    """The lora_* settings as a `peft.LoraConfig`, or None without use_peft.

    Raises:
        RecipeError: peft is not installed.
    """
    if not args.use_peft:
        return None
    _require("peft", "use_peft=True")
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        modules_to_save=args.lora_modules_to_save,
    )


def four_bit_options() -> dict[str, Any]:
    """Options of `from_pretrained` for QLoRA: NF4 with double quantisation, computed in bf16, each process on its own
    GPU.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    _require("bitsandbytes", "load_in_4bit=True")
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": quantization, "device_map": {"": PartialState().local_process_index}}
