"""The model card of a run that was evaluated, and its push: the real client against a small Hub on loopback (hub_server.py)."""

import json
import os
import time

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from matrix_llm.publish.push import check_weights, main
from tests.support.hub_server import TOKEN, Client, FakeHub, Repository, _Handler

SCORE = {
    "correct": 9,
    "total": 12,
    "accuracy": 0.75,
    "low": 0.468,
    "high": 0.911,
    "extraction_failures": 1,
    "ungraded": 0,
}


def run_folder(tmp_path, **summary):
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    recipe = {
        "output_dir": str(run),
        "dataset": "builtin",
        "model_name_or_path": None,
        "mce_weight": 1.0,
        "use_cpu": True,
        "bf16": False,
    }
    recipe["model_config"] = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 1}
    recipe["tokenizer_vocab_size"] = 300
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "results.json").write_text(json.dumps({"steps": 4, "train_rows": 64}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 2.0, "ce": 1.5, "mce": 0.5}) + "\n")
    result = {
        "benchmark": "gsm8k",
        "name": "gsm8k",
        "scores": {"verified": SCORE},
        "settings": {"prompt": "metamath", "engine": "vllm"},
        **summary,
    }
    (run / "eval" / "gsm8k.json").write_text(json.dumps(result))
    (run / "eval" / "gsm8k.settings.json").write_text(json.dumps({"prompt": "metamath"}))
    return run


def change_recipe(run, **changes):
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(
        yaml.safe_dump({k: v for k, v in {**settings, **changes}.items() if v is not None})
    )


def test_scores_reach_the_card_and_the_model_index(tmp_path, capsys):
    run = run_folder(tmp_path)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert "| gsm8k | verified | 75.0 % | 46.8 to 91.1 | 12 | metamath | vllm |" in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_value, result.metric_name) == (
        "openai/gsm8k",
        75.0,
        "accuracy, verified convention",
    )


def test_a_part_of_a_benchmark_is_shown_but_is_no_entry_of_the_model_index(tmp_path):
    run = run_folder(tmp_path, limit=12)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert "| gsm8k | verified | 75.0 %" in card.text
    assert not card.data.eval_results


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ pushing


@pytest.fixture(scope="module")
def server():
    return FakeHub()


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp("hf_home"))
    yield client
    client.close()


@pytest.fixture
def hub(server):
    """The server, empty."""
    server.forget()
    return server


@pytest.fixture
def run(tmp_path, tiny_llama, tiny_tokenizer):
    """A finished run with everything that a run may leave, what must stay at home included."""
    run = run_folder(tmp_path)
    tiny_llama().save_pretrained(run)
    tiny_tokenizer.save_pretrained(run)
    (run / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (run / "checkpoint-4").mkdir()
    for name in (
        "training_args.bin",
        "pytorch_model.bin",
        "optimizer.pt",
        "checkpoint-4/model.safetensors",
        "eval/gsm8k.jsonl",
        ".hidden",
    ):
        (run / name).write_bytes(b"not for others")
    return run


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def last_line(outcome):
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.shown()
    return outcome.err.strip().splitlines()[-1]


def test_what_was_pushed_loads_to_the_same_logits_and_nothing_else_was_pushed(hub, client, run, tmp_path):
    before = contents(run)
    outcome = client("hub", "push", run, "--repo", "user/x", "--license", "mit")
    assert outcome.status == 0, outcome.shown()
    assert outcome.out.strip().splitlines()[-1] == f"=> {hub.url}/user/x"
    assert set(hub.repositories["user/x"].branches["main"]) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "recipe.yaml", "results.json", "metrics.jsonl", "loss.png"),
        *("eval/gsm8k.json", "eval/gsm8k.settings.json"),
    }
    assert contents(run) == before
    loaded = client("load", run, "user/x", tmp_path / "cache")
    assert loaded.status == 0, loaded.shown()
    assert float(loaded.out.splitlines()[-1]) == 0.0  # largest difference of the logits
    assert hub.seen("GET /user/x/resolve/.*/model.safetensors")


def test_a_pretrained_image_backbone_is_pushed_with_its_own_card_and_weights(hub, client, tmp_path, capsys):
    from matrix_llm.ssl.pretrain import main as pretrain
    from tests.support.ssl_parity_run import BACKBONE

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
    assert "pretrain.py, which wrote its card" in capsys.readouterr().err


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


