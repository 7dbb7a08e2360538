"""The model card of a run that was evaluated."""

import json

import yaml
from huggingface_hub import ModelCard

from matrix_llm.hub import main

SCORE = {"correct": 9, "total": 12, "accuracy": 0.75, "low": 0.468, "high": 0.911, "extraction_failures": 1, "ungraded": 0}


def run_folder(tmp_path, **summary):
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    recipe = {"output_dir": str(run), "dataset": "builtin", "model_name_or_path": None, "mce_weight": 1.0, "use_cpu": True, "bf16": False}
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


def test_scores_reach_the_card_and_the_model_index(tmp_path, capsys):
    run = run_folder(tmp_path)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert "| gsm8k | verified | 75.0 % | 46.8 to 91.1 | 12 | metamath | vllm |" in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_value, result.metric_name) == ("openai/gsm8k", 75.0, "accuracy, verified convention")


def test_a_part_of_a_benchmark_is_shown_but_is_no_entry_of_the_model_index(tmp_path):
    run = run_folder(tmp_path, limit=12)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert "| gsm8k | verified | 75.0 %" in card.text
    assert not card.data.eval_results


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err
