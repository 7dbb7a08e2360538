"""Packages and devices that a recipe needs are looked for first; a plan says what this machine lacks, and goes on."""

import importlib.util

import pytest
import torch

from matrix_llm.base.errors import RecipeError
from matrix_llm.checks import machine

PRETRAINED = {"model_config": None, "tokenizer_vocab_size": None, "model_name_or_path": "x/y"}


@pytest.fixture
def without(monkeypatch):
    """No package of these can be found."""

    def hide(*names):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name))

    return hide


@pytest.mark.parametrize(
    ("settings", "package", "words"),
    [
        ({"use_peft": True}, "peft", "use_peft=True needs the package peft"),
        ({"accuracy_rows": 4, "accuracy_engine": "vllm"}, "vllm", "accuracy_engine='vllm'.*pip install vllm"),
        ({**PRETRAINED, "use_peft": True, "load_in_4bit": True}, "bitsandbytes", "load_in_4bit=True.*bitsandbytes"),
        (
            {"use_liger_kernel": True, "mce_weight": 0},
            "liger_kernel",
            "use_liger_kernel=True.*pip install liger-kernel",
        ),
        ({"attn_implementation": "flash_attention_2"}, "flash_attn", "flash_attention_2'.*pip install flash-attn"),
        ({"attn_implementation": "kernels-community/flash-attn3"}, "kernels", "flash-attn3'.*pip install kernels"),
    ],
)
def test_a_missing_package_is_named_with_the_key_before_anything_is_loaded(load, without, settings, package, words):
    without(package, "kernels")
    with pytest.raises(RecipeError, match=words):
        load(**settings)
    assert package.replace("_", "-") in load(**settings, dry_run=True).missing  # a plan may be for another machine


def test_a_missing_optimizer_is_named(load, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    for optim in ("adamw_bnb_8bit", "paged_adamw_8bit", "lion_32bit"):
        with pytest.raises(RecipeError, match=f"optim='{optim}': .*install.*bitsandbytes"):
            load(optim=optim)
        assert "bitsandbytes" in load(optim=optim, dry_run=True).missing


def test_a_reporting_service_must_exist_and_be_installed(load, monkeypatch):
    monkeypatch.setattr(machine, "get_available_reporting_integrations", lambda: ["tensorboard"])
    load(report_to="tensorboard")
    load(report_to="none")
    assert load(report_to=None).training.report_to == []
    with pytest.raises(RecipeError, match=r"report_to='comet_ml'.*pip install comet-ml"):
        load(report_to=["tensorboard", "comet_ml"])
    for dry_run in (False, True):
        with pytest.raises(RecipeError, match=r"report_to='wand'.*Did you mean wandb"):
            load("--report_to", "wand", dry_run=dry_run)


@pytest.mark.parametrize(("name", "nearest"), [("sdpaa", "sdpa"), ("flash_attention2", "flash_attention_2")])
def test_a_misspelt_attention_comes_with_the_right_one(load, name, nearest):
    with pytest.raises(RecipeError, match=f"attn_implementation='{name}' is not one of.*Did you mean.*{nearest}"):
        load(attn_implementation=name, dry_run=True)


def test_an_attention_for_decoding_alone_is_refused(load):
    with pytest.raises(RecipeError, match=r"attn_implementation='paged\|eager'"):
        load(attn_implementation="paged|eager")


@pytest.mark.parametrize("settings", [{"activation_offloading": True}, {"attn_implementation": "flex_attention"}])
def test_what_needs_a_gpu_is_refused_on_a_cpu(load, settings):
    (key,) = settings
    with pytest.raises(RecipeError, match=f"{key}=.* needs a GPU"):
        load(**settings, use_cpu=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")
@pytest.mark.parametrize("key", ["bf16", "tf32"])
def test_a_precision_that_this_machine_lacks_is_refused_by_its_key(load, key):
    with pytest.raises(RecipeError, match=f"{key}=True is refused: .*Correct or remove {key}"):
        load(**{key: True}, use_cpu=key == "tf32")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"torch_compile_backend": "inductr"}, "torch_compile_backend='inductr'.*Did you mean inductor"),
        ({"torch_compile_mode": "max"}, "torch_compile_mode='max' is not one of default"),
        ({"fsdp": True}, "fsdp=True.*accelerate launch"),
        ({"dataloader_num_workers": 0, "dataloader_persistent_workers": True}, "dataloader_num_workers=0.*persistent"),
        ({"dtype": "float16", "fp16": True}, "fp16=True with dtype='float16'.*dtype: float32"),
        ({"packing": True, "max_length": None}, "packing=True with max_length=None.*max_length: 1024"),
        ({"padding_free": True}, "padding_free=True with max_length=256.*packing: true"),
    ],
)
def test_what_torch_and_trl_would_refuse_at_the_first_step_is_refused_first(load, settings, words):
    with pytest.raises(RecipeError, match=words):
        load(**settings)
