"""The model's weights (model/load.py): random or from a checkpoint, float32 by default, with strict settings."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from matrix_llm.config import ModelArguments, RecipeError
from matrix_llm.model.load import (
    build_config,
    check_generation_settings,
    load_model,
    position_limit,
    repair_generation_settings,
)
from matrix_llm.model.tokenizer import load_tokenizer
from tests.support.checkpoints import save_llama, scratch


def test_from_scratch_model_repeats_with_the_seed_and_can_be_loaded_again(tmp_path, tiny_tokenizer):
    first, second, other = (load_model(scratch(), tiny_tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.shape == (300, 16)
    assert first.dtype == torch.float32
    assert (first.config.bos_token_id, first.config.eos_token_id, first.config.pad_token_id) == (0, 1, 2)
    assert first.generation_config.eos_token_id == 1
    first.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, first.lm_head.weight)


def test_a_file_of_weights_that_is_cut_off_is_refused_in_one_line(tmp_path, tiny_tokenizer):
    path = save_llama(tmp_path, rows=300)
    file = Path(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match=r"model_name_or_path=.*cannot be read: .*incomplete"):
        load_model(ModelArguments(model_name_or_path=path), tiny_tokenizer)


def test_master_weights_of_a_bf16_checkpoint_are_float32_unless_named(tmp_path, tiny_tokenizer):
    path = save_llama(tmp_path, rows=300, dtype=torch.bfloat16)
    assert load_model(ModelArguments(model_name_or_path=path), tiny_tokenizer).dtype == torch.float32
    assert load_model(ModelArguments(model_name_or_path=path, dtype="bfloat16"), tiny_tokenizer).dtype == torch.bfloat16
    assert load_model(ModelArguments(model_name_or_path=path, dtype="auto"), tiny_tokenizer).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "lama"}, "no architecture is called 'lama'. Did you mean"),
        ({"hiden_size": 8}, "'hiden_size' is not a setting of a llama model. Did you mean hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 10}, "vocab_size=10 .*Remove vocab_size"),
    ],
)
def test_misspelt_model_config_is_refused(changes, said, tiny_tokenizer):
    with pytest.raises(RecipeError, match=said):
        build_config(scratch(**changes), tiny_tokenizer)


@pytest.mark.parametrize("name", ["./no/such/model", "no-such-org/no-such-model"])
def test_missing_model_is_one_clear_line(name, tiny_tokenizer):
    args = ModelArguments(model_name_or_path=name)
    for load in (lambda: load_tokenizer(args), lambda: load_model(args, tiny_tokenizer)):
        with pytest.raises(RecipeError, match="_name_or_path=") as error:
            load()
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_sampling_settings_without_do_sample_do_not_stop_the_run_from_saving(tmp_path, tiny_tokenizer):
    """Llama-2-chat and Vicuna were published so; transformers reads such a file; before 5.24 it refused to write it."""
    path = save_llama(tmp_path / "base", rows=300)
    file = Path(path, "generation_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.9, "top_p": 0.6}))
    model = load_model(ModelArguments(model_name_or_path=path), tiny_tokenizer)
    repair_generation_settings(model)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.9, 0.6, True)


def test_a_model_that_says_it_does_not_sample_is_not_made_to(tmp_path, tiny_tokenizer):
    path = save_llama(tmp_path / "base", rows=300)
    file = Path(path, "generation_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": False, "top_k": 20}))
    model = load_model(ModelArguments(model_name_or_path=path), tiny_tokenizer)
    repair_generation_settings(model)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert (saved.get("do_sample"), saved.get("top_k")) == (False, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"length_penalty": 2.0}', "length_penalty"),
        ('{"max_new_tokens": -1}', "max_new_tokens"),
        ('{"temperature": 0.6', "is not JSON"),
    ],
)
def test_generation_settings_that_cannot_be_saved_are_refused_before_weights_are_read(tmp_path, content, said):
    path = save_llama(tmp_path / "base", rows=300)
    Path(path, "generation_config.json").write_text(content)
    Path(path, "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=rf"generation_config\.json of .*{said}.*Correct the file"):
        check_generation_settings(ModelArguments(model_name_or_path=path))


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("gpt2", {"n_positions": 77}, 77),
        ("llama", {"max_position_embeddings": 77}, 77),
        ("mistral", {"max_position_embeddings": 77, "sliding_window": 8}, 77),
        ("roberta", {"max_position_embeddings": 77}, 75),
        ("llama", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        ("llama", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 256),
        ("qwen2", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 256),
        (  # it may hold the scaling already
            "qwen2",
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 512,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            512,
        ),
        ("bloom", {}, None),
        ("mpt", {}, None),
        ("mamba", {}, None),
        ("nemotron_h", {}, None),
        ("falcon", {"alibi": True}, None),
        ("falcon", {"max_position_embeddings": 77}, 77),
    ],
)
def test_the_number_of_positions_is_found_under_every_name_and_with_its_scaling(model_type, settings, expected):
    assert position_limit(AutoConfig.for_model(model_type, **settings)) == expected
