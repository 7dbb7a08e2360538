"""The study's bookkeeping: resuming, failures, and setups that must not mix; then a small study from end to end."""

import json
from dataclasses import replace

import pytest

from benchmarks.study import run
from benchmarks.study.command import main
from benchmarks.study.design import BY_NAME, StudyError, choose_arms
from benchmarks.study.folder import PROBLEMS, RUNS, SETUP, append_row
from matrix_llm.base.files import read_jsonl, write_text
from matrix_llm.run.run_folder import NON_FINITE
from tests.support.study import MINIMAL_STUDY_RECIPE


class FakeRuns:
    """`run_missing` on a recipe whose runs take no time; the run (mce, 2) is killed the first time."""

    def __init__(self, folder):
        self.made, self.output, self.recipe = [], folder / "out", folder / "recipe.yaml"
        self.recipe.write_text("dataset: builtin\n")

    def train_and_measure(self, study, arm, seed):
        self.made.append((arm.name, seed))
        if self.made[-1] == ("mce", 2) and self.made.count(("mce", 2)) == 1:
            raise StudyError("killed")
        key = {"arm": arm.name, "seed": seed}
        return run.Outcome({**key, "status": "done"}, {**key, "set": "heldout", "correct": "01"})

    def run(self, seeds=(1, 2, 3), **changes):
        study = replace(run.Study(self.recipe, self.output), **changes)
        return run.run_missing(study, seeds, choose_arms("main"))


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    fake = FakeRuns(tmp_path)
    monkeypatch.setattr(run, "train_and_measure", fake.train_and_measure)
    return fake


def test_resuming_repeats_no_row_and_loses_none(fake_runs):
    with pytest.raises(StudyError, match="killed"):
        fake_runs.run()
    with (fake_runs.output / RUNS).open("a") as file:
        file.write('{"arm": "ce", "se')  # a kill in the middle of a line
    assert fake_runs.run() == 3
    rows = read_jsonl(fake_runs.output / RUNS)
    everything = [(arm, seed) for arm in ("ce", "mce") for seed in (1, 2, 3)]
    assert sorted((row["arm"], row["seed"]) for row in rows) == everything
    assert len(read_jsonl(fake_runs.output / PROBLEMS)) == 6
    assert fake_runs.run() == 0
    assert len(fake_runs.made) == 7


def test_rows_of_two_setups_never_meet(fake_runs, tmp_path):
    fake_runs.run(seeds=[1])
    with pytest.raises(StudyError, match=r"overrides.*another --output"):
        fake_runs.run(overrides=["--learning_rate", "1"])
    text = tmp_path / "text.jsonl"
    text.write_text("{}\n")
    with pytest.raises(StudyError, match=r"measuring.*another --output"):
        fake_runs.run(measuring=["--text", str(text)])
    assert str(tmp_path) not in (fake_runs.output / SETUP).read_text()
    fake_runs.recipe.write_text("# a remark\ndataset: builtin\n")
    assert fake_runs.run(seeds=[1]) == 0


def test_rows_of_an_arm_that_has_changed_since_are_refused(fake_runs):
    append_row(fake_runs.output / RUNS, {"arm": "mce", "seed": 1, "settings": {"mce_weight": 7.0}, "status": "done"})
    with pytest.raises(StudyError, match=r"mce.*7\.0.*--output"):
        fake_runs.run()


@pytest.mark.parametrize("diverged", [False, True])
def test_a_run_that_diverged_is_a_row_and_a_run_that_failed_is_an_error(monkeypatch, tmp_path, diverged):
    def fail(command, log):
        write_text(log, "words\nno space left\n")
        if diverged:
            write_text(tmp_path / "mce-s1" / NON_FINITE, "The loss is nan at step 3.")
        return 1

    monkeypatch.setattr(run, "run_logged", fail)
    study = run.Study(tmp_path / "x.yaml", tmp_path)
    if diverged:
        outcome = run.train_and_measure(study, BY_NAME["mce"], 1)
        assert (outcome.row["status"], outcome.verdicts) == ("diverged", None)
    else:
        with pytest.raises(StudyError, match=r"mce-s1 failed: no space left.*mce-s1\.log"):
            run.train_and_measure(study, BY_NAME["mce"], 1)


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_reports(tmp_path):
    recipe, out, text = tmp_path / "minimal.yaml", tmp_path / "study", tmp_path / "test.jsonl"
    recipe.write_text(MINIMAL_STUDY_RECIPE)
    text.write_text(json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"}) + "\n")
    sizes = "--problems 12 --sample_problems 2 --likelihood_rows 8 --max_new_tokens 8"
    arguments = ["run", str(recipe), "--output", str(out), "--seeds", "1", "--workers", "2", "--text", str(text)]
    arguments += ["--measure", sizes]
    assert main(arguments) == 0
    rows = {row["arm"]: row for row in read_jsonl(out / RUNS)}
    assert set(rows) == {"ce", "mce"}
    # same weights, same rows, same order: the first step's CE is the same, and only then do the losses part
    assert rows["ce"]["curve_ce"][0] == pytest.approx(rows["mce"]["curve_ce"][0], abs=1e-4)
    assert rows["ce"]["ce_heldout"] != rows["mce"]["ce_heldout"]
    assert [step for step, _ in rows["mce"]["curve_rank_hidden"]] == [2, 3]
    assert not list(out.glob("*/checkpoint-*"))
    assert main(arguments) == 0
    assert len(read_jsonl(out / RUNS)) == 2
    assert main(["report", "--output", str(out), "--page", str(tmp_path / "page.md")]) == 0
    assert "one seed only" in (tmp_path / "page.md").read_text()
