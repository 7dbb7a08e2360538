"""benchmarks/study.py: what it measures, its bookkeeping, its verdicts on rows whose truth is known, a small study."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import study
import study_launch
import study_measure
import study_report
import study_statistics as statistics

from matrix_llm.base.files import write_text
from matrix_llm.config import load_recipe
from matrix_llm.run.decode import generate_greedy
from matrix_llm.run.run_folder import NON_FINITE

# --- measuring ---------------------------------------------------------------------------------------------------------------------


def test_greedy_decoding_is_that_of_generate(tiny_llama, tiny_tokenizer):
    model, prompts = (
        tiny_llama(),
        [f"Question: Mia has {n} pens and buys more. How many?\nAnswer:" for n in (2, 31, 456)] + ["A"],
    )
    sizes = study_measure.Sizes(max_new_tokens=24, batch_size=3)
    found = study_measure.decode(model, tiny_tokenizer, prompts, sizes=sizes)
    texts = [study_measure.to_response(tiny_tokenizer, *each).text for each in found]
    assert texts == generate_greedy(model, tiny_tokenizer, prompts, max_new_tokens=24, batch_size=2)


def test_an_answers_confidence_is_that_of_the_tokens_after_the_marker(tiny_tokenizer):
    ids = tiny_tokenizer("So it is 42.\nThe answer is: 42", add_special_tokens=False)["input_ids"] + [
        tiny_tokenizer.eos_token_id
    ]
    after = len(tiny_tokenizer(" 42", add_special_tokens=False)["input_ids"]) + 1
    chances = [0.5] * (len(ids) - after) + [0.9] * after
    found = study_measure.to_response(tiny_tokenizer, ids, chances)
    assert (found.answer, found.confidence) == ("42", pytest.approx(0.9**after))
    assert study_measure.to_response(tiny_tokenizer, ids[:3], chances[:3]).answer is None


def test_likelihood_is_the_models_own_loss(tiny_llama, tiny_tokenizer):
    import torch

    model, texts = (
        tiny_llama(),
        [("Question: 2?\nAnswer:", " 2 pens"), ("Question: Mia has 12?\nAnswer:", " The answer is: 42")],
    )
    total = count = 0
    for ids, mask, labels in study_measure._batches(tiny_tokenizer, texts, 100, 1):
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
        kept = int((labels[:, 1:] != -100).sum())
        total, count = total + loss * kept, count + kept
    found = study_measure.likelihood(model, tiny_tokenizer, texts)
    assert (found["ce"], found["tokens"]) == (pytest.approx(total / count, rel=1e-5), count)
    assert 1 <= study_measure.hidden_effective_rank(model, tiny_tokenizer, texts) <= 64


# --- bookkeeping -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """`run` on a recipe whose runs take no time; the list of what was run, and a function to call it."""
    recipe, made = tmp_path / "recipe.yaml", []
    recipe.write_text("dataset: builtin\n")

    def one_run(recipe, arm, seed, output, extra, measuring):
        made.append((arm.name, seed))
        if made[-1] == ("mce", 2) and made.count(("mce", 2)) == 1:
            raise study.StudyError("killed")
        return {"arm": arm.name, "seed": seed, "status": "done"}, {
            "arm": arm.name,
            "seed": seed,
            "set": "heldout",
            "correct": "01",
        }

    monkeypatch.setattr(study, "one_run", one_run)

    def call(**changes):
        how = {"seeds": [1, 2, 3], "arms": study.choose_arms("main"), "workers": 1, **changes}
        return study.run(recipe, tmp_path / "out", **how)

    return made, call, tmp_path / "out"


def test_resuming_repeats_no_row_and_loses_none(fake_runs):
    made, call, out = fake_runs
    with pytest.raises(study.StudyError, match="killed"):
        call()
    with (out / study.RUNS).open("a") as file:
        file.write('{"arm": "ce", "se')  # a kill in the middle of a line
    assert call() == 3
    rows = study.read_jsonl(out / study.RUNS)
    assert sorted((row["arm"], row["seed"]) for row in rows) == [
        (arm, seed) for arm in ("ce", "mce") for seed in (1, 2, 3)
    ]
    assert len(study.read_jsonl(out / study.PROBLEMS)) == 6
    assert call() == 0
    assert len(made) == 7


def test_rows_of_two_setups_never_meet(fake_runs):
    _, call, out = fake_runs
    call(seeds=[1])
    with pytest.raises(study.StudyError, match="study of another overrides"):
        call(extra=["--learning_rate", "1"])
    text = out.parent / "text.jsonl"
    text.write_text("{}\n")
    with pytest.raises(study.StudyError, match="study of another measuring"):
        call(measuring=["--text", str(text)])
    assert str(out.parent) not in (out / study.SETUP).read_text()
    (out.parent / "recipe.yaml").write_text("# a remark\ndataset: builtin\n")
    assert call(seeds=[1]) == 0


def test_a_run_that_diverged_is_a_row_and_a_run_that_failed_is_an_error(monkeypatch, tmp_path):
    def fails_with(words, marker=False):
        def call(command, log):
            log.write_text(words)
            if marker:
                write_text(tmp_path / "mce-s1" / NON_FINITE, words)
            return 1

        monkeypatch.setattr(study, "_call", call)
        return study.one_run(Path("x.yaml"), study.BY_NAME["mce"], 1, tmp_path, [], [])

    with pytest.raises(study.StudyError, match="mce-s1 failed: no space"):
        fails_with("words\nno space left\n")
    row, problems = fails_with("The loss is nan at step 3.", marker=True)
    assert (row["status"], problems) == ("diverged", {})


def test_rows_of_an_arm_that_has_changed_since_are_refused(fake_runs):
    _, call, out = fake_runs
    study.append(out / study.RUNS, {"arm": "mce", "seed": 1, "settings": {"mce_weight": 7.0}, "status": "done"})
    with pytest.raises(study.StudyError, match="other settings"):
        call()


def test_seconds_of_a_resumed_run_are_no_figure(tmp_path):
    for resumed, expected in ((None, 9.0), ("checkpoint-2", None)):
        (tmp_path / "results.json").write_text(json.dumps({"train_seconds": 9.0, "steps": 4, "resumed_from": resumed}))
        assert study.figures_of(tmp_path)["train_seconds"] == expected


def test_arms_bring_their_references_and_unknown_ones_are_named():
    assert [arm.name for arm in study.choose_arms("grad,weight3")] == ["ce", "mce", "weight3", "whole", "grad"]
    with pytest.raises(study.StudyError, match="krilov"):
        study.choose_arms("main,krilov")


@pytest.mark.parametrize("arm", study.ARMS, ids=lambda arm: arm.name)
@pytest.mark.parametrize("recipe", ["tiny.yaml", "llemma7b.yaml"])
def test_every_arm_is_a_recipe_that_loads(arm, recipe):
    loaded = load_recipe(ROOT / "recipes" / recipe, arm.settings, dry_run=True)
    assert all(
        str(getattr(loaded.training, key)).lower() == str(value).lower()
        for key, value in arm.overrides.items()
        if value
    )
    assert loaded.training.mce_weight == arm.overrides["mce_weight"]


def test_the_text_holds_all_sources_and_no_held_out_problem(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "One?", "answer": "It is <<1=1>>1.\n#### 1"}) + "\n")
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "Two?", "solution": "$\\boxed{2}$"}) + "\n")
    assert study.make_text(tmp_path / "text.jsonl", [tmp_path / "train.jsonl", tmp_path / "math.jsonl"], 50) == 52
    texts = {row["text"] for row in study.read_jsonl(tmp_path / "text.jsonl")}
    assert {"Question: One?\nAnswer: It is 1.\nThe answer is: 1", "Question: Two?\nAnswer: $\\boxed{2}$"} <= texts
    held_out = study_measure.generate(200, seed=study_measure.PROBLEM_SEED, split="test")
    assert not any(problem.query in text for problem in held_out for text in texts)


# --- verdicts on rows whose truth is known -------------------------------------------------------------------------------------------


def synthetic(folder, gains, seeds=5, size=2000):
    """runs.jsonl and problems.jsonl in which each arm's accuracy is 0.6, plus its gain, plus 1 point of noise over seeds.

    The noise has mean 0 in each arm, so that where the gains are equal there is no difference to be found by chance either.
    """
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 1, size)
    for arm, gain in gains.items():
        noise = rng.normal(0, 0.01, seeds)
        for seed, deviation in enumerate(noise - noise.mean(), start=1):
            right = difficulty + rng.normal(0, 0.1, size) < 0.6 + gain + deviation
            run = {"arm": arm, "seed": seed}
            figures = {
                "accuracy_heldout": right.mean(),
                "ce_heldout": 0.1 + rng.normal(0, 0.01),
                "train_seconds": 9.0,
                "rank_head": 4.0,
            }
            study.append(folder / study.RUNS, {**run, "status": "done", **figures, "curve_ce": [[1, 2.0], [2, 1.0]]})
            correct = "".join(map(str, right.astype(int)))
            study.append(folder / study.PROBLEMS, {**run, "set": "heldout", "correct": correct})


def test_report_says_no_difference_where_there_is_none(tmp_path):
    synthetic(tmp_path, {"ce": 0, "mce": 0, "weight3": 0, "input": 0})
    study_report.write_report(tmp_path, tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "No difference found between mce and ce on held-out generated problems" in page
    assert "2 contrasts: no difference found in any" in page
    assert "Held-out CE a token: no difference found" in page
    assert len((tmp_path / "results_rows.jsonl").read_text().splitlines()) == 20


def test_report_finds_a_planted_difference_and_only_that(tmp_path):
    synthetic(tmp_path, {"ce": 0, "mce": 0.06, "weight3": 0, "input": 0})
    contrasts = {c.arm: c for c in study_report.analyse(study.read_jsonl(tmp_path / study.PROBLEMS))}
    assert {arm: c.differs for arm, c in contrasts.items()} == {"mce": True, "weight3": False, "input": True}
    assert contrasts["mce"].bootstrap[0] < 0.06 < contrasts["mce"].bootstrap[1]
    assert contrasts["input"].adjusted_p >= contrasts["input"].test.p
    assert "mce is better than ce" in study_report.sentence(contrasts["mce"], "heldout")
    assert "with 80 % power" in study_report.sentence(contrasts["weight3"], "heldout")
    test = contrasts["weight3"].test
    assert contrasts["weight3"].detectable == statistics.minimum_detectable_effect(
        test.sd, 5, alpha=0.05 / 2
    )  # two ablations


def test_the_rule_claims_a_difference_where_there_is_none_at_most_as_often_as_alpha(monkeypatch):
    monkeypatch.setattr(
        study_report, "hierarchical_bootstrap", lambda matrix: statistics.hierarchical_bootstrap(matrix, repeats=400)
    )
    rng, claimed, studies = np.random.default_rng(5), 0, 200
    for _ in range(studies):
        difficulty, rows = rng.uniform(0, 1, 300), []
        for arm in ("ce", "mce"):
            for seed in range(5):
                right = difficulty + rng.normal(0, 0.1, 300) < 0.6 + rng.normal(0, 0.02)
                rows.append(
                    {"arm": arm, "seed": seed, "set": "heldout", "correct": "".join(map(str, right.astype(int)))}
                )
        claimed += study_report.analyse(rows)[0].differs
    assert claimed / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


def test_report_keeps_the_rest_of_the_page_and_refuses_one_without_markers(tmp_path):
    synthetic(tmp_path, {"ce": 0, "mce": 0}, seeds=2, size=50)
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{study_report.BEGIN}\nold\n{study_report.END}\n\nafter\n")
    for _ in range(2):
        files = study_report.write_report(tmp_path, page)
    text = page.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert all(file.is_file() for file in files)
    page.write_text("# No markers")
    with pytest.raises(study.StudyError, match="lacks the markers"):
        study_report.write_report(tmp_path, page)


def test_report_lists_runs_that_diverged_and_leaves_their_seed_out(tmp_path):
    synthetic(tmp_path, {"ce": 0, "mce": 0}, seeds=3, size=50)
    study.append(tmp_path / study.RUNS, {"arm": "mce", "seed": 4, "status": "diverged"})
    text = study_report.render(
        study.read_jsonl(tmp_path / study.RUNS), study.read_jsonl(tmp_path / study.PROBLEMS), "x"
    )
    assert "non-finite: mce seed 4" in text


def test_report_describes_a_study_that_differs_in_an_override(tmp_path):
    for name, gain, overrides in (("a", 0.0, []), ("b", 0.05, ["--learning_rate", "1e-3"])):
        (tmp_path / name).mkdir()
        synthetic(tmp_path / name, {"ce": 0, "mce": gain}, seeds=3)
        rows = [{**row, "grad_norm": 0.5} for row in study.read_jsonl(tmp_path / name / study.RUNS)]
        write_text(tmp_path / name / study.RUNS, "".join(json.dumps(row) + "\n" for row in rows))
        write_text(tmp_path / name / study.SETUP, json.dumps({"overrides": overrides}))
    study_report.write_report(tmp_path / "a", tmp_path / "p.md", [tmp_path / "b"])
    lines = (tmp_path / "p.md").read_text().splitlines()
    found = {
        name: next(line.split(" | ") for line in lines if line.startswith(f"| {name} |"))
        for name in ("as above", "learning_rate 1e-3")
    }
    gains = {name: float(cells[3].split()[0]) for name, cells in found.items()}
    assert gains["learning_rate 1e-3"] - gains["as above"] == pytest.approx(5, abs=1.5)
    assert len((tmp_path / "p_sensitivity.jsonl").read_text().splitlines()) == 6
    with pytest.raises(study.StudyError, match="no study was run there"):
        study_report.write_report(tmp_path / "a", tmp_path / "p.md", [tmp_path / "c"])


def test_the_projects_page_has_the_markers():
    text = (ROOT / "docs" / "results.md").read_text()
    assert text.count(study_report.BEGIN) == text.count(study_report.END) == 1


# --- large runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["local", "slurm"])
def test_plan_prints_commands_that_parse(how, capsys):
    arguments = [
        "plan",
        "recipes/llemma7b.yaml",
        "--seeds",
        "2",
        "--arms",
        "main,input",
        "--launch",
        how,
        "--output",
        "runs/big",
    ]
    assert study.main([*arguments, "--", "--gradient_accumulation_steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    training = [line for line in lines if "llemma7b.yaml" in line]
    assert len(training) == 6
    folders = []
    for line in training:
        words = shlex.split(line.removesuffix(")"))
        recipe = load_recipe(
            ROOT / "recipes" / "llemma7b.yaml", words[words.index("recipes/llemma7b.yaml") + 1 :], dry_run=True
        )
        assert recipe.training.gradient_accumulation_steps == 2
        folders.append((recipe.training.output_dir, recipe.training.seed, recipe.training.mce_weight))
    assert folders[:2] == [("runs/big/ce-s1", 1, 0.0), ("runs/big/mce-s1", 1, 1.0)]
    assert (
        sum("eval/hendrycks_math.py" in line for line in lines)
        == sum("--n 8 --temperature" in line for line in lines)
        == 6
    )
    assert sum("eval/gsm8k.py" in line for line in lines) == 12  # greedily, and with samples
    assert all("afterok" in line for line in lines if "eval/" in line) or how == "local"
    assert study.main([*arguments[1:], "--", "--gradient_accumulation_steps", "2"]) == 0  # a recipe alone means plan
    assert capsys.readouterr().out.splitlines() == lines


def test_submit_hands_each_run_to_sbatch_once(monkeypatch, tmp_path):
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\necho "77;cluster"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    arguments = [
        "plan",
        "recipes/llemma7b.yaml",
        "--seeds",
        "1",
        "--launch",
        "slurm",
        "--output",
        str(tmp_path / "out"),
        "--submit",
    ]
    assert study.main(arguments) == study.main(arguments) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (
        len(calls) == 10
    )  # two runs, each with its training, three evaluations and a measurement, and nothing the second time
    assert "docs/slurm.sh" in calls[0]
    assert calls[1].startswith("--dependency=afterok:77 ")


def test_submit_goes_on_after_a_run_that_diverged_and_stops_at_one_that_failed(tmp_path):
    (tmp_path / "ce-s1").mkdir()
    (tmp_path / "ce-s1" / NON_FINITE).write_text("The loss is nan at step 3.")
    with pytest.raises(study.StudyError, match="submitting ce-s2 failed: no space"):
        study_launch.submit([("ce-s1", ["false"]), ("ce-s2", ["echo no space >&2", "false"])], tmp_path)
    assert [row["run"] for row in study.read_jsonl(tmp_path / study_launch.SUBMITTED)] == ["ce-s1"]


# --- end to end --------------------------------------------------------------------------------------------------------------------

MINIMAL = """
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer_vocab_size: 300
dataset: builtin
builtin_rows: 60
eval_dataset: builtin
builtin_eval_rows: 8
prompt_template: plain
max_steps: 3
per_device_train_batch_size: 4
effective_rank_steps: 1
logging_steps: 1
save_strategy: steps
save_steps: 2
use_cpu: true
bf16: false
"""


def test_runs_without_checkpoints_have_no_column_and_no_panel_of_hidden_states(tmp_path):
    rows = [
        {"arm": arm, "seed": 1, "curve_ce": [[1, 2.0]], "curve_rank_head": [[1, 9.0], [2, 5.0]]}
        for arm in ("ce", "mce")
    ]
    assert study_report.rank_table(rows).splitlines()[2] == "| ce | 9.0 (step 1) to 5.0 |"
    study_report.draw_curves(rows, tmp_path / "two.png")
    study_report.draw_curves([{**row, "curve_rank_hidden": [[2, 4.0]]} for row in rows], tmp_path / "three.png")
    widths = [imread(tmp_path / name).shape[1] for name in ("two.png", "three.png")]
    assert widths[0] < 0.8 * widths[1]


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_reports(tmp_path):
    recipe, out, text = tmp_path / "minimal.yaml", tmp_path / "study", tmp_path / "test.jsonl"
    recipe.write_text(MINIMAL)
    text.write_text(json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"}) + "\n")
    sizes = "--problems 12 --sample_problems 2 --likelihood_rows 8 --max_new_tokens 8"
    arguments = [
        "run",
        str(recipe),
        "--output",
        str(out),
        "--seeds",
        "1",
        "--workers",
        "2",
        "--text",
        str(text),
        "--measure",
        sizes,
    ]
    assert study.main(arguments) == 0
    rows = {row["arm"]: row for row in study.read_jsonl(out / study.RUNS)}
    assert set(rows) == {"ce", "mce"}
    # same weights, same rows, same order: the first step's CE is the same, and only then do the losses part
    assert rows["ce"]["curve_ce"][0] == pytest.approx(rows["mce"]["curve_ce"][0], abs=1e-4)
    assert rows["ce"]["ce_heldout"] != rows["mce"]["ce_heldout"]
    assert [step for step, _ in rows["mce"]["curve_rank_hidden"]] == [2, 3]
    assert not list(out.glob("*/checkpoint-*"))
    assert study.main(arguments) == 0
    assert len(study.read_jsonl(out / study.RUNS)) == 2
    assert study.main(["report", "--output", str(out), "--page", str(tmp_path / "page.md")]) == 0
    assert "one seed only" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_a_planned_run_is_trained_scored_collected_and_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    recipe, out = tmp_path / "minimal.yaml", tmp_path / "big"
    recipe.write_text(MINIMAL)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "math").mkdir()
    gsm8k, math_ = tmp_path / "gsm8k" / "test.jsonl", tmp_path / "math" / "test.jsonl"
    gsm8k.write_text(
        "".join(json.dumps({"question": f"{n} and one?", "answer": f"So\n#### {n + 1}"}) + "\n" for n in range(4))
    )
    rows = [
        {"problem": f"{n}+1?", "solution": f"$\\boxed{{{n + 1}}}$", "level": "Level 1", "subject": "Algebra"}
        for n in range(4)
    ]
    math_.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "plan",
        str(recipe),
        "--seeds",
        "1",
        "--arms",
        "ce",
        "--launcher",
        shlex.quote(sys.executable),
        "--output",
        str(out),
    ]
    arguments += ["--gsm8k", str(gsm8k), "--math", str(math_), "--evaluation", "--engine transformers --max_tokens 4"]
    assert study.main([*arguments, "--samples", "2", "--submit"]) == 0
    shutil.copytree(out / "ce-s1", out / "ce-s3")
    shutil.rmtree(out / "ce-s3" / "eval")
    shutil.copytree(out / "ce-s3" / study_launch.SAMPLED, out / "ce-s3" / "eval")
    with pytest.raises(study.StudyError, match="on samples"):  # the primary figure is of greedy answers
        study_launch.collect(out, ["gsm8k"])
    shutil.rmtree(out / "ce-s3")
    (out / study.RUNS).unlink()
    (out / study.PROBLEMS).unlink()
    assert study_launch.collect(out) == 1
    shutil.copytree(out / "ce-s1", out / "mce-s1")  # a second run that ended in the same weights
    (out / "mce-s2").mkdir()  # one that is not there yet
    assert study_launch.collect(out) == 1
    assert study_launch.collect(out) == 0
    (out / "mce-s2" / NON_FINITE).write_text("The loss is nan at step 3.")
    assert study_launch.collect(out) == 1
    assert study.main(["report", "--output", str(out), "--page", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "accuracy, GSM8K" in page
    assert "accuracy, MATH" in page
    assert "non-finite: mce seed 2" in page
    row = study.read_jsonl(out / study.RUNS)[0]
    assert {
        "ce_heldout",
        "ece_token",
        "rank_hidden",
        "rank_head",
        "pass@2_gsm8k",
        "distinct_1_gsm8k",
        "accuracy_math",
    } <= row.keys()
    assert "MATH, described without a verdict: mce minus ce" in page
    assert 0 < row["distinct_1_gsm8k"] <= 1


def test_scripts_start_from_any_folder(tmp_path):
    for name in ("study.py", "study_measure.py"):
        assert (
            subprocess.run(
                [sys.executable, ROOT / "benchmarks" / name, "--help"], cwd=tmp_path, capture_output=True
            ).returncode
            == 0
        )
