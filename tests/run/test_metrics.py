"""Files that are whole or absent, the metrics file, the plan's arithmetic and the model card."""

import doctest
import json

import pytest
from transformers import AutoConfig

from matrix_llm.base import files
from matrix_llm.base.files import atomic_path, read_jsonl, write_text
from matrix_llm.config import load_recipe
from matrix_llm.data.selection import DataReport
from matrix_llm.plan import steps as plan
from matrix_llm.plan.steps import count_parameters, masked_sample, plan_steps
from matrix_llm.publish.push import model_card
from matrix_llm.run.metrics import plot_losses

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
REPORT = DataReport("train", 1000, 1000, 0, 0, 0, 50_000, 30_000, 90, 50.0)


@pytest.fixture
def recipe(tmp_path):
    def load(**changes):
        settings = {
            "model_config": CONFIG,
            "tokenizer_vocab_size": 300,
            "dataset": "builtin",
            "use_cpu": True,
            "bf16": False,
            **changes,
        }
        (tmp_path / "r.yaml").write_text(json.dumps(settings))
        return load_recipe(tmp_path / "r.yaml", dry_run=True)

    return load


def test_doctests():
    assert doctest.testmod(files).failed == 0
    assert doctest.testmod(plan).failed == 0


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_off_metrics_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}]
    assert read_jsonl(tmp_path / "none") == []


def test_a_plot_needs_no_mce_and_no_entries(tmp_path):
    for entries in ([], [{"step": 1, "ce": 2.0}], [{"step": 1, "ce": 2.0, "mce": 1.0}, {"step": 1, "eval_ce": 2.0}]):
        plot_losses(entries, tmp_path / "p.png", title="t")
        assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "processes", "batch", "steps"),
    [
        ({"per_device_train_batch_size": 8, "num_train_epochs": 2}, 1, 8, 250),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 3}, 8, 128, 24),
        ({"per_device_train_batch_size": 8, "max_steps": 7}, 2, 16, 7),
    ],
)
def test_step_arithmetic_is_the_trainers(recipe, changes, processes, batch, steps):
    planned = plan_steps(recipe(**changes), REPORT, processes)
    assert (planned.effective_batch, planned.steps) == (batch, steps)


def test_a_tied_head_counts_once():
    config = AutoConfig.for_model(**CONFIG, vocab_size=300, tie_word_embeddings=True)
    untied = AutoConfig.for_model(**CONFIG, vocab_size=300, tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(config) == 300 * 64


def test_the_sample_shows_what_is_trained(tiny_tokenizer):
    ids = tiny_tokenizer("Question: 12")["input_ids"]
    lines = masked_sample({"input_ids": ids, "labels": [-100] * 2 + ids[2:]}, tiny_tokenizer)
    assert [line[:8] for line in lines] == ["masked |", "TRAINED|"]
    assert "".join(line[9:] for line in lines).endswith("12")


def test_the_card_says_what_was_measured_and_nothing_else(recipe):
    card = model_card(recipe(mce_weight=0.5), [{"step": 1, "ce": 1.25, "mce": 1.0}], {"steps": 1})
    assert "plus 0.5 times the token-level matrix cross-entropy" in card.text
    assert "| last logged ce | 1.25 |" in card.text
    assert "accuracy" not in card.text
    assert card.data.to_dict()["tags"][-1] == "matrix-cross-entropy"
    plain = model_card(recipe(mce_weight=0.0), [], {})
    assert "cross-entropy alone" in plain.text
    assert "matrix-cross-entropy" not in plain.data.to_dict()["tags"]
