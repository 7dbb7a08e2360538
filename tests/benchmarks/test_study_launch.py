"""Large runs of the study: their commands, their submission, and their results read back."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.study.collect import collect
from benchmarks.study.command import main
from benchmarks.study.design import StudyError
from benchmarks.study.folder import PROBLEMS, RUNS
from benchmarks.study.launch import SAMPLED, SUBMITTED, PlannedRun, submit
from matrix_llm.base.files import read_jsonl
from matrix_llm.config import load_recipe
from matrix_llm.run.run_folder import NON_FINITE
from tests.support.paths import ROOT
from tests.support.study import MINIMAL_STUDY_RECIPE


@pytest.mark.parametrize("how", ["local", "slurm"])
def test_plan_prints_commands_that_parse(how, capsys):
    arguments = [
        "plan",
        "recipes/llemma7b.yaml",
        "--seeds",
        "2",
        "--arms",
        "main,input",
        "--output",
        "runs/big",
        "--launch",
    ]
    arguments += [how, "--", "--gradient_accumulation_steps", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    training = [line for line in lines if "llemma7b.yaml" in line]
    assert len(training) == 6
    folders = []
    for line in training:
        words = shlex.split(line.removesuffix(")"))
        overrides = words[words.index("recipes/llemma7b.yaml") + 1 :]
        recipe = load_recipe(ROOT / "recipes" / "llemma7b.yaml", overrides, dry_run=True)
        assert recipe.training.gradient_accumulation_steps == 2
        folders.append((recipe.training.output_dir, recipe.training.seed, recipe.training.mce_weight))
    assert folders[:2] == [("runs/big/ce-s1", 1, 0.0), ("runs/big/mce-s1", 1, 1.0)]
    assert sum("eval/hendrycks_math.py" in line for line in lines) == 6
    assert sum("--n 8 --temperature" in line for line in lines) == 6
    assert sum("eval/gsm8k.py" in line for line in lines) == 12  # greedily, and with samples
    assert sum("-m benchmarks.study.measure" in line for line in lines) == 6
    assert all("afterok" in line for line in lines if "eval/" in line) or how == "local"
    assert main(arguments[1:]) == 0  # a recipe alone means plan
    assert capsys.readouterr().out.splitlines() == lines


def test_submit_hands_each_run_to_sbatch_once(monkeypatch, tmp_path):
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\necho "77;cluster"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    arguments = ["plan", "recipes/llemma7b.yaml", "--seeds", "1", "--launch", "slurm", "--submit", "--output"]
    arguments.append(str(tmp_path / "out"))
    assert main(arguments) == main(arguments) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (
        len(calls) == 10
    )  # two runs with a training, three evaluations and a measurement, and nothing the second time
    assert "docs/slurm.sh" in calls[0]
    assert calls[1].startswith("--dependency=afterok:77 ")


def test_submit_goes_on_after_a_run_that_diverged_and_stops_at_one_that_failed(tmp_path):
    (tmp_path / "ce-s1").mkdir()
    (tmp_path / "ce-s1" / NON_FINITE).write_text("The loss is nan at step 3.")
    planned = [PlannedRun("ce-s1", ["false"]), PlannedRun("ce-s2", ["echo no space >&2", "false"])]
    with pytest.raises(StudyError, match=r"ce-s2 failed: no space"):
        submit(planned, tmp_path)
    assert [row["run"] for row in read_jsonl(tmp_path / SUBMITTED)] == ["ce-s1"]


def test_commands_start_from_any_folder(tmp_path):
    for script in ("study.py", "lm_head.py"):
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    wrong = [sys.executable, str(ROOT / "benchmarks" / "study.py"), "report", "--output", "nowhere"]
    done = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: nowhere")


@pytest.fixture
def test_sets(tmp_path):
    """Four problems in GSM8K's and in MATH's layout."""
    files, about = [], {"level": "Level 1", "subject": "Algebra"}
    for name, make in (
        ("gsm8k", lambda n: {"question": f"{n} and one?", "answer": f"So\n#### {n + 1}"}),
        ("math", lambda n: {"problem": f"{n}+1?", "solution": f"$\\boxed{{{n + 1}}}$", **about}),
    ):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "test.jsonl")
        files[-1].write_text("".join(json.dumps(make(n)) + "\n" for n in range(4)))
    return files


@pytest.mark.slow
def test_a_planned_run_is_trained_scored_collected_and_reported(tmp_path, monkeypatch, test_sets):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    recipe, out = tmp_path / "minimal.yaml", tmp_path / "big"
    recipe.write_text(MINIMAL_STUDY_RECIPE)
    arguments = ["plan", str(recipe), "--seeds", "1", "--arms", "ce", "--launcher", shlex.quote(sys.executable)]
    arguments += ["--output", str(out), "--gsm8k", str(test_sets[0]), "--math", str(test_sets[1])]
    arguments += ["--evaluation", "--engine transformers --max_tokens 4", "--samples", "2", "--submit"]
    assert main(arguments) == 0

    # the primary figure is of greedy answers: samples in their place are refused
    shutil.copytree(out / "ce-s1", out / "ce-s3")
    shutil.rmtree(out / "ce-s3" / "eval")
    shutil.copytree(out / "ce-s3" / SAMPLED, out / "ce-s3" / "eval")
    with pytest.raises(StudyError, match=r"samples.*--temperature 0"):
        collect(out, ["gsm8k"])
    shutil.rmtree(out / "ce-s3")
    (out / RUNS).unlink()
    (out / PROBLEMS).unlink()

    # finished runs are added once, unfinished ones not yet
    assert collect(out) == 1
    shutil.copytree(out / "ce-s1", out / "mce-s1")  # a second run that ended in the same weights
    (out / "mce-s2").mkdir()
    assert collect(out) == 1
    assert collect(out) == 0
    (out / "mce-s2" / NON_FINITE).write_text("The loss is nan at step 3.")
    assert collect(out) == 1

    assert main(["report", "--output", str(out), "--page", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "accuracy, GSM8K" in page
    assert "accuracy, MATH" in page
    assert "non-finite: mce seed 2" in page
    assert "MATH, described without a verdict: mce minus ce" in page
    row = read_jsonl(out / RUNS)[0]
    likelihood = {"ce_heldout", "ece_token", "rank_hidden", "rank_head"}
    assert likelihood | {"pass@2_gsm8k", "distinct_1_gsm8k", "accuracy_math"} <= row.keys()
    assert 0 < row["distinct_1_gsm8k"] <= 1
