"""Metrics that choose, stop or slow a run must exist and be measured."""

import pytest

from matrix_llm.base.errors import RecipeError
from matrix_llm.checks.evaluation import check_metric
from matrix_llm.config import MatrixConfig

BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("metric", ["eval_loss", "loss", "eval_ce", "mce", "eval_entropy", "mean_token_accuracy"])
def test_a_metric_of_held_out_rows_is_taken(load, evaluated, metric):
    assert load(**evaluated, **BEST, metric_for_best_model=metric).training.metric_for_best_model == metric


@pytest.mark.parametrize(
    "reader", [BEST, {"save_strategy": "best"}, {"early_stopping_patience": 2}, {"lr_scheduler_type": "greedy"}]
)
@pytest.mark.parametrize("metric", ["bleu", "accuracy", "eval_cee", "eval_runtime"])
def test_a_metric_that_will_not_exist_is_refused(load, evaluated, reader, metric):
    with pytest.raises(
        RecipeError, match=f"metric_for_best_model='{metric}' is not measured.*eval_mean_token_accuracy"
    ):
        load(**evaluated, **reader, metric_for_best_model=metric)


@pytest.mark.parametrize("other", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=str)
@pytest.mark.parametrize(("metric", "instead"), [("eval_ce", "eval_loss"), ("mce", "loss")])
def test_ce_and_mce_are_not_metrics_of_a_run_that_trains_another_loss(load, evaluated, other, metric, instead):
    settings = {**evaluated, **BEST, "mce_weight": 0, **other}
    with pytest.raises(RecipeError, match=f"'{metric}' is not measured with {next(iter(other))}.*: {instead}`"):
        load(**settings, metric_for_best_model=metric)
    assert load(**settings, metric_for_best_model=instead)


def test_named_evaluation_sets_have_metrics_of_their_own():
    training = MatrixConfig("x", use_cpu=True, bf16=False, eval_strategy="steps", early_stopping_patience=2,
                            metric_for_best_model="eval_math_ce")  # fmt: skip
    check_metric(training, {"eval_dataset": {"math": "m.jsonl", "gsm8k": "g.jsonl"}})
    for sets in ({"gsm8k": "g.jsonl"}, {"path": "m.jsonl"}, "m.jsonl"):
        with pytest.raises(RecipeError, match=r"metric_for_best_model='eval_math_ce' is not measured"):
            check_metric(training, {"eval_dataset": sets})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric_for_best_model": "ce"}, "metric_for_best_model='ce' does nothing.*load_best_model_at_end"),
        ({"greater_is_better": True}, "greater_is_better=True does nothing"),
        ({"greater_is_better": False}, "greater_is_better=False does nothing"),
        ({"save_strategy": "best"}, "save_strategy='best' needs held-out rows.*eval_strategy: steps"),
        ({"early_stopping_patience": 2}, "early_stopping_patience=2.*eval_strategy"),
        ({**BEST, "save_strategy": "epoch"}, "load_best_model_at_end=True.*Write `eval_strategy: epoch`"),
    ],
)
def test_a_metric_that_nothing_reads_or_nothing_measures_is_refused(load, settings, words):
    with pytest.raises(RecipeError, match=words):
        load(**settings)


def test_a_best_checkpoint_needs_a_metric_and_checkpoints_at_evaluations(load, evaluated):
    with pytest.raises(RecipeError, match=r"save_strategy='best' needs a metric.*metric_for_best_model: eval_loss"):
        load(**evaluated, save_strategy="best")
    with pytest.raises(RecipeError, match=r"early_stopping_patience=2.*metric_for_best_model: eval_loss"):
        load(**evaluated, early_stopping_patience=2)
    with pytest.raises(RecipeError, match=r"load_best_model_at_end=True.*'epoch'.*Write `save_strategy: steps`"):
        load(**evaluated, load_best_model_at_end=True, save_strategy="epoch")
    with pytest.raises(RecipeError, match=r"load_best_model_at_end=True.*3.*multiple of"):
        load(**evaluated, load_best_model_at_end=True, save_strategy="steps", save_steps=3)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_plateau_is_looked_for_in_the_metrics_own_direction(load, evaluated, kind):
    settings = {**evaluated, "lr_scheduler_type": kind}
    training = load(**settings, metric_for_best_model="mean_token_accuracy").training
    assert training.lr_scheduler_kwargs == {"mode": "max"}
    assert load(**settings, metric_for_best_model="ce").training.lr_scheduler_kwargs is None
