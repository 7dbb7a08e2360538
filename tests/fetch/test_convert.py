"""A .gguf file as a plain folder: the same logits and token ids, and no weight dropped in silence."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from matrix_llm.fetch.command import main
from tests.support.gguf_files import TEXTS, tied_llama, write_gguf

IDS = torch.arange(3, 43).unsqueeze(0)
SAMPLES = ["a  12", "x\n\n12", "1234.5  km", "30 pens", "<|im_start|>user\n5<|im_end|>", "é ½  7²", *TEXTS]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_folder_computes_the_logits_of_the_files_weights(is_tied, tmp_path, tokenizer):
    model = tied_llama(len(tokenizer), tie_word_embeddings=is_tied)
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    assert main([str(file), str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_the_configuration_is_plain(tmp_path, write, model):
    assert main([str(write()), str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["rms_norm_eps"] == 1e-5  # not the float32 next to it
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 100000.0
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (1, 2, 2)
    assert not {"quantization_config", "_name_or_path"} & set(saved)
    wanted = model.config.to_dict()
    same = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]
    assert {key: saved[key] for key in same} == {key: wanted[key] for key in same}


def test_text_is_split_as_the_models_own_tokenizer_does(tmp_path, write, tokenizer):
    file = write()
    assert main([str(file), str(tmp_path / "out")]) == 0
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [read(text).input_ids for text in SAMPLES] == [tokenizer(text).input_ids for text in SAMPLES]
    assert [read.decode(read(text).input_ids) for text in SAMPLES] == SAMPLES
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert read("<|im_end|>", add_special_tokens=False).input_ids == [2]
    assert read.model_max_length == 128
    assert read.chat_template == "{{ messages[0]['content'] }}"
    # transformers alone merges across digits: without that, nothing above would be proved
    alone = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert alone("a  12").input_ids != tokenizer("a  12").input_ids


@pytest.mark.parametrize("put", [(True, False), (True, True), (False, False)])
def test_begin_and_end_tokens_stand_where_the_file_says(put, tmp_path, write, tokenizer):
    names = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    assert main([str(write(metadata=dict(zip(names, put, strict=True)))), str(tmp_path / "out")]) == 0
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = tokenizer("30 pens").input_ids
    framed = [1] * put[0] + plain + [2] * put[1]
    assert read("30 pens").input_ids == framed
    assert read("30 pens", "30 pens").input_ids == framed * 2


def test_generation_stops_at_the_end_of_a_turn_too(tmp_path, write):
    assert main([str(write(metadata={"tokenizer.ggml.eot_token_id": 0})), str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [2, 0]


BIAS = {"blk.0.attn_q.bias": torch.ones(64)}
REFUSED = {
    "architecture": ({"architecture": "quux"}, r"'quux'.*not supported"),
    "split": ({"pre": "tomorrow"}, r"tokenizer\.ggml\.pre is 'tomorrow'.*on the Hub"),
    "no split": ({"pre": None}, r"tokenizer\.ggml\.pre is not set"),
    "scaled rotary embeddings": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type"),
    "their frequencies": ({"extra": {"rope_freqs.weight": torch.ones(8)}}, r"rope_freqs\.weight"),
    "a bias that would be dropped": ({"extra": BIAS}, r"biases, would be dropped"),
    "a weight that is not there": ({"drop": ["blk.1.ffn_up.weight"]}, r"holds no model\.layers\.1\.mlp\.up_proj"),
    "a part": ({"metadata": {"split.count": 3}}, r"one part of 3.*gguf-split"),
    "layers": ({"metadata": {"llama.block_count": 2**31}}, r"block_count = 2,147,483,648"),
    "a width that does not fit": ({"metadata": {"llama.embedding_length": 96}}, r"does not fit its weights.*embed_tok"),
    "a huge head": ({"metadata": {"llama.rope.dimension_count": 2**31}}, r"dimension_count = 2,147,483,648"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_another_model_is_refused_in_one_line(name, tmp_path, write, error):
    changes, reason = REFUSED[name]
    file = write(**changes)
    assert re.search(reason, error(file, tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == [file]


def test_files_beside_it_are_not_taken_for_its_own(tmp_path, write, model):
    file = write()
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "gpt2", "top_k": 7}')
    assert main([str(file), str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert "top_k" not in (tmp_path / "out" / "generation_config.json").read_text()


def test_gpt2s_split_is_kept_for_a_file_that_names_it(tmp_path, write, tokenizer):
    assert main([str(write(pre="gpt-2")), str(tmp_path / "out")]) == 0
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("a  12").input_ids != tokenizer("a  12").input_ids
