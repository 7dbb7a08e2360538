"""`push_to_hub` in a recipe: the real client against a small Hub on loopback (hub_server.py)."""

import copy

import pytest
import yaml

from matrix_llm.base.errors import RecipeError
from matrix_llm.publish.client import HubClient
from matrix_llm.publish.destination import Destination, find_destination, remove_push_settings
from tests.support.finished_run import contents
from tests.support.hub_server import TOKEN, Repository
from tests.support.planned_recipe import planned_recipe

RECIPE = {
    "model_config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1},
    "tokenizer_vocab_size": 300,
    "dataset": "builtin",
    "builtin_rows": 16,
    "prompt_template": "plain",
    "max_length": 128,
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "push_to_hub": True,
}


@pytest.fixture
def train(client, tmp_path):
    def start(*overrides, **settings):
        recipe = {**RECIPE, "output_dir": str(tmp_path / "out"), **settings}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return client("train", tmp_path / "recipe.yaml", *overrides)

    return start


@pytest.fixture
def no_requests(monkeypatch):
    monkeypatch.setattr(HubClient, "check_token", lambda _: pytest.fail("the Hub was asked"))


def test_finding_the_destination_changes_nothing_and_asks_who_the_tokens_user_is(tmp_path, monkeypatch):
    monkeypatch.setattr(HubClient, "check_token", lambda hub: f"user of {hub.token}")
    recipe = planned_recipe(tmp_path, push_to_hub=True, hub_token=TOKEN, output_dir="runs/x", hub_revision="mce")
    before = copy.deepcopy((recipe.resolved, recipe.training.to_dict(), recipe.training.hub_token))
    found = find_destination(recipe)
    assert found == Destination(f"user of {TOKEN}/x", private=None, revision="mce", token=TOKEN)
    assert TOKEN not in repr(found).replace(found.repo, "")
    assert (recipe.resolved, recipe.training.to_dict(), recipe.training.hub_token) == before


def test_a_name_with_its_owner_is_not_prefixed(tmp_path, monkeypatch):
    monkeypatch.setattr(HubClient, "check_token", lambda _: "user")
    recipe = planned_recipe(tmp_path, push_to_hub=True, hub_model_id="team/y", hub_private_repo=False)
    assert find_destination(recipe) == Destination("team/y", private=False)


def test_only_the_first_process_asks_and_only_where_a_push_is_wanted(tmp_path, monkeypatch, no_requests):
    assert find_destination(planned_recipe(tmp_path)) is None
    recipe = planned_recipe(tmp_path, push_to_hub=True, output_dir="runs/x")
    assert find_destination(recipe, ask=False) is None
    monkeypatch.setenv("RANK", "1")
    assert find_destination(recipe) is None


def test_after_removal_neither_token_nor_pushing_is_left_in_the_recipe(tmp_path):
    recipe = planned_recipe(tmp_path, push_to_hub=True, hub_token=TOKEN)
    remove_push_settings(recipe)
    assert TOKEN not in str(recipe.resolved)
    assert recipe.training.hub_token is None
    assert recipe.training.push_to_hub is False


def test_an_adapter_of_a_folder_is_refused_before_training(tmp_path, tiny_llama, no_requests):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = {"model_config": None, "tokenizer_vocab_size": None, "model_name_or_path": str(tmp_path / "base")}
    recipe = planned_recipe(tmp_path, push_to_hub=True, use_peft=True, **base)
    with pytest.raises(RecipeError, match=r"push_to_hub.*base.*--base-model"):
        find_destination(recipe)


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
