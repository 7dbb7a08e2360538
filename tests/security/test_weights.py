"""Weights that are not whole, not finite or not the model's own stop training and evaluation in one line."""

import importlib.util
import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eval.generate.models import check_files, check_values, locate
from eval.gsm8k import main as evaluate
from matrix_llm.base.errors import CheckpointError, EvalError
from matrix_llm.merge import main as merge
from matrix_llm.train import main as train
from tests.support.tiny import TINY, tiny_model
from tests.support.tiny import train as train_tiny

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def change(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def configure(model, **settings):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def without(name):
    return lambda model: change(model / "model.safetensors", lambda weights: weights.pop(name))


def with_value(name, value):
    return lambda model: change(model / "model.safetensors", lambda weights: weights[name].view(-1)[3:4].fill_(value))


def with_another(name, shape=(4, 64)):
    return lambda model: change(model / "model.safetensors", lambda weights: weights.update({name: torch.zeros(shape)}))


def sharded(damage):
    def apply(model):
        damage(model)
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="60kB")
        (model / "model.safetensors").unlink(missing_ok=True)

    return apply


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "a layer's weight is missing": (without(UP), UP),
    "the head is missing": (without("lm_head.weight"), "lm_head.weight"),
    "the embeddings are missing": (without("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "the last norm is missing": (without("model.norm.weight"), "model.norm.weight"),
    "NaN": (with_value(UP, float("nan")), UP),
    "infinity in the head": (with_value("lm_head.weight", float("inf")), "lm_head.weight"),
    "NaN in a shard": (sharded(with_value(UP, float("nan"))), UP),
    "a layer too many": (lambda model: configure(model, num_hidden_layers=1), "model.layers.1."),
    "a layer too few": (lambda model: configure(model, num_hidden_layers=3), "model.layers.2."),
    "a bias that the configuration does not have": (with_another("model.layers.0.self_attn.q_proj.bias", 64), "q_proj"),
    "a bias of the head": (with_another("lm_head.bias", 300), "lm_head.bias"),
    "another shape": (lambda model: configure(model, intermediate_size=96), ""),
    "another width": (lambda model: configure(model, hidden_size=32), ""),
}


@pytest.fixture(params=DAMAGES, ids=lambda name: name.replace(" ", "_"))
def damaged(request, model):
    damage, name = DAMAGES[request.param]
    damage(model)
    return model, name


def by_train(model, tmp_path):
    recipe = {k: v for k, v in TINY.items() if k not in ("model_config", "tokenizer_vocab_size")}
    settings = {"max_steps": 1, "builtin_rows": 4, "model_name_or_path": str(model)}
    settings["output_dir"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **settings}))
    return train([str(tmp_path / "recipe.yaml")])


def by_eval(model, tmp_path):
    few = ("--prompt", "plain", "--data", "builtin", "--limit", "1", "--max_tokens", "2", "--engine", "transformers")
    return evaluate(["--model", str(model), "--output_dir", str(tmp_path / "scores"), *few])


def by_vllm(model, tmp_path):
    few = ("--prompt", "plain", "--data", "builtin", "--limit", "1", "--max_tokens", "2", "--engine", "vllm")
    return evaluate(["--model", str(model), "--output_dir", str(tmp_path / "scores"), *few])


def error_of(capsys):
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("command", [by_train, by_eval])
def test_damaged_weights_are_one_line(command, damaged, tmp_path, capsys):
    model, name = damaged
    capsys.readouterr()
    assert command(model, tmp_path) in (1, 2)
    error = error_of(capsys)
    assert name in error
    assert str(model) in error


def test_damaged_weights_are_found_for_an_engine_that_loads_the_files_itself(damaged):
    model, name = damaged
    with pytest.raises(EvalError, match=rf"--model {model}.*{name}"):
        check_files(locate(str(model)))


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("damage", [without(UP), with_value(UP, float("nan"))], ids=["missing", "NaN"])
def test_vllm_is_not_started_on_damaged_weights(damage, model, tmp_path, capsys, monkeypatch):
    damage(model)
    monkeypatch.setattr("vllm.LLM", None)  # calling it would be another error
    assert by_vllm(model, tmp_path) == 1
    assert UP in error_of(capsys)


