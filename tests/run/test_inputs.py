"""A resumed run reads what it was started with: rows, test sets and files are known by their content."""

import json
import os
import shutil

import datasets
import pytest

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import load_recipe
from matrix_llm.run.inputs import check_inputs, inputs_of
from matrix_llm.train import main
from tests.support.tiny import TINY


def write_rows(path, count=24, answer="x"):
    rows = [{"query": f"{i} + 1?", "response": f"{answer} {i + 1}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(key=value) writes a recipe on two files and a held-out one, and returns its path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ("a", "b", "held_out", "test")
    files = {name: write_rows(tmp_path / f"{name}.jsonl", answer=name) for name in names}

    def write(**changes):
        settings = {
            **TINY, "dataset": [files["a"], {"path": files["b"], "weight": 0.5}], "eval_dataset": files["held_out"],
            "leakage_check": [files["test"]], "leakage": "report", "save_strategy": "steps", "save_steps": 2,
            "output_dir": str(tmp_path / "run"), **changes,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


def interrupt(run):
    """Turn a finished run into one that was killed after its second step."""
    os.replace(run / "results.json", run / "results.partial.json")
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoint-4")


def test_rows_that_changed_between_kill_and_resume_are_named(recipe, tmp_path, capsys):
    path, run = recipe(), tmp_path / "run"
    assert main([str(path)]) == 0
    interrupt(run)
    resume = [str(path), "--resume_from_checkpoint", "true"]
    before = (tmp_path / "b.jsonl").read_text()
    write_rows(tmp_path / "b.jsonl", count=25)
    assert main(resume) == 2
    said = capsys.readouterr().err
    assert "dataset: " in said
    assert "b.jsonl" in said
    assert "a.jsonl" not in said
    assert "Restore them" in said
    # the same bytes under another date are the same rows
    (tmp_path / "b.jsonl").write_text(before)
    os.utime(tmp_path / "b.jsonl", (0, 0))
    assert main(resume) == 0


def edited(path):
    write_rows(path, answer="other")


@pytest.mark.parametrize(
    ("changed", "named", "settings"),
    [
        ("a.jsonl", "dataset", {}),
        ("held_out.jsonl", "eval_dataset", {}),
        ("test.jsonl", "leakage_check", {"leakage": "drop"}),
        ("test.jsonl", None, {"leakage": "report"}),  # what is only reported changes no row
        ("a.jsonl", "dataset", {"streaming": True}),
    ],
)
def test_each_thing_that_decides_what_is_computed_is_compared(recipe, tmp_path, changed, named, settings):
    path = recipe(**settings)
    (tmp_path / "run").mkdir()
    then = inputs_of(load_recipe(path))
    (tmp_path / "run" / "results.partial.json").write_text(json.dumps({"inputs": then}))
    check_inputs(tmp_path / "run" / "checkpoint-2", inputs_of(load_recipe(path)))
    edited(tmp_path / changed)
    now = inputs_of(load_recipe(path))
    if named is None:
        assert now == then
        return
    with pytest.raises(RecipeError, match=f"{named}: .*{changed}"):
        check_inputs(tmp_path / "run" / "checkpoint-2", now)


def test_a_teacher_that_changed_is_named(recipe, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    path = recipe(token_loss="kd", teacher_model_name_or_path=str(teacher))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.partial.json").write_text(json.dumps({"inputs": inputs_of(load_recipe(path))}))
    check_inputs(tmp_path / "run" / "checkpoint-2", inputs_of(load_recipe(path)))
    (teacher / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(RecipeError, match=r"teacher_model_name_or_path: .*teacher' has other content"):
        check_inputs(tmp_path / "run" / "checkpoint-2", inputs_of(load_recipe(path)))


def test_a_run_of_an_earlier_version_still_resumes(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.partial.json").write_text("{}")
    check_inputs(tmp_path / "run" / "checkpoint-2", inputs_of(load_recipe(recipe())))
