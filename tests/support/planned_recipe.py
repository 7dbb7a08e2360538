"""A small recipe loaded for planning: nothing is trained, no GPU is asked for."""

import json
from pathlib import Path

from matrix_llm.config import Recipe, load_recipe

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def planned_recipe(folder: Path, **changes) -> Recipe:
    """A Llama of `SMALL` from scratch on the built-in rows, in float32 on the CPU, with settings changed."""
    settings = {
        "model_config": SMALL,
        "tokenizer_vocab_size": 300,
        "dataset": "builtin",
        "use_cpu": True,
        "bf16": False,
        **changes,
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return load_recipe(folder / "recipe.yaml", dry_run=True)
