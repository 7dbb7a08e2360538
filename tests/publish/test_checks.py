"""What may not be pushed is refused before any request, in one line that names the file and the way out."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from matrix_llm.base.errors import RecipeError
from matrix_llm.publish.checks import check_weights
from matrix_llm.publish.client import HubClient
from matrix_llm.publish.command import main
from tests.support.hub_server import TOKEN


def change_weights(run, change):
    weights = load_file(run / "model.safetensors")
    change(weights)
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def shard(run):
    AutoModelForCausalLM.from_pretrained(run).save_pretrained(run / "sharded", max_shard_size="60kB")
    (run / "model.safetensors").unlink()
    for file in (run / "sharded").glob("model*"):
        file.rename(run / file.name)


def empty_tensor(run):
    change_weights(run, lambda weights: weights.update({"lm_head.weight": torch.empty(0)}))


def missing_tensor(run):
    change_weights(run, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def missing_shard(run):
    shard(run)
    min(run.glob("model-*.safetensors")).unlink()


def shard_without_a_listed_tensor(run):
    shard(run)
    index = run / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight"', '"lm_head.weight2"'))


def cut_off(run):
    os.truncate(run / "model.safetensors", 5000)


def git_lfs_pointer(run):
    (run / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


def only_pickles(run):
    (run / "model.safetensors").unlink()


def remove(name):
    return lambda run: (run / name).unlink()


def write(name, text):
    return lambda run: (run / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "repo", "message"),
    [
        (empty_tensor, "user/x", r"1 empty .*lm_head\.weight.*stage3_gather_16bit_weights_on_model_save"),
        (missing_tensor, "user/x", r"lack 1 of 21 tensors.*model\.layers\.1\.mlp\.up_proj\.weight.*[Ss]ave"),
        (missing_shard, "user/x", r"index\.json lists model-00001-of-.*[Ss]ave"),
        (shard_without_a_listed_tensor, "user/x", r"lack .*lm_head\.weight2"),
        (cut_off, "user/x", r"model\.safetensors.*cut off.*[Ss]ave"),
        (git_lfs_pointer, "user/x", r"model\.safetensors.*Git LFS"),
        (only_pickles, "user/x", r"only pickles \(pytorch_model\.bin\).*safetensors"),
        (remove("config.json"), "user/x", r"no config\.json"),
        (write("config.json", "{"), "user/x", r"config\.json is not JSON"),
        (remove("tokenizer_config.json"), "user/x", r"no tokenizer_config\.json"),
        (remove("results.json"), "user/x", r"no results\.json.*output_dir"),
        (write("metrics.jsonl", f'{{"step": "{TOKEN}"}}'), "user/x", r"metrics\.jsonl holds an access token"),
        (write("eval/math.json", '{"scores": {"a": 1}}'), "user/x", r"math\.json.*regrade"),
        (lambda run: None, "x", r"--repo='x'.*user/name"),
        (lambda run: None, "user/x y", r"--repo='user/x y'.*user/name"),
        (lambda run: None, "a/b/c", r"--repo='a/b/c'.*user/name"),
    ],
)
def test_what_cannot_be_loaded_or_named_is_refused_before_any_request(run, damage, repo, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # a request would go to the real Hub
    monkeypatch.setattr(HubClient, "request", lambda *_, **__: pytest.fail("the Hub was asked"))
    damage(run)
    capsys.readouterr()  # progress bars of the damage
    assert main(["push", str(run), "--repo", repo]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert TOKEN not in shown
    assert re.search(message, shown), shown


def test_a_sharded_model_is_its_index_and_its_shards(run):
    shard(run)
    files = check_weights(run)
    assert files[0].name == "model.safetensors.index.json"
    assert sorted(files[1:]) == sorted(run.glob("model-*.safetensors"))
    assert len(files) > 2


def test_tied_weights_are_complete_without_a_second_copy(tmp_path, tiny_llama):
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    type(model)(model.config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert check_weights(tmp_path) == [tmp_path / "model.safetensors"]


def test_an_adapter_without_its_settings_is_refused(adapter_run):
    (adapter_run / "adapter_config.json").unlink()
    with pytest.raises(RecipeError, match=r"no adapter_config\.json.*[Ss]ave"):
        check_weights(adapter_run)
