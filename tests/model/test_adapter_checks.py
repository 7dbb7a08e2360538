"""Adapters that cannot be made, match nothing or lie on the LM head are refused without weights or rows."""

import importlib.util
import sys

import pytest
import torch

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import ModelArguments
from matrix_llm.model.adapter_checks import check_adapters
from matrix_llm.train import main
from tests.support.checkpoints import TINY
from tests.support.tiny import ARCHITECTURES, tiny_model


def check(architecture="llama", **settings):
    given = {"model_type": architecture.removesuffix("_tied"), **ARCHITECTURES[architecture]}
    check_adapters(ModelArguments(model_config=given, tokenizer_name_or_path="x", use_peft=True, **settings))


REFUSED = [  # architecture, settings, what is said
    # names that match nothing, each by itself
    ("llama", {"lora_target_modules": ["q_proj", "v_prj"]}, "lora_target_modules: 'v_prj'.*Did you mean v_proj"),
    ("llama", {"lora_target_modules": r".*\.q_poj"}, "lora_target_modules: .*q_poj.*q_proj"),
    ("gpt2", {"lora_target_modules": ["c_attn", "q_proj"]}, "lora_target_modules: 'q_proj'.*there are: c_attn, c_fc"),
    ("llama", {"lora_target_modules": ["q"]}, "lora_target_modules: 'q' matches nothing.*q_proj"),
    ("llama", {"lora_exclude_modules": ["k_prj"]}, "lora_exclude_modules: 'k_prj'.*k_proj"),
    ("llama", {"lora_exclude_modules": ".*k_prj"}, "lora_exclude_modules: '.*k_prj'.*k_proj"),
    ("llama", {"lora_target_modules": ["q_proj"], "lora_exclude_modules": ["q_proj"]}, "exclude_modules"),
    ("llama", {"lora_modules_to_save": ["lm_hed"]}, "lora_modules_to_save: 'lm_hed'.*Did you mean lm_head"),
    ("llama", {"lora_modules_to_save": ["lm_head", "act_fn"]}, "lora_modules_to_save: 'act_fn'"),
    ("llama", {"lora_rank_pattern": {"q_prj": 4}}, "lora_rank_pattern: 'q_prj'.*q_proj"),
    ("llama", {"lora_alpha_pattern": {"q_proj": 2, "k_proj": 4}}, "lora_alpha_pattern: 'k_proj' is not among"),
    ("llama", {"lora_layers_to_transform": [0, 2]}, "lora_layers_to_transform: 2 .*there are: 0, 1"),
    ("llama", {"lora_layers_to_transform": [0], "lora_layers_pattern": "layer"},
     "lora_layers_pattern: 'layer'.*Did you mean layers"),
    ("mixtral", {"lora_target_parameters": ["experts.down_prj"], "lora_dropout": 0.0},
     "lora_target_parameters: 'experts.down_prj'.*down_proj"),
    ("mixtral", {"lora_target_parameters": ["experts.down_proj"]}, "lora_dropout: 0"),
    # the LM head, whatever it is called and however it is selected
    ("llama", {"lora_target_modules": ["q_proj", "lm_head"]}, "LM head.*`lm_head`.*lora_modules_to_save"),
    ("gpt2", {"lora_target_modules": r".*(c_attn|head)"}, "LM head.*`lm_head`"),
    ("llama", {"lora_target_parameters": ["lm_head.weight"], "lora_dropout": 0.0}, "lora_target_parameters.*LM head"),
    ("llama_tied", {"lora_target_modules": ["embed_tokens"], "lora_ensure_weight_tying": True}, "LM head"),
    # settings that would do nothing
    ("llama", {"lora_bias": "all"}, "lora_bias='all'.*Remove it"),
    ("qwen2", {"lora_bias": "lora_only", "lora_target_modules": ["o_proj"]}, "lora_bias='lora_only'.*Remove it"),
    ("llama", {"lora_ensure_weight_tying": True}, "lora_ensure_weight_tying.*two weights"),
    ("llama_tied", {"lora_ensure_weight_tying": True}, "lora_ensure_weight_tying.*leave the embeddings alone"),
    # settings that do not fit the model
    ("llama", {"lora_trainable_token_indices": [3, 96]}, "lora_trainable_token_indices.*0 to 95"),
    ("llama", {"init_lora_weights": "orthogonal", "lora_r": 5}, "even"),
    ("llama", {"init_lora_weights": "pissa", "lora_r": 33}, "init_lora_weights='pissa'.*lora_r to at most 32"),
    ("llama", {"init_lora_weights": "olora", "lora_r": 4, "lora_target_modules": ["embed_tokens"]},
     "init_lora_weights='olora'.*embed_tokens"),
    ("llama", {"lora_target_modules": ["input_layernorm"]}, "LlamaRMSNorm"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "settings", "message"), REFUSED)
def test_adapters_that_would_do_nothing_or_harm_are_refused_by_name(architecture, settings, message):
    with pytest.raises(RecipeError, match=message) as error:
        check(architecture, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_usual_adapters_pass_on_every_architecture(architecture):
    check(architecture, lora_dropout=0.0, lora_target_modules="all-linear")
    check(architecture, lora_dropout=0.0, init_lora_weights="gaussian", lora_target_modules=r".*(q_proj|c_attn)")


def test_a_head_that_is_trained_in_full_passes_beside_its_name_among_the_targets():
    check(lora_target_modules=["q_proj", "lm_head"], lora_modules_to_save=["lm_head"])
    check("mixtral", lora_target_modules=[], lora_target_parameters=["experts.down_proj"], lora_dropout=0.0)


@pytest.mark.parametrize("arguments", [[], ["--dry_run"]])
def test_a_run_refuses_them_before_rows_are_read_or_weights_loaded(arguments, tmp_path, capsys, monkeypatch):
    from matrix_llm.run import prepare

    monkeypatch.setattr(prepare, "prepare_data", lambda *a, **k: pytest.fail("rows were read"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model_config: {TINY}\ntokenizer_vocab_size: 300\ndataset: builtin\nuse_peft: true\nuse_cpu: true\n"
        "bf16: false\nlora_target_modules: [q_proj, v_prj]\n"
    )
    assert main([str(recipe), "--output_dir", str(tmp_path / "run"), *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert "'v_prj'" in errors[0]


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_a_run_without_bitsandbytes_stops_before_rows_and_a_plan_says_so(key, tmp_path, capsys, monkeypatch):
    from matrix_llm.run import prepare

    find_spec = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    tiny_model().save_pretrained(tmp_path / "base")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model_name_or_path: {tmp_path}/base\ndataset: builtin\n"
        f"use_peft: true\nuse_cpu: true\nbf16: false\n{key}: true\n"
    )
    arguments = [str(recipe), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(prepare, "prepare_data", lambda *a, **k: pytest.fail("rows were read"))
    assert main(arguments) == 2
    assert f"{key}=True needs the package bitsandbytes" in capsys.readouterr().err

    monkeypatch.setattr(prepare, "prepare_data", lambda *a, **k: sys.exit(0))
    with pytest.raises(SystemExit):
        main([*arguments, "--dry_run"])
    assert f"a run on this machine would be refused: {key}=True needs" in capsys.readouterr().out


def test_no_weight_is_made_to_look_at_the_adapters(monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    check(lora_target_modules="all-linear", init_lora_weights="pissa", lora_r=4)
    assert made
    assert all(tensor.is_meta for tensor in made)
