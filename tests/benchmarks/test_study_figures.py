"""Figures of one run, by hand."""

import json
import math

import pytest

from benchmarks.study import figures


def test_ece_by_hand():
    confidences, right = [0.05, 0.05, 0.62, 0.66, 1.0], [False, True, True, False, True]
    # bin (0, 1/15]: 2 of 5, |0.5 - 0.05|; bin (9/15, 10/15]: 2 of 5, |0.5 - 0.64|; bin (14/15, 1]: right, |1 - 1|
    assert figures.expected_calibration_error(confidences, right) == pytest.approx(0.4 * 0.45 + 0.4 * 0.14)
    assert math.isnan(figures.expected_calibration_error([], []))


def test_diversity_by_hand():
    assert figures.distinct_n(["a b c", "a b c"], 1) == 0.5
    assert math.isnan(figures.distinct_n(["a"], 2))
    assert figures.distinct_answers(["1", "1", None, None]) == 0.5


def test_a_resumed_run_has_no_seconds_because_it_knows_only_those_since_its_last_start(tmp_path):
    for resumed, expected in ((None, 9.0), ("checkpoint-2", None)):
        (tmp_path / "results.json").write_text(json.dumps({"train_seconds": 9.0, "steps": 4, "resumed_from": resumed}))
        assert figures.training_figures(tmp_path)["train_seconds"] == expected


def test_curves_hold_the_steps_that_logged_them_and_the_norm_is_a_mean(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"steps": 2}))
    entries = [{"step": 1, "ce": 2.0, "grad_norm": 1.0}, {"step": 2, "effective_rank": 7.0, "grad_norm": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = figures.training_figures(tmp_path)
    assert (found["curve_ce"], found["curve_rank_head"], found["grad_norm"]) == ([[1, 2.0]], [[2, 7.0]], 1.5)
