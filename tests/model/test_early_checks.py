"""What the model's configuration tells is checked before rows are read: in a run and in a plan."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from matrix_llm.base.errors import ModelError, RecipeError
from matrix_llm.config import load_recipe
from matrix_llm.model.early_checks import check_model
from matrix_llm.model.tokenizer import train_tokenizer
from tests.support.tiny import TINY

BLOOM = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}


@pytest.fixture
def check(tmp_path):
    def check(**settings):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**TINY, **settings}))
        check_model(load_recipe(path, dry_run=True))

    return check


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_config": {"model_type": "lama"}}, "model_config.*'lama'.*Did you mean llama"),
        ({"model_config": {"model_type": "llama", "hidden_sise": 8}}, "model_config.*'hidden_sise'.*hidden_size"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1.*llama"),
        ({"model_config": BLOOM, "attn_implementation": "sdpa"}, "attn_implementation='sdpa'.*bloom.*eager"),
        (
            {"eval_dataset": "builtin", "eval_strategy": "steps", "early_stopping_patience": 1,
             "metric_for_best_model": "eval_aux_loss"},
            "metric_for_best_model='eval_aux_loss'.*llama",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_the_model_is_refused(check, settings, words):
    with pytest.raises(RecipeError, match=words):
        check(**settings)


def test_settings_that_fit_the_model_are_taken(check):
    check()
    check(attn_implementation="sdpa")
    check(model_config=BLOOM, attn_implementation="eager")
    experts = {"model_type": "mixtral", "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    check(model_config=experts, router_aux_loss_coef=0.1)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ({"e": torch.zeros(299, 8)}, r"\(299, 8\).*\(300, D\)"),
        ({"e": torch.zeros(300)}, r"\(300,\).*\(300, D\)"),
        ({"e": torch.zeros(300, 8), "f": torch.zeros(1)}, r"\['e', 'f'\].*Save it alone"),
        ({"e": torch.full((300, 8), torch.nan)}, "NaN"),
        ({"e": torch.zeros(300, 8, dtype=torch.int64)}, "int64"),
    ],
)
def test_token_vectors_that_do_not_fit_the_vocabulary_are_refused(check, tiny_tokenizer, tmp_path, vectors, words):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = {"tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    save_file(vectors, tmp_path / "vectors.safetensors")
    with pytest.raises(RecipeError, match=f"mce_embeddings=.*vectors.safetensors'.*{words}"):
        check(mce_embeddings=str(tmp_path / "vectors.safetensors"), **own)
    save_file({"e": torch.zeros(len(tiny_tokenizer), 8)}, tmp_path / "fits.safetensors")
    check(mce_embeddings=str(tmp_path / "fits.safetensors"), **own)


@pytest.fixture
def own(tmp_path, tiny_tokenizer):
    """A recipe's settings for a tokenizer that is at hand."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return {"tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path / "tokenizer")}


def write_teacher(folder, tokenizer=None, model_type="llama"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 300}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return {"token_loss": "kd", "teacher_model_name_or_path": str(folder)}


def test_a_teacher_with_other_tokens_or_none_is_refused(check, own, tiny_tokenizer, tmp_path):
    check(**own, **write_teacher(tmp_path / "same", tiny_tokenizer))
    other = train_tokenizer(["another text zq zq zq zq"], 270)
    with pytest.raises(RecipeError, match=r"teacher_model_name_or_path=.*other vocabulary.*tokenizer"):
        check(**own, **write_teacher(tmp_path / "other", other))
    with pytest.raises(RecipeError, match=r"teacher_model_name_or_path=.*bare.*tokenizer"):
        check(**own, **write_teacher(tmp_path / "bare"))
    lora = write_teacher(tmp_path / "lora", tiny_tokenizer)
    (tmp_path / "lora" / "config.json").rename(tmp_path / "lora" / "adapter_config.json")
    with pytest.raises(
        RecipeError, match=r"teacher_model_name_or_path=.*adapters alone.*matrix-llm merge .*lora FOLDER$"
    ):
        check(**own, **lora)


def test_ntl_needs_a_token_for_each_digit(check, own, tmp_path):
    check(**own, token_loss="ntl")
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, "x": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="x")), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="x",
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ModelError, match=r"token_loss='ntl'.*ten digits"):
        check(**own | {"tokenizer_name_or_path": str(tmp_path / "words")}, token_loss="ntl")


def test_steps_that_mce_towards_a_teacher_does_not_take_are_refused(check, own, tiny_tokenizer, tmp_path):
    teacher = {**write_teacher(tmp_path / "teacher", tiny_tokenizer), "mce_target": "teacher"}
    check(**own, **teacher, mce_top_k=8)
    check(**own, **teacher, mce_steps=4)  # a small vocabulary is solved whole, in steps
    with pytest.raises(RecipeError, match=r"mce_steps=4.*mce_target='teacher'.*mce_top_k.*Remove mce_steps"):
        check(**own, **teacher, mce_steps=4, mce_top_k=8)


@pytest.mark.parametrize(
    ("adapters", "words"),
    [({}, "no adapters"), ({"use_peft": True, "init_lora_weights": "pissa"}, "init_lora_weights='pissa'")],
)
def test_asft_without_a_reference_is_refused(check, own, adapters, words):
    with pytest.raises(RecipeError, match=f"asft.*{words}.*teacher_model_name_or_path"):
        check(**own, token_loss="asft", **adapters)
    check(**own, token_loss="asft", use_peft=True)
