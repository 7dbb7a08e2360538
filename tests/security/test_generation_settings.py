"""A greedy text depends on the weights alone, whatever the generation_config.json of the model says."""

import json

import pytest
from transformers import AutoModelForCausalLM

from eval.generate.generation import Decoding, Request
from eval.generate.models import load_tokenizer, locate, stop_tokens
from eval.generate.transformers_engine import TransformersEngine
from eval.gsm8k import main
from matrix_llm.base.errors import EvalError
from matrix_llm.run.decode import generate_greedy

PROMPTS = ["Mia has 3 pens.", "Question: how many books?"]
SETTINGS = [
    {"suppress_tokens": list(range(3, 280))}, {"begin_suppress_tokens": list(range(3, 280))},
    {"sequence_bias": [[[40], 1000.0]]}, {"bad_words_ids": [[each] for each in range(3, 280)]},
    {"guidance_scale": 5.0}, {"max_time": 1e-9}, {"forced_bos_token_id": 5}, {"forced_eos_token_id": 7},
    {"min_new_tokens": 9}, {"exponential_decay_length_penalty": [1, 1e6]}, {"repetition_penalty": 50.0},
    {"encoder_repetition_penalty": 0.01}, {"encoder_no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1},
    {"num_beams": 4, "length_penalty": 9.0}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"do_sample": True, "temperature": 9.0, "top_k": 0}, {"penalty_alpha": 0.9, "top_k": 4}, {"dola_layers": "high"},
    {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"stop_strings": ["a", "e"]}, {"max_length": 3},
    {"cache_implementation": "nonsense"}, {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0}},
    {"renormalize_logits": True, "remove_invalid_values": True}, {"return_dict_in_generate": True},
    {"output_scores": True, "output_logits": True}, {"use_cache": False}, {"num_return_sequences": 3},
    {"custom_generate": "theirs"}, {"token_healing": True}, {"typical_p": 0.01, "do_sample": True},
    {"low_memory": True}, {"constraints": [1]}, {"force_words_ids": [[5]]}, {"prefill_chunk_size": 1},
    {"is_assistant": True}, {"early_stopping": "never", "num_beams": 2},
    {"unheard_of": [1, 2]}, {"decoder_start_token_id": 4},
]  # fmt: skip


def answers(model, tokenizer):
    """The texts of eval's engine and of training's own decoding."""
    engine = TransformersEngine(model, tokenizer)
    requests = [Request(f"q/{i}", 0, tuple(tokenizer(text)["input_ids"]), 12) for i, text in enumerate(PROMPTS)]
    texts = [each.response for each in engine.generate(requests, Decoding())]
    return texts, generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=2)


@pytest.fixture(scope="module")
def expected(tiny_llama, tiny_tokenizer):
    return answers(tiny_llama(), tiny_tokenizer)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_no_setting_of_the_model_changes_a_greedy_text(settings, model, tiny_tokenizer, expected):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model)
    except (ValueError, TypeError):  # transformers does not take it: eval says so in one line
        assert main(["--model", str(model), "--data", "builtin", "--limit", "1", "--engine", "transformers"]) == 1
        return
    before = loaded.generation_config.to_dict()
    assert answers(loaded, tiny_tokenizer) == expected
    assert loaded.generation_config.to_dict() == before


@pytest.mark.parametrize(("said", "stops"), [(7, [1, 7]), ([7, 9], [1, 7, 9]), (None, [1]), (-1, [1]), (10**9, [1])])
def test_what_ends_a_text_is_kept(said, stops, model):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": said, "suppress_tokens": [1, 7]}))
    source = locate(str(model))
    engine = TransformersEngine.load(source, dtype="float32")
    assert stop_tokens(source, engine.tokenizer) == stops
    assert TransformersEngine(engine.model, engine.tokenizer)._end_tokens == engine._end_tokens == tuple(stops)


def test_a_model_without_the_file_ends_as_its_configuration_says(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 8]}))
    (model / "generation_config.json").unlink()
    assert stop_tokens(locate(str(model)), load_tokenizer(locate(str(model)))) == [1, 8]


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "a"}', '{"eos_token_id": [1.5]}', '{"eos_token_id": {}}', "[", "[]"]
)
def test_a_file_that_names_no_token_is_one_line(content, model, capsys, tmp_path):
    (model / "generation_config.json").write_text(content)
    arguments = ["--model", str(model), "--data", "builtin", "--limit", "1", "--output_dir", str(tmp_path / "scores")]
    assert main([*arguments, "--prompt", "plain", "--max_tokens", "2", "--engine", "transformers"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    with pytest.raises(EvalError, match="generation"):
        stop_tokens(locate(str(model)), load_tokenizer(locate(str(model))))
