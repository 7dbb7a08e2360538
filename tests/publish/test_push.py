"""The push of a finished run: the real client against a small Hub on loopback (hub_server.py)."""

import json

import yaml
from huggingface_hub import ModelCard

from matrix_llm.publish.command import main
from tests.support.finished_run import change_recipe, contents, write_diagnosis
from tests.support.hub_server import TOKEN, Repository


def test_what_was_pushed_loads_to_the_same_logits_and_nothing_else_was_pushed(hub, client, run, tmp_path):
    write_diagnosis(run)  # it goes to the card, and the file stays here
    before = contents(run)
    outcome = client("hub", "push", run, "--repo", "user/x", "--license", "mit")
    assert outcome.status == 0, outcome.shown()
    assert outcome.out.strip().splitlines()[-1] == f"=> {hub.url}/user/x"
    assert set(hub.repositories["user/x"].branches["main"]) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "recipe.yaml", "results.json", "metrics.jsonl", "loss.png"),
        *("eval/gsm8k.json", "eval/gsm8k.settings.json"),
    }
    card = hub.repositories["user/x"].branches["main"]["README.md"].decode()
    assert "It forgives half." in card
    assert "/home/somebody" not in card
    assert contents(run) == before
    loaded = client("load", run, "user/x", tmp_path / "cache")
    assert loaded.status == 0, loaded.shown()
    assert float(loaded.out.splitlines()[-1]) == 0.0  # largest difference of the logits
    assert hub.seen("GET /user/x/resolve/.*/model.safetensors")


