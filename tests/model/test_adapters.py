"""LoRA and 4 bits (model/adapters.py)."""

import importlib.util

import pytest

from matrix_llm.config import ModelArguments, RecipeError
from matrix_llm.model.adapters import lora_config
from matrix_llm.model.load import load_model
from tests.support.checkpoints import scratch


def test_lora_settings_reach_peft():
    assert lora_config(scratch()) is None
    args = ModelArguments(model_name_or_path="x", use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj"])
    config = lora_config(args)
    assert (config.r, config.lora_alpha, config.target_modules, config.task_type) == (4, 8, {"q_proj"}, "CAUSAL_LM")


def test_four_bits_need_peft_and_bitsandbytes(tiny_tokenizer, monkeypatch):
    with pytest.raises(RecipeError, match="Add use_peft: true"):
        ModelArguments(model_name_or_path="x", load_in_4bit=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # whatever is installed here
    args = ModelArguments(model_name_or_path="x", load_in_4bit=True, use_peft=True)
    with pytest.raises(RecipeError, match=r"load_in_4bit=True.*pip install bitsandbytes"):
        load_model(args, tiny_tokenizer)
    with pytest.raises(RecipeError, match=r"use_peft=True.*pip install peft"):
        lora_config(args)
