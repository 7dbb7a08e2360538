"""A LoRA adapter merged into its base: the logits, the files, and what is refused (publish/merge.py)."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from matrix_llm.merge import main
from tests.support.finished_run import change_recipe
from tests.support.tiny import tiny_model

IDS = torch.arange(3, 23).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    """Write a base of 300 tokens and an adapter whose every weight is changed, as by training."""

    def adapter(name="llama", dtype=torch.float32, **settings):
        base, folder = tmp_path / "base", tmp_path / "adapter"
        tiny_model(name, vocab_size=300).to(dtype).save_pretrained(base)
        given = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**given))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return adapter


def merged(folder, tmp_path, *arguments):
    """(the merged model, the adapter on its base)"""
    assert main([str(folder), str(tmp_path / "out"), *arguments]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "out"), PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    ("name", "settings", "is_tied"),
    [
        ("llama", {}, False),
        ("llama", {"use_dora": True}, False),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, False),
        ("llama", {"init_lora_weights": "pissa"}, False),  # as PEFT itself saves it
        ("phi", {"bias": "all"}, False),
        ("llama", {"modules_to_save": ["lm_head", "norm"]}, False),
        ("llama_tied", {"modules_to_save": ["lm_head"]}, False),
        ("llama_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}, False),
        ("llama_tied", {"trainable_token_indices": [3, 5]}, True),
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]}, False),
        ("gpt2", {"target_modules": ["c_attn"]}, True),
    ],
)
def test_the_merged_model_gives_the_adapters_logits(make, tmp_path, name, settings, is_tied):
    model, adapted = merged(make(name, **settings), tmp_path)
    expected = logits(adapted)
    with adapted.disable_adapter():
        assert (expected - logits(adapted)).abs().max() > 1e-2 * expected.abs().max()
    assert torch.allclose(logits(model), expected, atol=1e-5 * expected.abs().max())
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied
    # what other readers look at
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == is_tied
    assert ("lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")) == is_tied


def test_older_readers_find_the_rotary_base_and_the_tokenizer_class(make, tmp_path):
    merged(make(), tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 10000
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"].endswith("Fast")


def test_the_folder_needs_nothing_else(make, tmp_path, tiny_tokenizer, capsys):
    folder = make()
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 7}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    model, _ = merged(folder, tmp_path)
    out = tmp_path / "out"
    assert {file.suffix for file in out.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    assert not list(out.glob("adapter*"))
    saved = AutoTokenizer.from_pretrained(out)
    assert (saved.chat_template, len(saved)) == (tokenizer.chat_template, len(tiny_tokenizer))
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.temperature, generation.do_sample) == (0.7, True)  # else it could not be saved
    assert generation.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    card = (out / "README.md").read_text()
    line = "complete weights in float32: the LoRA adapter adapter, merged into base"
    assert line in card
    assert line in capsys.readouterr().out
    assert "library_name: transformers" in card
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_finished_run_keeps_its_card_as_that_of_a_complete_model(adapter_run, tmp_path, tiny_llama):
    change_recipe(adapter_run, load_in_4bit=True)
    assert main([str(adapter_run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "lora" not in card.split("---")[1]
    assert "merged into base. It was trained with load_in_4bit" in card
    assert "before quantisation" in card
    assert "A LoRA adapter for" not in card
    assert (tmp_path / "out" / "loss.png").is_file()
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize(("arguments", "dtype"), [([], torch.bfloat16), (["--dtype", "float32"], torch.float32)])
def test_the_weights_have_the_bases_dtype_or_the_one_that_is_asked_for(make, tmp_path, arguments, dtype):
    merged(make(dtype=torch.bfloat16), tmp_path, *arguments)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert str(dtype).removeprefix("torch.") in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_has_moved_is_named(make, tmp_path, capsys):
    folder = make()
    (tmp_path / "base").rename(tmp_path / "moved")
    assert main([str(folder), str(tmp_path / "out")]) == 2
    assert "--base-model" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "out"), "--base-model", str(tmp_path / "moved")]) == 0


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def to_pickle(folder, tmp_path):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def name_no_base(folder, tmp_path):
    edit(folder / "adapter_config.json", base_model_name_or_path=None)


def quantise_base(folder, tmp_path):
    edit(tmp_path / "base" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def add_nan(folder, tmp_path):
    change_weights(folder, lambda weights: next(iter(weights.values())).fill_(float("nan")))


def remove_weight(folder, tmp_path):
    change_weights(folder, lambda weights: weights.pop(next(iter(weights))))


def add_weight(folder, tmp_path):
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    change_weights(folder, lambda weights: weights.update({name: torch.ones(4, 32)}))


def exchange_base(folder, tmp_path):
    tiny_model(vocab_size=300, hidden_size=64).save_pretrained(tmp_path / "base")


def fill_out(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")


REFUSED = [
    (to_pickle, "safetensors.*pickles"),
    (name_no_base, "names no base model.*--base-model"),
    (quantise_base, "quantised.*full precision.*--base-model"),
    (add_nan, "NaN"),
    (remove_weight, "holds no base_model.*lora_.*right base"),
    (add_weight, "no place for base_model.*layers.7"),
    (exchange_base, "does not fit.*size mismatch.*right base"),
    (fill_out, "not an empty folder.*another place"),
    (lambda f, t: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda f, t: edit(f / "adapter_config.json", peft_type="IA3"), "IA3.*only LORA"),
    (lambda f, t: edit(f / "adapter_config.json", init_lora_weights="pissa_niter_4"), "pissa_niter_4.*no file holds"),
    (lambda f, t: edit(f / "adapter_config.json", init_lora_weights="loftq"), "loftq.*no file holds"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line_and_leaves_nothing(make, tmp_path, capsys, damage, message):
    folder = make()
    damage(folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(folder), str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_an_adapter_says_where_one_is(make, tmp_path, capsys):
    folder = make()
    for run, message in ((tmp_path, "adapter do"), (tmp_path / "base", "complete model"), (tmp_path / "no", "no such")):
        assert main([str(run), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert main(["user/nothing", str(tmp_path / "out")]) == 2
    assert "user/nothing" in capsys.readouterr().err
    assert folder.is_dir()


def test_a_merge_that_changes_the_logits_is_not_written(make, tmp_path, capsys, monkeypatch):
    """PEFT adds an embedding's adapter to the tied LM head as well, if nobody keeps them apart."""
    from matrix_llm.publish import merge as module

    folder = make("llama_tied", target_modules=["embed_tokens", "q_proj"])
    monkeypatch.setattr(module, "_separate_tied_ends", lambda model: None)
    assert main([str(folder), str(tmp_path / "out")]) == 2
    assert "logits differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
