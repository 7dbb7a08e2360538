import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CodeLlamaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from matrix_llm.config import ModelArguments, RecipeError
from matrix_llm.model.adapters import lora_config
from matrix_llm.model.load import build_config, load_model
from matrix_llm.model.tokenizer import load_tokenizer
from tests.conftest import SENTENCES

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def scratch(**changes) -> ModelArguments:
    return ModelArguments(model_config=TINY | changes, tokenizer_vocab_size=300)


def save_llama(folder, rows: int, dtype=torch.float32, **changes) -> str:
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, **{**TINY, **changes})).to(dtype).save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------ tokenizer


def test_trained_tokenizer_loses_no_character_and_survives_saving(tmp_path):
    tokenizer = load_tokenizer(scratch(), texts=SENTENCES)
    assert len(tokenizer) == 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (
        0,
        1,
        2,
        "right",
    )
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SENTENCES, "Zürich  \n\t∫ x² dx = 137 🙂"]:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert ids[0] == 0
        assert again.decode(ids, skip_special_tokens=True) == text
    assert (again.pad_token_id, again.padding_side, len(again)) == (2, "right", 300)


def test_tokenizer_training_without_texts_is_refused():
    with pytest.raises(RecipeError, match="no training texts"):
        load_tokenizer(scratch())


def test_missing_pad_token_is_borrowed_without_growing_the_vocabulary(tmp_path):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    for unk, pad in (("<unk>", 0), (None, 2)):
        backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token=unk, bos_token="<s>", eos_token="</s>", padding_side="left"
        ).save_pretrained(tmp_path)
        args = ModelArguments(model_name_or_path=save_llama(tmp_path, rows=4))
        tokenizer = load_tokenizer(args)
        assert (tokenizer.pad_token_id, len(tokenizer), tokenizer.padding_side) == (pad, 4, "right")
        model = load_model(args, tokenizer)
        assert model.config.pad_token_id == model.generation_config.pad_token_id == pad
        assert model.config.eos_token_id == model.generation_config.eos_token_id == 2


def test_codellama_fill_token_beyond_the_vocabulary_is_left_out(tmp_path):
    words = ["<unk>", "<s>", "</s>", "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "▁", "a", "▁a"]
    CodeLlamaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[("▁", "a")]).save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=save_llama(tmp_path, rows=len(words)))
    with pytest.raises(RecipeError, match=r"'<FILL_ME>' .id 10.*take them out of its tokenizer.json"):
        load_tokenizer(args)  # written into the files by transformers 5
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "extra_special_tokens")):
        content = json.loads((tmp_path / name).read_text())
        content[key] = [token for token in content[key] if "<FILL_ME>" not in str(token)]
        content.pop("fill_token", None)
        (tmp_path / name).write_text(json.dumps(content))
    # as published: the files do not hold it, but the class adds it
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(words) + 1  # <FILL_ME>, which has no embedding row
    tokenizer = load_tokenizer(args)
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.padding_side) == (len(words), 0, "right")
    load_model(args, tokenizer)
    tokenizer.save_pretrained(tmp_path / "trained")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "trained")) == len(words)


def test_token_ids_beyond_the_embedding_are_refused_by_name(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=save_llama(tmp_path, rows=299))
    with pytest.raises(RecipeError, match=r"1 tokens beyond the model's 299 embedding rows: .* \(id 299\)"):
        load_tokenizer(args)
    with pytest.raises(RecipeError, match="embedding rows"):
        load_model(args, tiny_tokenizer)


# ------------------------------------------------------------------------------------------------------------ model


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
        ({"vocab_size": 10}, "vocab_size=10 has fewer rows than the tokenizer has tokens"),
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


# ------------------------------------------------------------------------------------------------------------ LoRA


def test_lora_settings_reach_peft():
    assert lora_config(scratch()) is None
    args = ModelArguments(model_name_or_path="x", use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj"])
    config = lora_config(args)
    assert (config.r, config.lora_alpha, config.target_modules, config.task_type) == (4, 8, {"q_proj"}, "CAUSAL_LM")


def test_four_bits_need_peft_and_bitsandbytes(tiny_tokenizer):
    with pytest.raises(RecipeError, match="Add use_peft: true"):
        ModelArguments(model_name_or_path="x", load_in_4bit=True)
    pytest.importorskip("peft")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install bitsandbytes"):
            load_model(ModelArguments(model_name_or_path="x", load_in_4bit=True, use_peft=True), tiny_tokenizer)