def test_a_pretrained_image_backbone_is_pushed_with_its_own_card_and_weights(hub, client, tmp_path, capsys):
    from matrix_llm.ssl.pretrain import main as pretrain
    from tests.support.tiny_ssl import BACKBONE

    recipe = tmp_path / "tiny.yaml"
    settings = {
        "method": "simsiam",
        "dataset": "digits",
        "backbone_config": {**BACKBONE, "model_type": "resnet"},
        "image_size": 16,
        "channels": 1,
    }
    settings |= {
        "projector_widths": [8, 8],
        "predictor_widths": [4, 8],
        "max_steps": 2,
        "per_device_train_batch_size": 32,
        "use_cpu": True,
    }
    recipe.write_text(yaml.safe_dump({**settings, "disable_tqdm": True, "save_strategy": "no"}))
    run = tmp_path / "digits"
    assert pretrain([str(recipe), "--output_dir", str(run)]) == 0
    outcome = client("hub", "push", run, "--repo", "user/digits")
    assert outcome.status == 0, outcome.shown()
    sent = hub.repositories["user/digits"].branches["main"]
    assert {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "recipe.yaml",
        "results.json",
        "README.md",
    } <= set(sent)
    assert not any(name.startswith("pretraining") for name in sent)
    assert sent["README.md"] == (run / "README.md").read_bytes()
    assert sent["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert ModelCard(sent["README.md"].decode()).data.pipeline_tag == "image-feature-extraction"
    assert main(["card", str(run)]) == 2
    assert "Edit its README.md" in capsys.readouterr().err


def test_the_pushed_card_carries_licence_method_and_scores(hub, client, run):
    assert client("hub", "push", run, "--repo", "user/x", "--license", "mit").status == 0
    card = ModelCard(hub.repositories["user/x"].branches["main"]["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    assert "matrix-cross-entropy" in card.data.tags
    (entry,) = yaml.safe_load(card.data.to_yaml())["model-index"]
    (result,) = entry["results"]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"] == {"name": "GSM8K", "type": "openai/gsm8k"}
    assert result["metrics"] == [{"type": "accuracy", "value": 75.0, "name": "accuracy, verified convention"}]


def test_the_base_models_licence_and_names_reach_the_card(hub, client, run):
    hub.repositories["team/base"], hub.licence["team/base"] = Repository(private=False), "llama2"
    change_recipe(run, model_name_or_path="team/base", dataset="team/rows", model_config=None)
    assert client("hub", "push", run, "--repo", "user/x").status == 0
    card = ModelCard(hub.repositories["user/x"].branches["main"]["README.md"].decode())
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("llama2", "team/base", ["team/rows"])


def test_a_second_push_sends_nothing(hub, client, run):
    assert client("hub", "push", run, "--repo", "user/x").status == 0
    assert len(hub.seen("PUT /lfs/")) == 2  # weights and plot
    hub.requests.clear()
    assert "none was missing" in client("hub", "push", run, "--repo", "user/x").out
    assert not hub.seen("PUT|/commit/|/create")
    assert hub.repositories["user/x"].commits == 1


def test_a_push_cut_off_between_two_files_goes_on_with_the_second(hub, client, run):
    hub.fail("/commit/", 500, times=100)
    assert client("hub", "push", run, "--repo", "user/x").status == 1
    assert len(hub.seen("PUT /lfs/")) == 2
    hub.faults.clear()
    hub.requests.clear()
    assert client("hub", "push", run, "--repo", "user/x").status == 0
    assert not hub.seen("PUT")
    assert hub.repositories["user/x"].commits == 1


def test_weights_of_an_earlier_push_do_not_shadow_the_new_ones(hub, client, run, tmp_path, tiny_llama):
    assert client("hub", "push", run, "--repo", "user/x").status == 0
    (run / "model.safetensors").unlink()
    model = tiny_llama()
    model.lm_head.weight.data.mul_(-1)
    model.save_pretrained(run, max_shard_size="60kB")
    assert len([*run.glob("model-*.safetensors")]) > 1
    assert client("hub", "push", run, "--repo", "user/x").status == 0
    assert "model.safetensors" not in hub.repositories["user/x"].branches["main"]
    loaded = client("load", run, "user/x", tmp_path / "cache")
    assert float(loaded.out.splitlines()[-1]) == 0.0


def test_a_token_in_a_runs_recipe_stays_at_home(hub, client, run):
    change_recipe(run, hub_token=TOKEN)
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 0, outcome.shown()
    files = hub.repositories["user/x"].branches["main"]
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []


def test_private_unless_public_is_asked_for(hub, client, run):
    for repo, options, private in (("user/x", (), True), ("user/y", ("--public",), False)):
        assert client("hub", "push", run, "--repo", repo, *options).status == 0
        assert hub.repositories[repo].private is private


def test_the_visibility_of_a_repository_that_exists_is_said_and_kept(hub, client, run):
    hub.repositories |= {"user/open": Repository(private=False), "team/closed": Repository(private=True)}
    assert (
        "exists and is public, so everyone can read what is pushed"
        in client("hub", "push", run, "--repo", "user/open").out
    )
    assert "exists and stays private" in client("hub", "push", run, "--repo", "team/closed", "--public").out
    assert [hub.repositories[repo].private for repo in ("user/open", "team/closed")] == [False, True]
    assert not hub.seen("create|settings")


def test_a_repository_that_turns_public_during_the_push_is_said(hub, client, run):
    hub.turns_public = True
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 1
    line = outcome.error_line()
    assert "is public now" in line
    assert f"{hub.url}/user/x/settings" in line


def test_a_revision_is_a_branch_made_where_it_is_missing(hub, client, run):
    for _ in range(2):
        outcome = client("hub", "push", run, "--repo", "user/x", "--revision", "mce")
        assert outcome.status == 0, outcome.shown()
    branches = hub.repositories["user/x"].branches
    assert "model.safetensors" in branches["mce"]
    assert "model.safetensors" not in branches["main"]


def test_offline_mode_is_named_and_so_is_a_second_process(hub, run, monkeypatch, capsys):
    assert main(["push", str(run), "--repo", "user/x"]) == 1  # this process is offline: conftest.py
    assert "HF_HUB_OFFLINE=1" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["push", str(run), "--repo", "user/x"]) == 0
    assert capsys.readouterr().out == ""


def test_an_adapter_is_pushed_as_one_with_its_base_models_name(hub, client, adapter_run, tmp_path):
    refused = client("hub", "push", adapter_run, "--repo", "user/lora")
    assert refused.status == 2
    assert "--base-model user/name" in refused.error_line()
    assert not hub.requests
    outcome = client("hub", "push", adapter_run, "--repo", "user/lora", "--base-model", "user/base")
    assert outcome.status == 0, outcome.shown()
    files = hub.repositories["user/lora"].branches["main"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "user/base")
    assert "lora" in card.data.tags
    assert "model.safetensors" not in files
    loaded = client("load", adapter_run, "user/lora", tmp_path / "cache", tmp_path / "base")
    assert loaded.status == 0, loaded.shown()
    assert float(loaded.out.splitlines()[-1]) == 0.0
