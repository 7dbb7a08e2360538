"""Every recipe reads, and its header says what a reader needs."""

from pathlib import Path

import pytest
import yaml

from matrix_llm.config import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_reads_and_says_what_it_takes(path):
    recipe = load_recipe(path, dry_run=True)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "hardware" in header
    assert "command" in header
    assert f"recipes/{path.name}" in header
    assert recipe.training.mce_solver == "krylov"


def test_the_cross_entropy_twin_differs_in_mce_weight_alone():
    mce, ce = (yaml.safe_load((RECIPES[0].parent / name).read_text()) for name in ("llemma7b.yaml", "llemma7b_ce.yaml"))
    assert {k for k in mce | ce if mce.get(k) != ce.get(k)} == {"mce_weight"}


def test_the_headline_recipe_is_the_papers():
    recipe = load_recipe(RECIPES[0].parent / "llemma7b.yaml", dry_run=True)
    t = recipe.training
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps * 8 == 128
    assert (t.learning_rate, t.weight_decay, t.warmup_steps, t.num_train_epochs, t.max_length) == (2e-5, 0.0, 0.03, 3, 512)
    assert t.lr_scheduler_type == "cosine"
    assert recipe.model.dtype == "float32"
    assert recipe.data.prompt_template == "metamath"
