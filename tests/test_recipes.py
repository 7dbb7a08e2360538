"""Every recipe reads, its header says what a reader needs, and every launch file says what it claims."""

import json

import pytest
import yaml

from matrix_llm.config import load_recipe
from matrix_llm.train import main
from tests.support.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PRETRAINED = [p for p in RECIPES if "model_name_or_path" in yaml.safe_load(p.read_text())]


def header_of(path):
    return [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_reads_and_says_what_it_takes(path):
    recipe = load_recipe(path, dry_run=True)
    header = header_of(path)
    words = ["hardware", "command", *(["reproduces", "hours", "score"] if path in PRETRAINED else [])]
    for word in words:
        assert any(line.startswith(word) for line in header), word
    assert f"recipes/{path.name}" in " ".join(header)
    assert recipe.training.mce_solver == "krylov"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_file_that_a_header_names_exists(path):
    for word in " ".join(header_of(path)).split():
        if word.startswith(("ds_configs/", "recipes/", "matrix_llm/")):
            assert (ROOT / word.rstrip(".,;:)")).is_file(), word


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_plans_a_run(path, tiny_llama, tiny_tokenizer, tmp_path, capsys):
    """`--dry_run` itself; a pretrained model and its data, which are far away, give place to tiny ones."""
    overrides = ["--dataset", "builtin", "--builtin_rows", "40"]
    if path in PRETRAINED:
        tiny_llama(512).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        overrides += ["--model_name_or_path", str(tmp_path)]
    elif "eval_dataset" in yaml.safe_load(path.read_text()):
        overrides += ["--eval_dataset", "builtin"]
    assert main([str(path), "--dry_run", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "effective batch" in shown
    assert ("ZeRO-3" in shown) == (
        not load_recipe(path, dry_run=True).model.load_in_4bit
    )  # a 4-bit base is not sharded
    assert "TRAINED|" in shown


@pytest.mark.parametrize("path", [p for p in PRETRAINED if not p.stem.startswith("study_")], ids=lambda p: p.stem)
def test_a_pretrained_recipe_steps_on_128_rows_with_full_precision_masters(path):
    """MetaMath's batch, whatever the number of GPUs its header speaks of; only a frozen base may be stored in 16 bits."""
    recipe = load_recipe(path, dry_run=True)
    t = recipe.training
    gpus = 8 if any(line.startswith("hardware    8 GPUs") for line in header_of(path)) else 1
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps * gpus == 128
    assert recipe.model.dtype == ("bfloat16" if recipe.model.use_peft else "float32")


def test_the_cross_entropy_twin_differs_in_mce_weight_alone():
    mce, ce = (yaml.safe_load((ROOT / "recipes" / name).read_text()) for name in ("llemma7b.yaml", "llemma7b_ce.yaml"))
    assert {k for k in mce | ce if mce.get(k) != ce.get(k)} == {"mce_weight"}


def test_the_headline_recipe_is_the_papers():
    recipe = load_recipe(ROOT / "recipes" / "llemma7b.yaml", dry_run=True)
    t = recipe.training
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps * 8 == 128
    assert (t.learning_rate, t.weight_decay, t.warmup_steps, t.num_train_epochs, t.max_length) == (
        2e-5,
        0.0,
        0.03,
        3,
        512,
    )
    assert t.lr_scheduler_type == "cosine"
    assert recipe.model.dtype == "float32"
    assert recipe.data.prompt_template == "metamath"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_deepspeed_files_leave_batch_schedule_and_precision_to_the_recipe(path):
    """A scheduler block here silently replaced the Llemma authors' cosine; a batch key must match the recipe or DeepSpeed stops."""
    config = json.loads(path.read_text())
    assert set(config) == {
        "zero_optimization", "bf16", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "gradient_clipping",
    }  # fmt: skip
    assert {
        config[k] for k in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "gradient_clipping")
    } == {"auto"}
    assert config["bf16"] == {"enabled": "auto"}
    zero = config["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (
        zero["stage"] == 3
    )  # else a save writes empty shards
    assert ("offload_optimizer" in zero) == path.stem.endswith("offload")


def test_the_fsdp_file_is_version_two_and_names_no_model():
    config = yaml.safe_load((ROOT / "ds_configs" / "fsdp2.yaml").read_text())
    assert config["distributed_type"] == "FSDP"
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert "fsdp_transformer_layer_cls_to_wrap" not in config["fsdp_config"]
    assert "mixed_precision" not in config
