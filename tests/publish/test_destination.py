"""`push_to_hub` in a recipe: the real client against a small Hub on loopback (hub_server.py)."""

import pytest
import yaml

from tests.support.finished_run import contents
from tests.support.hub_server import TOKEN, Repository


@pytest.fixture
def train(client, tmp_path):
    def start(*overrides, **settings):
        recipe = {
            "model_config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1},
            "tokenizer_vocab_size": 300, "dataset": "builtin", "builtin_rows": 16, "prompt_template": "plain", "max_length": 128,
            "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none",
            "gradient_checkpointing": False, "disable_tqdm": True, "output_dir": str(tmp_path / "out"), "push_to_hub": True, **settings,
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return client("train", tmp_path / "recipe.yaml", *overrides)

    return start


def test_a_recipe_pushes_its_finished_run_once_and_keeps_its_token_to_itself(hub, train, tmp_path):
    outcome = train("--hub_token", TOKEN)
    assert outcome.status == 0, outcome.shown()
    assert TOKEN not in outcome.shown()
    assert f"=> {hub.url}/user/out" in outcome.out
    repository = hub.repositories["user/out"]
    assert repository.private
    assert repository.commits == 1  # no checkpoint on the way, no pickle
    assert {"model.safetensors", "recipe.yaml", "loss.png"} < set(repository.branches["main"])
    assert not [name for name in repository.branches["main"] if name.endswith(".bin") or "checkpoint" in name]
    assert [name for name, content in contents(tmp_path / "out").items() if TOKEN.encode() in content] == []


def test_a_recipe_that_says_private_never_feeds_a_public_repository(hub, train):
    hub.repositories["user/out"] = Repository(private=False)
    outcome = train(hub_private_repo=True)
    assert outcome.status == 1
    assert "'user/out' is public, but private was asked for" in outcome.error_line()
    assert not hub.seen("PUT|/commit/|preupload")


def test_the_plan_of_a_recipe_asks_nothing_and_shows_no_token(hub, train):
    outcome = train("--hub_token", TOKEN, "--dry_run")
    assert outcome.status == 0, outcome.shown()
    assert TOKEN not in outcome.shown()
    assert not hub.requests


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hub_token": "hf_aRejectedTokenOfThirtyFourLetters"}, ["rejects the given token (401)"]),
        ({"hub_model_id": "user/a b"}, ["hub_model_id='user/a b'"]),
        ({"hub_strategy": "every_save"}, ["hub_strategy='every_save'", "no checkpoint"]),
    ],
)
def test_a_recipe_that_could_not_be_pushed_stops_before_anything_is_loaded(hub, train, tmp_path, settings, words):
    outcome = train(**settings)
    assert outcome.status in (1, 2)
    assert [word for word in words if word not in outcome.error_line()] == []
    assert outcome.out == ""
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_at_the_end_leaves_the_run_and_the_command_to_push_it(hub, train, client, tmp_path):
    hub.fail("/commit/", 500, times=1000)
    outcome = train(hub_model_id="team/x", hub_private_repo=False)
    assert outcome.status == 1
    assert TOKEN not in outcome.shown()
    command = f"python -m matrix_llm.hub push {tmp_path / 'out'} --repo team/x --public"
    assert command in outcome.error_line()
    hub.faults.clear()
    assert client("hub", *command.split()[3:]).status == 0
    assert not hub.repositories["team/x"].private
