"""`python -m matrix_llm.checkpoints`: which checkpoints are complete, and errors in one line."""

import subprocess
import sys

import pytest

from matrix_llm.checkpoints import MANIFEST, finish_checkpoint, main


def save(run, step, *, torn=False):
    staged = run / "staged"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"x" * 10)
    finish_checkpoint(staged, run / f"checkpoint-{step}", processes=1)
    if torn:
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x" * 9)


def test_check_names_each_checkpoint_in_order_and_what_it_lacks(tmp_path, capsys):
    save(tmp_path, 2)
    save(tmp_path, 10, torn=True)
    (tmp_path / "checkpoint-12").mkdir()
    assert main(["check", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("checkpoint-2: complete")
    assert lines[1].endswith("checkpoint-10: INCOMPLETE, model.safetensors has 9 bytes of 10")
    assert "checkpoint-12: INCOMPLETE" in lines[2]
    assert MANIFEST in lines[2]


def test_check_is_status_1_if_no_checkpoint_is_complete_and_2_if_there_is_none(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    save(tmp_path, 2, torn=True)
    assert main(["check", str(tmp_path)]) == 1


@pytest.mark.slow
def test_the_command_ends_with_one_line_for_what_cannot_be_done(tmp_path):
    """As a process of its own: the module then runs under another name than the one that others import."""
    command = [sys.executable, "-m", "matrix_llm.checkpoints"]
    done = subprocess.run([*command, "consolidate", "nowhere", "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is not a folder")
    assert len(done.stderr.splitlines()) == 1
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "check runs/x" in shown
    assert "consolidate runs/x/checkpoint-20 OUT" in shown
    assert subprocess.run([*command, "check"], capture_output=True, check=False).returncode == 2  # no run given
