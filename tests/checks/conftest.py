"""Shared by the tests of early checks: `load(key=value, ...)` reads a tiny recipe with these settings."""

import pytest
import yaml

from matrix_llm.config import load_recipe
from tests.support.tiny import TINY


@pytest.fixture
def load(tmp_path):
    def read(*overrides, dry_run=False, **settings):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "run"), **settings}))
        return load_recipe(path, overrides, dry_run=dry_run)

    return read


# evaluation during training, with a checkpoint at each
EVALUATED = {"eval_dataset": "builtin", "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture
def evaluated():
    return dict(EVALUATED)
