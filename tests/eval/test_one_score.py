"""One run with several samples of each problem has one score, wherever it is read."""

import json
import re

import numpy as np
import pytest

from eval.compare import compare
from eval.compare import describe as describe_comparison
from eval.regrade import describe, regrade
from eval.report.page import write_report
from eval.report.scores import grade_rows, summarise
from eval.report.table import score_table
from eval.statistics import clustered_interval, pass_at_k, wilson_interval
from matrix_llm.base.files import write_text
from matrix_llm.publish.finished_run import read_evaluations

RIGHT = [(1, 1, 1, 1)] * 5 + [(0, 1, 1, 0)] * 10 + [(0, 0, 1, 0)] * 12 + [(1, 0, 0, 0)] * 3 + [(0, 0, 0, 0)] * 20
"""Of each problem, which of its samples are right: sample 0 of 8 in 50, all samples of 55 in 200."""


def write_run(run, right, **settings):
    """The files that an evaluation leaves; a wrong sample 2 has no answer at all."""
    rows = [
        {
            "id": f"p{problem}", "sample": sample, "problem": f"How much is {problem}?", "gold": str(problem),
            "subject": None, "level": None, "finish_reason": "stop", "stop_reason": None, "tokens": 3,
            "response": f"#### {problem}" if is_right else ("no idea" if sample == 2 else f"#### {-1 - sample}"),
        }
        for problem, samples in enumerate(right)
        for sample, is_right in enumerate(samples)
    ]  # fmt: skip
    graded = grade_rows(rows, benchmark="gsm8k")
    how = {"benchmark": "gsm8k", "settings": settings, "wall_seconds": 1.0, "versions": {}, "graded": graded}
    summary = summarise(rows, name="gsm8k", generations="gsm8k.jsonl", **how)
    write_text(run / "eval/gsm8k.json", json.dumps(summary))
    write_text(run / "eval/gsm8k.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_report(run / "eval/gsm8k.html", summary, rows, graded)
    return run / "eval/gsm8k.json"


def test_table_page_json_compare_regrade_and_card_say_the_same_of_four_samples(tmp_path):
    file = write_run(tmp_path, RIGHT)
    shares = [sum(samples) / 4 for samples in RIGHT]
    low, high = clustered_interval(shares, [4] * 50)
    accuracy, ends = f"{100 * np.mean(shares):.2f} %", f"{100 * low:.1f} to {100 * high:.1f}"
    assert accuracy == "27.50 %"

    # 1. the JSON
    summary = json.loads(file.read_text())
    score = summary["scores"]["verified"]
    assert (score["accuracy"], score["low"], score["high"]) == (pytest.approx(0.275), low, high)
    assert (score["correct"], score["samples"], score["total"], score["extraction_failures"]) == (55, 200, 50, 23)
    assert summary["pass_at_k"]["1"] == score["accuracy"]
    assert summary["pass_at_k_intervals"]["1"] == [low, high]

    # 2. the terminal
    line = rf"\| verified +\| +{accuracy} \| +{ends} \| +55 / 200 \| +23 \|"
    assert re.search(line, score_table(summary))
    assert re.search(rf"\| pass@1 +\| +{accuracy} \| +{ends} \|", score_table(summary))
    assert re.search(line, describe(regrade(file.with_suffix(".jsonl"), "gsm8k"), show=0))
    assert regrade(file.with_suffix(".jsonl"), "gsm8k")["scores"] == summary["scores"]

    # 3. the page
    page = " ".join(file.with_suffix(".html").read_text().split())
    assert f"<strong>{accuracy}</strong> right (95 % interval {100 * low:.2f} % to {100 * high:.2f} %)" in page
    assert "mean over 50 problems" in page
    assert "55 of 200 samples" in page
    assert f'<td data-name="accuracy">{accuracy}</td><td data-name="95 % interval">{ends}</td>' in page

    # 4. two runs compared, and the model card
    other = write_run(tmp_path / "other", [samples[::-1] for samples in RIGHT])
    result = compare(file, other)
    for side in ("a", "b"):  # the order of the samples is nothing
        assert [result[side][key] for key in ("accuracy", "low", "high", "correct", "samples")] == [
            score[key] for key in ("accuracy", "low", "high", "correct", "samples")
        ]
    assert re.search(rf"\| A \| +{accuracy} \| +{ends} \| +55 \| +200 \|", describe_comparison(result, show=0))
    card = read_evaluations(tmp_path)[0].scores["verified"]
    assert (card.accuracy, card.low, card.high, card.total) == (score["accuracy"], low, high, 50)


def test_pass_at_k_and_the_majority_have_intervals_over_problems(tmp_path):
    summary = json.loads(write_run(tmp_path, RIGHT).read_text())
    for k in (1, 2, 4):
        values = [pass_at_k(4, sum(samples), k) for samples in RIGHT]
        assert summary["pass_at_k"][str(k)] == pytest.approx(np.mean(values))
        assert summary["pass_at_k_intervals"][str(k)] == list(clustered_interval(values, [4 / k] * 50))
    assert summary["pass_at_k_intervals"]["4"] == list(wilson_interval(30, 50))  # solved by any sample, or by none
    # the first answer that at least as many samples give as any other: a wrong sample says nothing, -1, -2 or -4
    majority = summary["majority"]
    assert (majority["low"], majority["high"]) == wilson_interval(majority["correct"], 50)
    assert majority["correct"] == 5 + 10 + 3  # 1 vote against two others, ahead of them only as sample 0


def test_a_pass_at_k_of_problems_that_are_all_alike_is_no_surer_than_n_over_k_samples_of_each(tmp_path):
    summary = json.loads(write_run(tmp_path, [(1, 1, 0, 0)] * 30).read_text())
    assert summary["pass_at_k"]["2"] == pytest.approx(5 / 6)
    low, high = summary["pass_at_k_intervals"]["2"]
    assert (low, high) == pytest.approx(wilson_interval(50, 60))  # 30 problems, 4 / 2 samples of each


@pytest.mark.parametrize(
    ("right", "accuracy"),
    [([(1, 0, 0, 1)], 0.5), ([(0, 0, 0, 0)], 0), ([(1, 1)] * 3, 1), ([(0, 0)] * 30, 0), ([(1, 0)] * 30, 0.5)],
    ids=["one problem", "one problem, all wrong", "all right", "all wrong", "all alike"],
)
def test_awkward_runs_have_an_interval_that_holds_the_score_and_is_no_point(tmp_path, right, accuracy):
    summary = json.loads(write_run(tmp_path, right).read_text())
    score = summary["scores"]["verified"]
    assert score["accuracy"] == accuracy
    assert 0 <= score["low"] <= accuracy <= score["high"] <= 1
    assert score["high"] - score["low"] > 1 / (4 * len(right))
    for low, high in summary["pass_at_k_intervals"].values():
        assert 0 <= low < high <= 1
    result = compare(tmp_path / "eval/gsm8k.json", tmp_path / "eval/gsm8k.json")
    assert (result["difference"], result["p"]) == (0, 1)


def test_with_one_sample_the_interval_is_wilsons_and_nothing_else_is_added(tmp_path):
    summary = json.loads(write_run(tmp_path, [(1,)] * 7 + [(0,)] * 4).read_text())
    score = summary["scores"]["verified"]
    assert (score["low"], score["high"]) == wilson_interval(7, 11)
    assert (score["correct"], score["samples"], score["total"]) == (7, 11, 11)
    assert not {"pass_at_k", "pass_at_k_intervals", "majority"} & set(summary)
    assert summary["verdicts"] == {f"p{i}": i < 7 for i in range(11)}
    assert "samples of each: 1" in score_table(summary)
    assert "clustered" not in score_table(summary) + (tmp_path / "eval/gsm8k.html").read_text()
