"""Python code that comes with a model is not run, and nobody is asked, unless a flag or a setting says so."""

import json

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from eval.gsm8k import main as evaluate
from matrix_llm.merge import main as merge
from matrix_llm.train import main as train
from tests.support.tiny import TINY

CODE = """
from pathlib import Path
Path(__file__).resolve()
Path({ran!r}).mkdir(exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class Config(LlamaConfig):
    model_type = "their_own"


class Model(LlamaForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path):
    """transformers asks on standard input; a user in a hurry says yes."""
    questions = []

    def yes(prompt=""):
        questions.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return questions


def change(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture(params=["config", "tokenizer"])
def hostile(request, model, tmp_path):
    """A model whose configuration, or whose tokenizer, is a class of its own."""
    (model / "their_code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    if request.param == "config":
        own = {"AutoConfig": "their_code.Config", "AutoModelForCausalLM": "their_code.Model"}
        change(model / "config.json", model_type="their_own", auto_map=own)
    else:
        own = {"AutoTokenizer": [None, "their_code.Tokenizer"]}
        change(model / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=own)
    return model


def by_train(model, tmp_path, *flags):
    recipe = {k: v for k, v in TINY.items() if k not in ("model_config", "tokenizer_vocab_size")}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "max_steps": 1, "model_name_or_path": str(model), "output_dir": str(tmp_path / "o")})
    )
    return train([str(tmp_path / "recipe.yaml"), *flags])


def by_eval(model, tmp_path, *flags):
    few = ("--prompt", "plain", "--data", "builtin", "--limit", "1", "--max_tokens", "2", "--engine", "transformers")
    return evaluate(["--model", str(model), "--output_dir", str(tmp_path / "scores"), *few, *flags])


def by_merge(model, tmp_path, *flags):
    return merge([str(tmp_path / "adapter"), str(tmp_path / "merged"), *flags])


@pytest.fixture
def adapter(model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )


@pytest.mark.parametrize("command", [by_train, by_eval, by_merge])
def test_a_models_own_code_is_refused_in_one_line_without_a_question(
    adapter, hostile, command, asked, tmp_path, capsys
):
    capsys.readouterr()
    assert command(hostile, tmp_path) in (1, 2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "Python code of its own" in error[0]
    assert "trust" in error[0]
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_the_flag_is_the_way_out(model, asked, tmp_path):
    (model / "their_code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    own = {"AutoConfig": "their_code.Config", "AutoModelForCausalLM": "their_code.Model"}
    change(model / "config.json", model_type="their_own", auto_map=own)
    assert by_eval(model, tmp_path, "--trust_remote_code") == 0
    assert (tmp_path / "ran").exists()
    assert not asked