@pytest.mark.parametrize("command", [by_train, by_eval])
@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "mtp.layers.0.weight"])
def test_another_head_is_said_and_left_out(command, name, model, tmp_path, capsys, caplog):
    with_another(name)(model)
    assert command(model, tmp_path) == 0
    shown = capsys.readouterr()
    assert name in shown.out + shown.err + caplog.text


@pytest.mark.parametrize("command", [by_train, by_eval])
def test_tied_weights_and_old_buffers_are_no_gaps(command, model, tmp_path):
    without("lm_head.weight")(model)
    configure(model, tie_word_embeddings=True)
    with_another("model.layers.0.self_attn.rotary_emb.inv_freq", 16)(model)
    assert command(model, tmp_path) == 0
    check_files(locate(str(model)))


@pytest.fixture
def adapter(model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model)
    settings = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_whole_is_evaluated(adapter, tmp_path):
    check_files(locate(str(adapter)))
    assert by_eval(adapter, tmp_path) == 0


@pytest.mark.parametrize("damage", ["missing", "unexpected", "NaN", "NaN in the base", "the base lacks a tensor"])
def test_a_damaged_adapter_or_base_is_one_line(damage, adapter, model, tmp_path, capsys):
    file = adapter / "adapter_model.safetensors"
    name = next(name for name in load_file(file) if "layers.1" in name)
    if damage == "missing":
        change(file, lambda weights: weights.pop(name))
    elif damage == "unexpected":
        change(file, lambda weights: weights.update({name.replace("layers.1", "layers.7"): torch.zeros(2)}))
    elif damage == "NaN":
        change(file, lambda weights: weights[name].fill_(float("nan")))
    elif damage == "NaN in the base":
        with_value(UP, float("nan"))(model)
    else:
        without(UP)(model)
    with pytest.raises(EvalError):
        check_files(locate(str(adapter)))
    capsys.readouterr()
    assert by_eval(adapter, tmp_path) == 1
    error_of(capsys)
    assert merge([str(adapter), str(tmp_path / "merged")]) == 2
    error_of(capsys)


def test_values_are_checked_for_an_engine_that_loads_the_files_itself(adapter, model):
    check_values(locate(str(adapter)))
    change(adapter / "adapter_model.safetensors", lambda weights: next(iter(weights.values())).fill_(float("nan")))
    with pytest.raises(EvalError, match=r"adapter_model\.safetensors holds NaN"):
        check_values(locate(str(adapter)))
    with_value(UP, float("-inf"))(model)
    with pytest.raises(EvalError, match=r"model\.safetensors holds NaN or infinity"):
        check_values(locate(str(model)))


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_checkpoint_of_other_weights_is_not_resumed(damage, tmp_path, tiny_tokenizer):
    train_tiny(tmp_path / "run", tiny_tokenizer, max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    if damage == "missing":
        change(checkpoint / "model.safetensors", lambda weights: weights.pop("model.norm.weight"))
    else:
        change(checkpoint / "model.safetensors", lambda weights: weights.update({"model.extra": torch.zeros(2)}))
    trainer = train_tiny(tmp_path / "other", tiny_tokenizer, max_steps=2)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 (lacks|holds).*model\.(norm|extra)"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("tied", ["llama", "llama_tied"])
def test_a_checkpoint_of_the_same_weights_is_resumed(tied, tmp_path, tiny_tokenizer):
    model = {"model": tiny_model(tied)}
    train_tiny(tmp_path / "run", tiny_tokenizer, max_steps=1, save_strategy="steps", save_steps=1, **model)
    trainer = train_tiny(tmp_path / "other", tiny_tokenizer, tiny_model(tied), max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert trainer.state.global_step == 2