STEPS = [
    "whoami",
    "GET /api/models/user/x$",
    "create",
    "validate-yaml",
    "preupload",
    "objects/batch",
    "PUT",
    "/commit/",
    "/tree/",
]


@pytest.mark.parametrize("kind", [500, 503, 429, "drop", "stall"])
def test_every_step_is_tried_again(hub, client, run, kind):
    steps = ["PUT", "/commit/"] if kind == "stall" else STEPS  # half a second each
    for step in steps:
        hub.fail(step, kind)
    started = time.monotonic()
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 0, outcome.shown()
    assert kind != "stall" or time.monotonic() - started < 50  # of 60 s without an answer
    assert [fault.pattern for fault in hub.faults if fault.times] == []
    assert len([wait for wait in outcome.waits if wait >= 1]) == len(steps)
    assert hub.repositories["user/x"].commits == 1


def test_a_lost_answer_to_a_commit_makes_no_second_commit(hub, client, run, monkeypatch):
    answer, lost = _Handler.answer, []

    def lose_first_commit(self, content, *rest, **options):
        if "commitOid" not in content or lost:
            return answer(self, content, *rest, **options)
        lost.append(content)
        self.close_connection = True
        return self.connection.shutdown(2)

    monkeypatch.setattr(_Handler, "answer", lose_first_commit)
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 0, outcome.shown()
    assert lost
    assert hub.repositories["user/x"].commits == 1


def test_retry_after_is_honoured_and_an_hour_is_reported(hub, client, run):
    hub.fail("whoami", 429, Retry_After="7")
    assert 7.0 in client("hub", "push", run, "--repo", "user/x").waits
    hub.fail("whoami", 429, Retry_After="3600")
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 1
    assert "asks to wait 3600 s" in last_line(outcome)
    assert not outcome.waits


@pytest.mark.parametrize(("step", "kind"), [("whoami", 500), ("PUT", 502), ("commit", "drop")])
def test_a_hub_that_stays_down_costs_one_line_and_no_file(hub, client, run, step, kind):
    before = contents(run)
    hub.fail(step, kind, times=1000)
    outcome = client("hub", "push", run, "--repo", "user/x", "--public")
    assert outcome.status == 1
    assert f"python -m matrix_llm.hub push {run} --repo user/x --public" in last_line(outcome)
    assert contents(run) == before
    assert len(hub.seen(step)) <= 2 * 5 * 6  # two files, our tries of the client's
    if step == "whoami":
        assert outcome.waits == [1.0, 2.0, 4.0, 8.0]


SECRET = "not_like_other_tokens_0123456789"


@pytest.mark.parametrize(
    ("arguments", "token", "step", "kind"),
    [
        (("--token", TOKEN), "", "whoami", 500),
        (("--token", SECRET), TOKEN, "whoami", 400),
        ((), SECRET, "whoami", 401),
        ((), TOKEN, "create", 418),
        ((), TOKEN, "PUT", 403),
        (("--token", TOKEN), "", "/commit/", 400),
        (("--tokn", TOKEN), "", "argparse", 0),
    ],
)
def test_no_token_is_ever_printed(hub, client, run, arguments, token, step, kind):
    hub.fail(step, kind, times=1000)  # and quotes what it was sent
    outcome = client("hub", "push", run, "--repo", "user/x", *arguments, HF_TOKEN=token)
    assert outcome.status != 0
    assert "***" in outcome.err or kind in (401, 403)  # whose lines quote nothing, or nothing secret
    assert TOKEN not in outcome.shown()
    assert SECRET not in outcome.shown()


def test_a_token_in_a_runs_recipe_stays_at_home(hub, client, run):
    change_recipe(run, hub_token=TOKEN)
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 0, outcome.shown()
    files = hub.repositories["user/x"].branches["main"]
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []


@pytest.mark.parametrize("token", ["hf_aRejectedTokenOfThirtyFourLetters", "", "hf_no\nheader"])
def test_a_rejected_or_missing_token_is_one_line_with_the_way_out(hub, client, run, token):
    outcome = client("hub", "push", run, "--repo", "user/x", HF_TOKEN=token)
    assert outcome.status == 1
    assert "settings/tokens" in last_line(outcome)
    assert "hf auth login" in last_line(outcome)
    assert not hub.seen("POST|PUT")
    assert not outcome.waits
    assert not token or token not in outcome.shown()


