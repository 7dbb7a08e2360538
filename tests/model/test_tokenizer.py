"""The tokenizer (model/tokenizer.py): loses nothing, pads right, and never grows the vocabulary."""

import json

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, CodeLlamaTokenizer, PreTrainedTokenizerFast

from matrix_llm.config import ModelArguments, RecipeError
from matrix_llm.model.load import load_model
from matrix_llm.model.tokenizer import load_tokenizer
from tests.support.checkpoints import save_llama, scratch
from tests.support.sentences import SENTENCES


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
    with pytest.raises(RecipeError, match=r"tokenizer_vocab_size=300.*no training texts"):
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
    with pytest.raises(RecipeError, match=r"1 tokens beyond the model's 299 embeddings: .* \(id 299\)"):
        load_tokenizer(args)
    with pytest.raises(RecipeError, match="299 embeddings"):
        load_model(args, tiny_tokenizer)


def with_end_marks(folder, **options):
    """A word-level tokenizer of a chat model: rows may end in </s> or <|im_end|>."""
    words = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "a", "b"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], **options,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return ModelArguments(model_name_or_path=save_llama(folder, rows=len(words)))


def test_eos_and_pad_token_of_the_recipe_replace_the_tokenizers_own_everywhere(tmp_path):
    args = with_end_marks(tmp_path)
    tokenizer = load_tokenizer(args, eos_token="<|im_end|>", pad_token="<unk>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (4, 0, 7)
    model = load_model(args, tokenizer)
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (4, 0)
    tokenizer.save_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.eos_token, again.pad_token, len(again)) == ("<|im_end|>", "<unk>", 7)


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_an_unknown_eos_or_pad_token_is_refused_with_the_nearest(key, tmp_path):
    with pytest.raises(RecipeError, match=rf"{key}='<im_end>' is not in .*Did you mean <\|im_end\|>"):
        load_tokenizer(with_end_marks(tmp_path), **{key: "<im_end>"})
    with pytest.raises(RecipeError, match=rf"{key}='<\|im_end\|>' is not in .*special tokens are </s>"):
        load_tokenizer(scratch(), texts=["12 pens"], **{key: "<|im_end|>"})


def test_an_eos_token_after_a_tokenizers_own_is_refused(tmp_path):
    args = with_end_marks(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(args).eos_token == "</s>"
    with pytest.raises(RecipeError, match=r"eos_token='<\|im_end\|>'.*ends every text in '</s>'.*add_eos_token"):
        load_tokenizer(args, eos_token="<|im_end|>")
