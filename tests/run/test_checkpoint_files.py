"""Checkpoints are complete or absent: what is recognised, what is removed, and what reaches the disk in which order."""

import shutil

import pytest

from matrix_llm.run.checkpoint_files import (
    MANIFEST,
    finish_checkpoint,
    last_complete_checkpoint,
    remove_old_checkpoints,
    what_is_missing,
)
from tests.support.disk import record_disk


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_a_checkpoint_with_any_file_cut_short_or_missing_is_passed_over(engine, unbroken, tmp_path):
    whole, _ = unbroken(engine)
    run = tmp_path / "run"
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.copytree(whole / name, run / name)
    newest = run / "checkpoint-8"
    assert last_complete_checkpoint(run) == newest
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert {"model.safetensors", "trainer_state.json", MANIFEST} < {p.name for p in files}
    assert [p for p in files if p.name.startswith("optimizer.pt") or p.name.endswith("optim_states.pt")]
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert last_complete_checkpoint(run).name == "checkpoint-6", file.name
        file.unlink()
        assert last_complete_checkpoint(run).name == "checkpoint-6", file.name
        file.write_bytes(content)
    assert last_complete_checkpoint(run) == newest


def fake(run, step, torn=False):
    staged = run / "staged"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"x" * 10)
    finish_checkpoint(staged, run / f"checkpoint-{step}", processes=1)
    if torn:
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x" * 9)


def names(run):
    return sorted(p.name for p in run.iterdir())


def test_save_total_limit_counts_whole_checkpoints_and_keeps_the_last_one(tmp_path):
    for step, torn in [(2, False), (4, False), (6, True), (8, True)]:
        fake(tmp_path, step, torn)
    remove_old_checkpoints(tmp_path, 1, best=None)
    assert names(tmp_path) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]  # newer ones that are not whole are left for a look
    fake(tmp_path, 10)
    remove_old_checkpoints(tmp_path, 1, best=None)
    assert names(tmp_path) == ["checkpoint-10"]


def test_save_total_limit_keeps_the_best_checkpoint(tmp_path):
    for step in (9, 10, 11):
        fake(tmp_path, step)
    remove_old_checkpoints(tmp_path, 2, best=str(tmp_path / "checkpoint-9"))
    assert names(tmp_path) == ["checkpoint-11", "checkpoint-9"]


def test_a_checkpoint_written_again_replaces_the_one_that_is_not_whole(tmp_path):
    fake(tmp_path, 2, torn=True)
    assert "9 bytes of 10" in what_is_missing(tmp_path / "checkpoint-2")
    fake(tmp_path, 2)
    assert what_is_missing(tmp_path / "checkpoint-2") is None
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut leaves a folder with the right name and empty files."""
    staged, final = tmp_path / "staged", tmp_path / "checkpoint-2"
    (staged / "shards").mkdir(parents=True)
    for name in ("model.safetensors", "shards/rank0.pt"):
        (staged / name).write_bytes(b"x" * 10)
    events = record_disk(monkeypatch)
    finish_checkpoint(staged, final, processes=1)
    move = events.index(("move", staged, final))
    for path in (
        staged,
        staged / "shards",
        *(staged / name for name in ("model.safetensors", "shards/rank0.pt", MANIFEST)),
    ):
        assert ("flush", path) in events[:move], path
    assert ("flush", tmp_path) in events[move:]
