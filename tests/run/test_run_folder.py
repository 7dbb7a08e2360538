"""Whether a run may start or resume in a folder, and what it writes and removes there before training."""

import json
import os

import pytest
import yaml
from transformers import TrainingArguments

from matrix_llm.base.errors import RecipeError
from matrix_llm.run.checkpoint_files import finish_checkpoint
from matrix_llm.run.run_folder import check_output_dir, find_resume_checkpoint, start_run_folder
from tests.support.killed_runs import RECIPE, assert_one_line, assert_same_run


def write_checkpoint(folder):
    """A complete checkpoint of one file."""
    staged = folder / "staged"
    staged.mkdir()
    (staged / "trainer_state.json").write_text("{}")
    finish_checkpoint(staged, folder / "checkpoint-2", processes=1)
    return folder / "checkpoint-2"


def test_a_read_only_folder_is_found_before_anything_is_loaded(small_disk, tmp_path, capsys, monkeypatch):
    from matrix_llm import train
    from matrix_llm.run import prepare

    if os.geteuid() == 0:  # permissions do not stop root
        folder = small_disk("ro")
    else:
        folder = tmp_path / "disk"
        folder.chmod(0o555)
    monkeypatch.setattr(prepare, "prepare_data", lambda *a, **k: pytest.fail("data was loaded"))
    (tmp_path / "r.yaml").write_text(json.dumps({**RECIPE, "output_dir": str(folder / "run")}))
    assert train.main([str(tmp_path / "r.yaml")]) == 2
    assert_one_line(capsys.readouterr().err, "output_dir=", "cannot be written", "choose another output_dir")


@pytest.mark.parametrize(
    ("path", "reason"), [("file", "is a file"), ("file/run", "Not a directory"), ("x" * 300, "too long")]
)
def test_an_output_dir_that_cannot_exist_is_one_line(path, reason, tmp_path, capsys):
    from matrix_llm import train

    (tmp_path / "file").touch()
    (tmp_path / "r.yaml").write_text(json.dumps({**RECIPE, "output_dir": str(tmp_path / path)}))
    assert train.main([str(tmp_path / "r.yaml")]) == 2
    assert_one_line(capsys.readouterr().err, "output_dir=", reason, "hoose another output_dir")


@pytest.mark.slow
def test_resuming_with_other_settings_processes_or_half_a_checkpoint_is_refused_by_name(server, unbroken, tmp_path):
    run = tmp_path / "run"
    assert server.run(run, kill={"rank": 0, "step": 6})[0] == [-9]
    codes, shown = server.run(run, "--resume_from_checkpoint", "true", "--learning_rate", "0.5", "--seed", "7")
    assert codes == [2]
    assert_one_line(shown, "learning_rate: 0.001 then, 0.5 now", "seed: 'not given' then, 7 now", "Restore them")
    codes, shown = server.run(run, "--resume_from_checkpoint", "true", processes=2)
    assert codes == [2, 2]
    assert_one_line(shown, "with 2 processes: it was made with 1", "Launch as many")
    os.truncate(run / "checkpoint-4" / "optimizer.pt", 1000)
    codes, shown = server.run(run, "--resume_from_checkpoint", str(run / "checkpoint-4"))
    assert codes == [2]
    assert_one_line(shown, "checkpoint-4", "incomplete: optimizer.pt has 1,000 bytes", "Give true")
    codes, shown = server.run(run, "--resume_from_checkpoint", "true")  # goes on from checkpoint-2
    assert codes == [0]
    assert_same_run(run, unbroken("single")[0])


@pytest.mark.parametrize("flag", [None, False, "false", "none", "null", "no", "False", "0"])
def test_no_resume_in_any_spelling_starts_a_run(tmp_path, flag):
    training = TrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint=flag)
    check_output_dir(training, {})
    assert find_resume_checkpoint(training) is None
    write_checkpoint(tmp_path)
    with pytest.raises(RecipeError, match="--resume_from_checkpoint true"):  # and is not taken for a yes
        check_output_dir(training, {})


@pytest.mark.parametrize("flag", [True, "true", "yes", "checkpoint"])
def test_a_resume_in_any_spelling_finds_the_checkpoint(tmp_path, flag):
    path = str(write_checkpoint(tmp_path))
    training = TrainingArguments(
        str(tmp_path), use_cpu=True, resume_from_checkpoint=path if flag == "checkpoint" else flag
    )
    check_output_dir(training, {})
    assert find_resume_checkpoint(training) == path


def test_checkpoints_without_an_optimizer_are_not_resumed(tmp_path):
    write_checkpoint(tmp_path)
    training = TrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint="true", save_only_model=True)
    with pytest.raises(RecipeError, match=r"save_only_model=True.*no optimizer.*another output_dir"):
        check_output_dir(training, {})


def test_the_settings_of_the_caller_are_stored_and_not_changed(tmp_path):
    resolved = {"seed": 7, "resume_from_checkpoint": "true"}
    start_run_folder(tmp_path, resolved, {"accuracy_before": 0.5})
    assert resolved == {"seed": 7, "resume_from_checkpoint": "true"}
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {"seed": 7}
    assert json.loads((tmp_path / "results.partial.json").read_text()) == {"accuracy_before": 0.5}


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path):
    left = [".recipe.x1.yaml", ".non_finite.x2.txt", ".saving", ".saving-checkpoint", ".deleting-checkpoint-2"]
    for name in [*left, "checkpoint-4", ".keep"]:
        (tmp_path / name).mkdir() if "." not in name[1:] else (tmp_path / name).write_text("half")
    start_run_folder(tmp_path, {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".keep",
        "checkpoint-4",
        "recipe.yaml",
        "results.partial.json",
    ]
