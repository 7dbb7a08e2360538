"""The table that ends `make demo-pretrained`: figures as eval/ has them, and a refusal where there are none."""

import json

import pytest

from benchmarks.before_after import main
from eval.report.scores import summarise
from matrix_llm.base.statistics import wilson_interval


def write_scores(folder, answers, name="gsm8k_builtin", cut=0, seconds=30.0):
    """What eval/gsm8k.py leaves, where problem i has the gold answer i and the model answers `answers[i]`."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"p{index}", "sample": 0, "problem": f"How much is {index}?", "gold": str(index),
            "response": f"The answer is: {answer}", "finish_reason": "length" if index < cut else "stop",
        }
        for index, answer in enumerate(answers)
    ]  # fmt: skip
    settings = {"model": str(folder), "max_tokens": 192}
    rest = {"name": name, "generations": f"{name}.jsonl"}
    summary = summarise(rows, benchmark="gsm8k", settings=settings, wall_seconds=seconds, versions={}, **rest)
    (folder / "eval" / f"{name}.json").write_text(json.dumps(summary))
    (folder / "eval" / f"{name}.settings.json").write_text(json.dumps(settings))
    (folder / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folders(tmp_path):
    """A base model with 1 of 8 right, and a run of it with 7 of 8 right."""
    before, after = tmp_path / "base", tmp_path / "run"
    write_scores(before, [0, *[99] * 7], cut=3, seconds=90.0)
    write_scores(after, [*range(7), 99])
    metrics = [
        {"step": 0, "eval_ce": 1.5, "eval_mce": 1.25},
        {"step": 5, "loss": 1.0, "peak_memory_gib": 3.26},
        {"step": 9, "eval_ce": 0.5, "eval_mce": 0.375},
    ]
    (after / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    (after / "results.json").write_text(json.dumps({"steps": 9, "train_seconds": 61.4}))
    return before, after


def test_the_table_has_both_accuracies_with_wilsons_intervals_and_the_paired_gain(folders, capsys):
    assert main([str(folder) for folder in folders]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("kinds it trained on"))
    for correct in (1, 7):
        low, high = wilson_interval(correct, 8)
        assert f"{100 * correct / 8:.1f} % ({100 * low:.1f} to {100 * high:.1f})" in line
    assert "+75.0 points" in shown
    assert "p = 0.03" in shown  # six problems flip, all one way: 2 / 2^6
    assert "cut at 192 tokens: 3 answers before, 0 after" in shown
    assert "steps 0 -> 9: CE 1.500 -> 0.500, MCE 1.250 -> 0.375" in shown
    assert "9 steps in 61 s, 3.3 GiB" in shown
    assert "scoring: 90 s before (what was on file takes none), 30 s after" in shown
    assert f"{folders[1]}/README.md" in shown


def test_three_problems_are_shown_with_both_answers_and_their_verdicts(folders, capsys):
    assert main([str(folder) for folder in folders]) == 0
    shown = capsys.readouterr().out
    assert [f"How much is {index}?" in shown for index in range(4)] == [True, True, True, False]
    assert "before, wrong: The answer is: 99" in shown
    assert "after, right: The answer is: 1" in shown


def test_answers_cannot_write_to_the_terminal(folders, capsys):
    before, after = folders
    write_scores(after, ["\x1b[31m1", *range(1, 8)])
    assert main([str(before), str(after)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_folders_without_scores_on_the_same_problems_are_refused_in_one_line(folders, tmp_path, capsys):
    before, _ = folders
    other = tmp_path / "other"
    write_scores(other, [1], name="gsm8k_builtin_new_kinds")
    for after in (other, tmp_path / "nothing"):
        assert main([str(before), str(after)]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert str(after) in shown
        assert "eval/gsm8k.py" in shown
