"""Adapters: what each setting does to the model that is built, and what is saved (model/adapters.py)."""

import dataclasses
import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import MatrixConfig, ModelArguments, load_recipe
from matrix_llm.model import adapters
from matrix_llm.model.adapters import NOT_EXPOSED, lora_config, quantisation_options
from matrix_llm.model.load import load_model
from matrix_llm.trainer import MatrixTrainer
from tests.support.checkpoints import scratch
from tests.support.tiny import config, rows, tiny_model


def arguments(base="x", **settings):
    return ModelArguments(model_name_or_path=str(base), use_peft=True, **settings)


def adapted(name="llama", **settings):
    """The tiny model with the adapters that a recipe's settings ask for."""
    return get_peft_model(tiny_model(name), lora_config(arguments(**settings)))


def logits(model):
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model, by architecture."""

    def folder(name):
        path = root / name
        if not path.exists():
            tiny_model(name).save_pretrained(path)
        return path

    root = tmp_path_factory.mktemp("bases")
    return folder


# ----------------------------------------------------------------------------------------------------------- settings


def test_lora_settings_reach_peft():
    assert lora_config(scratch()) is None
    made = lora_config(arguments(lora_r=4, lora_alpha=8, lora_target_modules=["q_proj"], model_revision="v2"))
    assert (made.r, made.lora_alpha, made.target_modules, made.task_type) == (4, 8, {"q_proj"}, "CAUSAL_LM")
    assert made.revision == "v2"  # or another base would be loaded under the adapter


def test_every_field_of_lora_config_is_set_by_a_key_or_listed_as_not_exposed():
    keys = {field.name.removeprefix("lora_") for field in dataclasses.fields(ModelArguments)}
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    exposed = {name for name in fields if name.removeprefix("lora_") in keys and name not in NOT_EXPOSED}
    assert fields - exposed <= set(NOT_EXPOSED)  # an older PEFT has fewer

    changed = arguments(
        lora_r=3, lora_alpha=5, lora_dropout=0.25, use_rslora=True, use_dora=True, init_lora_weights="gaussian",
        lora_target_modules=["q_proj"], lora_exclude_modules=["x"], lora_target_parameters=["y"], lora_bias="all",
        lora_layers_to_transform=[1], lora_layers_pattern="layers", lora_rank_pattern={"q_proj": 2},
        lora_alpha_pattern={"q_proj": 7}, lora_modules_to_save=["norm"], lora_trainable_token_indices=[3],
        lora_ensure_weight_tying=True,
    )  # fmt: skip
    made, default = lora_config(changed), LoraConfig()
    assert [name for name in sorted(exposed) if getattr(made, name) == getattr(default, name)] == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"q_proj", "v_proj"}),
        ({"lora_target_modules": "all-linear", "lora_exclude_modules": ["down_proj", "up_proj"]},
         {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"}),
        ({"lora_target_modules": r".*\.(k|o)_proj"}, {"k_proj", "o_proj"}),
    ],
)  # fmt: skip
def test_targets_are_lists_expressions_or_all_linear(settings, expected):
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in adapted(**settings).named_modules()
             if name.endswith("lora_A")}  # fmt: skip
    assert names == expected


def test_each_option_is_honoured_by_the_model_that_is_built():
    def layer(model, block=0):
        return model.get_base_model().model.layers[block].self_attn.q_proj

    q = {"lora_target_modules": ["q_proj"], "lora_r": 4, "lora_alpha": 8}
    assert layer(adapted(**q)).scaling["default"] == 2
    assert layer(adapted(**q, use_rslora=True)).scaling["default"] == 4
    assert layer(adapted(**q, lora_rank_pattern={r"layers\.1\..*q_proj": 2}), 1).r["default"] == 2
    assert layer(adapted(**q, lora_alpha_pattern={"q_proj": 4})).scaling["default"] == 1
    assert "default" in layer(adapted(**q, use_dora=True)).lora_magnitude_vector
    one = adapted(**q, lora_layers_to_transform=[1])
    assert not hasattr(layer(one), "lora_A")
    assert hasattr(layer(one, 1), "lora_A")
    trained = {name for name, p in adapted("phi", **q, lora_bias="all").named_parameters() if p.requires_grad}
    assert any(name.endswith("fc1.bias") for name in trained)
    trained = {name for name, p in adapted("phi", **q, lora_bias="lora_only").named_parameters() if p.requires_grad}
    assert any(name.endswith("q_proj.base_layer.bias") for name in trained)
    assert not any(name.endswith("fc1.bias") for name in trained)
    experts = {"lora_target_parameters": ["mlp.experts.gate_up_proj"], "lora_dropout": 0.0}
    assert any("experts" in name for name, p in adapted("mixtral", **q | experts).named_parameters() if p.requires_grad)
    tokens = adapted("llama_tied", **q, lora_trainable_token_indices=[3, 5])
    assert next(p for n, p in tokens.named_parameters() if "trainable_tokens" in n).shape == (2, 32)
    tied = adapted("llama_tied", **q, lora_modules_to_save=["embed_tokens"], lora_ensure_weight_tying=True)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    plain = adapted(**q)
    for start in ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"):
        other = adapted(**q, init_lora_weights=start)
        assert not torch.equal(layer(other).lora_A["default"].weight, layer(plain).lora_A["default"].weight)
        if start != "orthogonal":  # whose first step is not at the base
            assert torch.allclose(logits(other), logits(plain), atol=1e-4)


def test_a_recipes_lists_stay_as_they_were_given():
    args = arguments(lora_modules_to_save=["embed_tokens"], lora_ensure_weight_tying=True)
    get_peft_model(tiny_model("llama_tied"), lora_config(args))
    assert args.lora_modules_to_save == ["embed_tokens"]


def test_adapters_are_drawn_from_the_seed(base, tiny_tokenizer):
    def drawn(seed):
        torch.manual_seed(0 if seed else 1)  # whatever was drawn before
        args = arguments(save_base, lora_target_modules=["q_proj"])
        model = get_peft_model(load_model(args, tiny_tokenizer, seed=seed), lora_config(args))
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    save_base = base("llama").parent / "llama300"
    tiny_model(vocab_size=300).save_pretrained(save_base)
    first, again, other = drawn(5), drawn(5), drawn(6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ----------------------------------------------------------------------------------------------- fewer bits, sharding


def test_four_and_eight_bits_need_peft_and_bitsandbytes(tiny_tokenizer, monkeypatch):
    with pytest.raises(RecipeError, match="Add use_peft: true"):
        ModelArguments(model_name_or_path="x", load_in_4bit=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # whatever is installed here
    for key in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(RecipeError, match=rf"{key}=True.*pip install bitsandbytes"):
            load_model(arguments(**{key: True}), tiny_tokenizer)
    with pytest.raises(RecipeError, match=r"use_peft=True.*pip install peft"):
        lora_config(arguments())


def test_the_format_of_quantised_weights_is_that_of_the_recipe(monkeypatch):
    monkeypatch.setattr(adapters, "require", lambda package, setting: None)
    assert quantisation_options(arguments()) == {}
    four = quantisation_options(arguments(load_in_4bit=True))["quantization_config"]
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    other = arguments(load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=False)
    four = quantisation_options(other)["quantization_config"]
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("fp4", False)
    eight = quantisation_options(arguments(load_in_8bit=True))["quantization_config"]
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)


@pytest.mark.parametrize("setting", ["load_in_4bit: true", "load_in_8bit: true", "init_lora_weights: pissa"])
@pytest.mark.parametrize(("stage", "is_refused"), [(2, False), (3, True)])
def test_what_cannot_be_sharded_is_refused_with_zero_3(tmp_path, setting, stage, is_refused):
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    path = tmp_path / "r.yaml"
    path.write_text(f"model_name_or_path: x/y\ndataset: builtin\nuse_peft: true\n{setting}\n")
    given = ["--deepspeed", str(tmp_path / "ds.json"), "--use_cpu", "--bf16", "false"]
    if is_refused:
        with pytest.raises(RecipeError, match=rf"{setting.partition(':')[0]}.*ZeRO stage 3.*ZeRO-2"):
            load_recipe(path, given, dry_run=True)
    else:
        load_recipe(path, given, dry_run=True)


@pytest.mark.parametrize("setting", ["load_in_8bit: true", "init_lora_weights: olora"])
def test_what_cannot_be_sharded_is_refused_with_fsdp(tmp_path, setting, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model_name_or_path: x/y\ndataset: builtin\nuse_peft: true\nuse_cpu: true\nbf16: false\n{setting}\n"
    )
    load_recipe(path, dry_run=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RecipeError, match=rf"{setting.partition(':')[0]}.*FSDP.*ZeRO-2"):
        load_recipe(path, dry_run=True)


# ----------------------------------------------------------------------------------------- starts that use the base


def trained(folder, base, tokenizer, resume=None, **settings):
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    trainer = MatrixTrainer(
        model,
        MatrixConfig(**config(folder, max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=1)),
        train_dataset=rows(8),
        processing_class=tokenizer,
        peft_config=lora_config(arguments(base, **settings)),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder))
    return trainer.model


PISSA = {"init_lora_weights": "pissa", "lora_r": 4}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {**PISSA, "lora_target_modules": "all-linear", "lora_rank_pattern": {"q_proj": 2}}),
        ("llama", {"init_lora_weights": "pissa_niter_2", "lora_r": 4}),
        ("llama_tied", {"init_lora_weights": "olora", "lora_r": 4, "lora_modules_to_save": ["lm_head"]}),
        ("gpt2", {**PISSA, "lora_bias": "all"}),
    ],
)
def test_pissa_is_saved_for_the_unchanged_base_and_resumes_to_the_bit(name, settings, base, tmp_path, tiny_tokenizer):
    model = trained(tmp_path / "run", base(name), tiny_tokenizer, **settings)
    expected = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(base(name))
    assert (expected - logits(plain)).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(plain, tmp_path / "run")
    assert loaded.peft_config["default"].init_lora_weights is True
    assert torch.allclose(logits(loaded), expected, atol=1e-5 * expected.abs().max())
    again = trained(tmp_path / "again", base(name), tiny_tokenizer, tmp_path / "run" / "checkpoint-1", **settings)
    assert torch.equal(logits(again), expected)


def test_pissa_resumes_where_the_weights_were_decomposed_a_little_differently(base, tmp_path, tiny_tokenizer):
    """As on another machine: the base is what the checkpoint's adapters were trained on, not what was computed here."""
    settings = {**PISSA, "init_lora_weights": "pissa_niter_0"}  # so rough that it depends on the random numbers
    model = trained(tmp_path / "run", base("llama"), tiny_tokenizer, **settings)
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(base("llama")), lora_config(arguments(**settings)))
    adapters.keep_base_unchanged(fresh)
    fresh.load_adapter(str(tmp_path / "run"), "default", is_trainable=True)
    assert torch.allclose(logits(fresh), logits(model), atol=1e-5 * logits(model).abs().max())
    fresh.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base("llama")), tmp_path / "again")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5 * logits(model).abs().max())


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_pissa_that_could_not_be_saved_is_refused_before_training(change, tmp_path, tiny_tokenizer):
    made = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": "pissa", "r": 4, **change})
    with pytest.raises(RecipeError, match="init_lora_weights"):
        MatrixTrainer(
            tiny_model(), MatrixConfig(**config(tmp_path)), train_dataset=rows(8), processing_class=tiny_tokenizer,
            peft_config=made,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"use_dora": True}),
        ("llama_tied", {"lora_trainable_token_indices": [3, 5]}),
        ("llama_tied", {"lora_modules_to_save": ["embed_tokens"], "lora_ensure_weight_tying": True}),
        ("mixtral", {"lora_target_parameters": ["mlp.experts.gate_up_proj"], "lora_dropout": 0.0}),
    ],
)
def test_a_saved_adapter_gives_the_logits_that_the_loss_reads(name, settings, base, tmp_path, tiny_tokenizer):
    model = trained(tmp_path / "run", base(name), tiny_tokenizer, lora_target_modules=["q_proj"], **settings)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base(name)), tmp_path / "run")
    assert torch.allclose(logits(loaded), expected, atol=1e-6)
    ids = torch.arange(3, 23).unsqueeze(0)
    out = model.get_base_model()(input_ids=ids, labels=ids, matrix_loss=True)
    own = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:], reduction="none")
    assert torch.allclose(out.cross_entropy[0], own, rtol=1e-4, atol=1e-5)
