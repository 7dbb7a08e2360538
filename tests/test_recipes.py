"""Every recipe can be planned, its header says what a reader needs, and every launch file does what it says."""

import copy
import json
import re

import pytest
import yaml

from matrix_llm.config import load_recipe
from matrix_llm.train import main
from tests.support.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PRETRAINED = [p for p in RECIPES if "model_name_or_path" in yaml.safe_load(p.read_text())]


def header_of(path) -> list[str]:
    """The comment that a recipe starts with, line by line."""
    return [line.removeprefix("#").strip() for line in path.read_text().split("\n\n")[0].splitlines()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_header_says_what_the_recipe_reproduces_takes_and_scores(path):
    first_words = [line.split()[0] for line in header_of(path) if line]
    fields = ["reproduces", "hardware", "hours", "score", "command"]
    assert [word for word in first_words if word in fields] == fields
    assert f"recipes/{path.name}" in " ".join(header_of(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_file_that_a_header_names_exists(path):
    folders = "benchmarks|docs|ds_configs|matrix_llm|recipes"
    named = rf"(?<![\w/])((?:{folders})/[\w./-]+\.(?:json|md|py|yaml)|[\w.]+\.yaml)\b"
    for word in re.findall(named, " ".join(header_of(path))):
        assert (ROOT / word).is_file() or (path.parent / word).is_file(), word


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_plans_a_run(path, tiny_llama, tiny_tokenizer, tmp_path, capsys):
    """`--dry_run` itself, with tiny stand-ins for pretrained models and data on the Hub."""
    overrides = ["--dataset", "builtin", "--builtin_rows", "40"]
    if path in PRETRAINED:
        tiny_llama(1024).save_pretrained(tmp_path)
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
        tokenizer.save_pretrained(tmp_path)
        overrides += ["--model_name_or_path", str(tmp_path)]
    if "eval_dataset" in yaml.safe_load(path.read_text()):
        overrides += ["--eval_dataset", "builtin"]
    assert main([str(path), "--dry_run", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "effective batch" in shown
    quantised = load_recipe(path, overrides, dry_run=True).model.load_in_4bit
    assert ("ZeRO-3" in shown) == (not quantised)  # 4-bit weights are not sharded
    assert "TRAINED|" in shown


PUBLISHED = [p for p in PRETRAINED if not p.stem.startswith(("study_", "start", "smollm2"))]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_pretrained_recipe_steps_on_128_rows_with_full_precision_masters(path):
    """MetaMath's batch, on as many GPUs as the header names; only frozen weights may be stored in 16 bits."""
    recipe = load_recipe(path, dry_run=True)
    gpus = {"8": 8, "one": 1}[re.search(r"hardware +(\w+) GPU", "\n".join(header_of(path))).group(1)]
    assert batch_of(recipe, gpus) == 128
    assert recipe.model.dtype == ("bfloat16" if recipe.model.use_peft else "float32")


def batch_of(recipe, gpus: int) -> int:
    return recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps * gpus


def test_the_cross_entropy_twin_differs_in_mce_weight_alone():
    mce, ce = (yaml.safe_load((ROOT / "recipes" / name).read_text()) for name in ("llemma7b.yaml", "llemma7b_ce.yaml"))
    assert {k for k in mce | ce if mce.get(k) != ce.get(k)} == {"mce_weight"}


def test_the_headline_recipe_is_the_papers():
    recipe = load_recipe(ROOT / "recipes" / "llemma7b.yaml", dry_run=True)
    t = recipe.training
    assert batch_of(recipe, gpus=8) == 128
    assert (t.learning_rate, t.lr_scheduler_type, t.warmup_steps) == (2e-5, "cosine", 0.03)
    assert (t.num_train_epochs, t.weight_decay, t.max_length) == (3, 0.0, 512)
    assert (t.mce_weight, t.mce_solver) == (1.0, "krylov")
    assert recipe.model.dtype == "float32"
    assert recipe.data.prompt_template == "metamath"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_deepspeed_files_leave_batch_schedule_and_precision_to_the_recipe(path):
    """A scheduler block replaced the Llemma authors' cosine; a batch size other than the recipe's stops DeepSpeed."""
    config = json.loads(path.read_text())
    zero = config.pop("zero_optimization")
    assert config == {
        "bf16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }
    assert zero["stage"] == int(path.stem[4])
    gathers = zero.get("stage3_gather_16bit_weights_on_model_save", False)
    assert gathers == (zero["stage"] == 3)  # without it a save writes empty shards
    assert ("offload_optimizer" in zero) == path.stem.endswith("offload")


def test_the_fsdp_file_is_version_two_and_names_no_model():
    config = yaml.safe_load((ROOT / "ds_configs" / "fsdp2.yaml").read_text())
    assert config["distributed_type"] == "FSDP"
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert "fsdp_transformer_layer_cls_to_wrap" not in config["fsdp_config"]
    assert "mixed_precision" not in config
