"""A saved folder means the same to transformers 4.57 as to transformers 5."""

import json
import os
import subprocess

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GemmaTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from matrix_llm.model.older_readers import add_older_names
from matrix_llm.model.tokenizer import train_tokenizer
from tests.support.paths import SUPPORT
from tests.support.sentences import SENTENCES
from tests.support.tiny import GROUPED, rows, tiny_model, train

OLDER = os.environ.get("MATRIX_LLM_OLDER_PYTHON")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"rope_type": "default", "rope_theta": 1000.0}


def saved(config, folder):
    """config.json of a configuration as a run leaves it."""
    config.save_pretrained(folder)
    add_older_names(folder, None)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {"rope_theta": 5e5}),
        (
            LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 5e5}),
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        (
            AutoConfig.for_model("qwen2", rope_parameters={**YARN, "rope_theta": 1e6}),
            {"rope_theta": 1e6, "rope_scaling": YARN},
        ),
        (
            AutoConfig.for_model("phi", rope_parameters={**SLIDING, "rope_theta": 7.0, "partial_rotary_factor": 0.75}),
            {"rope_theta": 7.0, "partial_rotary_factor": 0.75},
        ),
        (
            GPTNeoXConfig(rope_parameters={"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}),
            {"rotary_emb_base": 7.0, "rotary_pct": 0.5},
        ),
        (
            AutoConfig.for_model(
                "gemma3_text",
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                    "sliding_attention": SLIDING,
                },
            ),
            {"rope_theta": 2e6, "rope_local_base_freq": 1000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            AutoConfig.for_model("olmo2", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}),
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_rotary_embeddings_are_written_under_their_older_names_too(config, expected, tmp_path):
    found = saved(config, tmp_path)
    assert {key: found.get(key) for key in expected} == expected
    assert found["rope_parameters"] == json.loads(config.to_json_string())["rope_parameters"]


def test_every_architecture_with_rotary_embeddings_has_an_older_name_and_reads_as_before(tmp_path):
    seen = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # two need sub-configurations to be built at all
            continue
        rope = getattr(config, "rope_parameters", None)
        if not isinstance(rope, dict) or "rope_theta" not in rope or config.to_dict().get("rope_theta") is not None:
            continue  # the last are younger than 4.57, and have a field called rope_theta of their own
        rope["rope_theta"], seen = 12345.0, seen + 1
        found = saved(config, tmp_path / model_type)
        assert 12345.0 in (found.get("rope_theta"), found.get("rotary_emb_base")), model_type
        read = AutoConfig.from_pretrained(tmp_path / model_type)
        assert {**read.rope_parameters, "type": None} == {**rope, "type": None}, model_type
    assert seen > 80


def test_infinity_is_left_out_where_it_is_the_default_and_kept_where_it_is_not(tmp_path):
    assert "time_step_limit" not in saved(AutoConfig.for_model("mamba2"), tmp_path / "a")
    config = AutoConfig.for_model("mamba2", time_step_limit=(0.5, float("inf")))
    assert saved(config, tmp_path / "b")["time_step_limit"][0] == 0.5


def test_the_run_saves_the_cache_setting_of_its_base_model_with_every_checkpoint(tmp_path, tiny_tokenizer):
    for cached in (True, False):
        out = tmp_path / str(cached)
        trainer = train(out, tiny_tokenizer, tiny_model(use_cache=cached), save_strategy="steps", save_steps=2)
        trainer.save_model(str(out / "final"))
        assert not trainer.model.config.use_cache  # while it trains
        for folder in ("checkpoint-2", "final"):
            assert json.loads((out / folder / "config.json").read_text())["use_cache"] is cached


def tokenizers():
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a"])}
    gemma = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "a", "▁a"])}
    extra = train_tokenizer(SENTENCES, 300)
    extra.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return {
        "trained": train_tokenizer(SENTENCES, 300),
        "extra": extra,
        "llama": LlamaTokenizer(vocab=words, merges=[("▁", "a")]),
        "llama_eos": LlamaTokenizer(vocab=words, merges=[("▁", "a")], add_bos_token=False, add_eos_token=True),
        "gemma": GemmaTokenizer(vocab=gemma, merges=[("▁", "a")]),
    }


@pytest.mark.parametrize("name", ["trained", "extra", "llama", "llama_eos", "gemma"])
def test_a_tokenizer_is_written_for_older_readers_and_reads_as_before(name, tmp_path):
    tokenizer = tokenizers()[name]
    tokenizer.save_pretrained(tmp_path)
    add_older_names(tmp_path, tokenizer)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] != "TokenizersBackend"  # unknown to 4.57
    assert not isinstance(found.get("extra_special_tokens"), list)  # stops 4.57
    if name == "extra":
        assert found["additional_special_tokens"] == ["<|im_end|>"]
    if name.startswith("llama"):
        assert (found["add_bos_token"], found["add_eos_token"]) == (False, name == "llama_eos")
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("a a<|im_end|>")["input_ids"] == tokenizer("a a<|im_end|>")["input_ids"]
    assert (type(read), read.all_special_tokens) == (type(tokenizer), tokenizer.all_special_tokens)


@pytest.mark.slow
@pytest.mark.skipif(OLDER is None, reason="MATRIX_LLM_OLDER_PYTHON names no Python with transformers 4.57")
def test_the_logits_of_a_trained_model_are_the_same_in_the_older_version(tmp_path, tiny_tokenizer):
    """Rows are long enough, and the base frequencies far enough from the defaults, for a wrong one to show."""
    short = {"rope_type": "default", "rope_theta": 300.0}
    rope, llama = {"rope_parameters": short}, {"model_type": "llama", **GROUPED}
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    layers = {"full_attention": short, "sliding_attention": {**short, "rope_theta": 50.0}}
    models = {
        "llama": rope, "qwen3": rope, "gemma2": rope, "granite": rope, "cohere": rope, "mixtral": rope,
        "gpt2": {}, "opt": {},
        "llama_scaled": {**llama, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        "llama_linear": {**llama, "rope_parameters": linear},
        "qwen2": {"rope_parameters": {**YARN, "rope_theta": 900.0}},
        "mistral": {**rope, "sliding_window": 8},
        "phi": {"rope_parameters": {**short, "partial_rotary_factor": 0.25}},
        "gpt_neox": {**llama, "model_type": "gpt_neox", "rope_parameters": {**short, "partial_rotary_factor": 0.5}},
        "olmo2": {**llama, "model_type": "olmo2", **rope},
        "gemma3": {
            **llama, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8, "rope_parameters": layers,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    }  # fmt: skip
    ids, expected = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(0)).tolist(), {}
    for name, changes in models.items():
        folder = tmp_path / name
        positions = {} if name == "gpt2" else {"max_position_embeddings": 64}
        model = tiny_model("llama" if "model_type" in changes else name, **positions, **changes)
        trainer = train(tmp_path / "run", tiny_tokenizer, model, rows(8), max_steps=1)
        trainer.save_model(str(folder))
        (folder / "inputs.json").write_text(json.dumps({"ids": ids, "text": SENTENCES[0]}))
        with torch.no_grad():
            expected[str(folder)] = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    script = [OLDER, str(SUPPORT / "older_logits.py"), str(tmp_path / "out.json"), *expected]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(script, check=True, env=env)
    found = json.loads((tmp_path / "out.json").read_text())
    for folder, logits in expected.items():
        got = torch.tensor(found[folder]["logits"])
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4, msg=lambda text, at=folder: f"{at}: {text}")
        assert found[folder]["use_cache"]
        assert found[folder]["text_ids"] == tiny_tokenizer(SENTENCES[0])["input_ids"]
