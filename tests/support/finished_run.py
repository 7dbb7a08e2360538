"""A finished run's folder without training one, for tests of cards, checks and pushes."""

import json
from pathlib import Path

import yaml

SCORE = {
    "correct": 9,
    "total": 12,
    "accuracy": 0.75,
    "low": 0.468,
    "high": 0.911,
    "extraction_failures": 1,
    "ungraded": 0,
}


def write_diagnosis(run: Path) -> None:
    """What the card needs of diagnosis.json, with the path of a model on this machine in it."""
    figures = {
        "format": "matrix_llm.diagnosis", "version": 1, "model": {"name": "/home/somebody/base"},
        "rows": {"positions": 4, "rows_used": 2}, "loss": {"all": {"all": {"ce": 2.0, "mce": {"in use": 1.0}}}},
        "gradients": {"in use": {"all": {"all": {"mce": {"hidden": {"cosine": 0.5, "norm_ratio": 1.0}}}}}},
        "head": {"in use": {"mean_cosine": 0.1}}, "reading": ["It forgives half."],
    }  # fmt: skip
    (run / "diagnosis.json").write_text(json.dumps(figures))


def write_run(tmp_path: Path, **summary) -> Path:
    """What the card needs: recipe, results, metrics, and one evaluation, `summary` changing its result file."""
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


def change_recipe(run: Path, **changes) -> None:
    """Set keys of the stored recipe; None removes one."""
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(
        yaml.safe_dump({k: v for k, v in {**settings, **changes}.items() if v is not None})
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