def test_a_token_that_may_not_write_is_refused_before_anything_is_sent(hub, client, run):
    hub.role = "read"
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert "may only read" in last_line(outcome)
    assert not hub.seen("POST|PUT")
    hub.role = "write"
    outcome = client("hub", "push", run, "--repo", "someone/x")
    assert "'someone/x'" in last_line(outcome)
    assert "team" in last_line(outcome)
    assert not hub.seen("POST|PUT")
    hub.role = "fineGrained"
    hub.fail("repos/create", 403)
    outcome = client("hub", "push", run, "--repo", "someone/x")
    assert "may not write to 'someone/x' (403" in last_line(outcome)
    assert not hub.seen("PUT")


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


# ----------------------------------------------------------------------------- refused here, before any request: no network needed


def empty_shard(run):
    weights = load_file(run / "model.safetensors")
    weights["lm_head.weight"] = torch.empty(0)
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def missing_tensor(run):
    weights = load_file(run / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def missing_shard(run):
    AutoModelForCausalLM.from_pretrained(run).save_pretrained(run / "sharded", max_shard_size="60kB")
    (run / "model.safetensors").unlink()
    for file in (run / "sharded").glob("model*"):
        file.rename(run / file.name)
    min(run.glob("model-*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("damage", "repo", "words"),
    [
        (empty_shard, "user/x", ["1 of 21 tensors are empty", "lm_head.weight", "stage3_gather_16bit_weights_on_model_save"]),
        (missing_tensor, "user/x", ["lack 1 of 21 tensors", "model.layers.1.mlp.up_proj.weight"]),
        (missing_shard, "user/x", ["lists model-00001-of-", "not there"]),
        (lambda run: os.truncate(run / "model.safetensors", 5000), "user/x", ["5,000 bytes", "cut off"]),
        (lambda run: (run / "model.safetensors").write_text("version https://git-lfs"), "user/x", ["not a safetensors file"]),
        (lambda run: (run / "model.safetensors").unlink(), "user/x", ["only pickles (pytorch_model.bin)"]),
        (lambda run: (run / "config.json").unlink(), "user/x", ["no config.json"]),
        (lambda run: (run / "tokenizer_config.json").unlink(), "user/x", ["no tokenizer_config.json"]),
        (lambda run: (run / "results.json").unlink(), "user/x", ["no results.json", "not a finished run"]),
        (lambda run: (run / "metrics.jsonl").write_text(f'{{"step": "{TOKEN}"}}'), "user/x", ["metrics.jsonl holds an access token"]),
        (lambda run: (run / "eval" / "math.json").write_text('{"scores": {"a": 1}}'), "user/x", ["math.json is not a result file"]),
        (lambda run: None, "x", ["--repo='x'", "user/name"]),
        (lambda run: None, "user/x y", ["--repo='user/x y'"]),
        (lambda run: None, "a/b/c", ["--repo='a/b/c'"]),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_or_named_is_refused_before_any_request(
    hub, run, damage, repo, words, capsys, monkeypatch
):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", False
    )  # a request would be made, and to the real Hub
    monkeypatch.setattr("matrix_llm.publish.push.connect", lambda *_: pytest.fail("the Hub was asked"))
    damage(run)
    capsys.readouterr()  # progress bars of the damage
    assert main(["push", str(run), "--repo", repo]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert TOKEN not in shown
    assert [word for word in words if word not in shown] == []


def test_tied_weights_are_whole_without_a_second_copy(tmp_path, tiny_llama):
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    type(model)(model.config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert check_weights(tmp_path) == [tmp_path / "model.safetensors"]


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter_run(run, tiny_llama, tmp_path):
    """A LoRA run on a local base model, which lies in tmp_path / "base"."""
    tiny_llama().save_pretrained(tmp_path / "base")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (run / name).unlink()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ).save_pretrained(run)
    change_recipe(run, model_name_or_path=str(tmp_path / "base"), model_config=None, use_peft=True)
    return run


def test_an_adapter_is_pushed_as_one_with_its_base_models_name(hub, client, adapter_run, tmp_path):
    refused = client("hub", "push", adapter_run, "--repo", "user/lora")
    assert refused.status == 2
    assert "--base-model user/name" in last_line(refused)
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
