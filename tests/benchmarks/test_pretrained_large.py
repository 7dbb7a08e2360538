"""The study of a pretrained model at 7B: its page, its commands, and reading its runs."""

import pytest

from benchmarks.pretrained_study.command import main
from benchmarks.pretrained_study.design import make_arms
from benchmarks.pretrained_study.large import ROWS, gpu_hours, hours_table, sample_table
from benchmarks.study.design import BY_NAME, StudyError
from benchmarks.study.folder import RUNS, known_runs
from matrix_llm.base.files import read_jsonl
from matrix_llm.run.run_folder import NON_FINITE
from tests.support.paths import ROOT


def test_the_page_has_the_tables_that_the_command_prints():
    page = (ROOT / "docs" / "study_7b.md").read_text()
    assert hours_table() in page
    assert sample_table() in page


def test_gpu_hours_are_tokens_over_speed():
    assert gpu_hours(1.0, rows=2048, epochs=2, row_tokens=900) == pytest.approx(2 * 900 / 3600)
    assert gpu_hours(0.279) == pytest.approx(395_000 * 3 * 265 * 0.279 / 2048 / 3600)


def test_the_arms_are_planned_as_settings_of_a_recipe(capsys):
    assert main(["plan", str(ROOT / "recipes/llemma7b.yaml"), "--rows", "1000", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    lines = {block.splitlines()[0]: block for block in printed.split("\n\n")}
    assert set(lines) == {f"# {arm.name}-s1" for arm in make_arms(1000)}
    assert "--max_train_rows 800" in lines["# ce_fewer-s1"]
    assert "--token_loss emo" in lines["# emo-s1"]
    assert "--max_grad_norm 0.5555" in lines["# ce_larger-s1"]
    assert "--mce_embeddings centred" in lines["# mce_centred-s1"]
    assert "--mce_top_k 32 --mce_steps 8" in lines["# mce-s1"]


def test_a_recipe_with_other_clipping_is_refused(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_grad_norm: 0.5\n")
    assert main(["plan", str(recipe), "--rows", "1000"]) == 2
    error = capsys.readouterr().err
    assert "max_grad_norm=0.5" in error
    assert "ce_larger" in error


def test_runs_are_read_back_with_the_settings_of_these_arms(tmp_path):
    for name in ("mce-s1", "emo-s2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / NON_FINITE).write_text("{}")
    for _ in range(2):  # the second call adds nothing
        assert main(["collect", "--rows", str(ROWS), "--output", str(tmp_path)]) == 0
    settings = {row["arm"]: row["settings"] for row in read_jsonl(tmp_path / RUNS)}
    assert settings == {arm.name: dict(arm.overrides) for arm in make_arms(ROWS) if arm.name in ("mce", "emo")}
    assert settings["mce"] != dict(BY_NAME["mce"].overrides)
    with pytest.raises(StudyError, match="other settings"):
        known_runs(tmp_path)  # the older study's mce is another arm
    assert main(["report", "--output", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 0
    assert "void" in (tmp_path / "page.md").read_text()
