"""Runs that are killed, or run out of disk space, resume to the bits of an unbroken run."""

import os
import shutil

import pytest

from matrix_llm.base.errors import CheckpointError
from matrix_llm.config import MatrixConfig
from matrix_llm.run.checkpoint_files import last_complete_checkpoint, remove_checkpoint
from matrix_llm.trainer import MatrixTrainer
from tests.support.killed_runs import assert_one_line, assert_same_run, kill_and_resume, kill_points
from tests.support.tiny import config, rows, tiny_model

# ----------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_three_kills_and_resumptions_end_bit_for_bit_like_an_unbroken_run(engine, server, unbroken, tmp_path):
    """Between two steps, while a checkpoint is written, and while the final files are moved into place."""
    whole, events = unbroken(engine)
    seed = int(os.environ.get("MATRIX_LLM_KILL_SEED", 14))  # the same places each time: CI is no lottery
    first, second = kill_points(events, 2, seed=seed)
    for index, point in enumerate([first, second, {"rank": 0, "event": events[0] - 2}]):
        kill_and_resume(server, engine, whole, tmp_path / f"run{index}", point)


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["single", "zero2", "zero3", "fsdp2"])
def test_twenty_kills_and_resumptions_end_bit_for_bit_like_an_unbroken_run(engine, server, unbroken, tmp_path, request):
    if "nightly" not in request.config.option.markexpr and not os.environ.get("MATRIX_LLM_NIGHTLY"):
        pytest.skip("takes minutes: run it with `pytest -m nightly` or MATRIX_LLM_NIGHTLY=1")
    whole, events = unbroken(engine)
    for index, point in enumerate(kill_points(events, 20)):
        kill_and_resume(server, engine, whole, tmp_path / f"run{index}", point)
        shutil.rmtree(tmp_path / f"run{index}")


@pytest.mark.slow
def test_a_run_killed_twice_ends_bit_for_bit_like_an_unbroken_run(server, unbroken, tmp_path):
    whole, _ = unbroken("single")
    run = tmp_path / "run"
    assert server.run(run, kill={"rank": 0, "step": 4})[0] == [-9]
    kill = {"rank": 0, "step": 7}
    assert server.run(run, "--resume_from_checkpoint", "true", kill=kill)[0] == [-9]
    assert server.run(run, "--resume_from_checkpoint", "true")[0] == [0]
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_kill_between_the_last_checkpoint_and_the_removal_of_an_older_one_leaves_none_too_many(
    server, unbroken, tmp_path
):
    """No step is left to train, so no later save would remove it."""
    run = tmp_path / "run"
    kill_and_resume(server, "single", unbroken("single")[0], run, {"rank": 0, "moving": "checkpoint-4"})


# -------------------------------------------------------------------------------------------------------- the disk


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_stops_with_one_line_and_the_last_one_whole(server, unbroken, tmp_path):
    """With a limit on file sizes the optimizer's file fails while it is written, as on a full disk."""
    whole, _ = unbroken("single")
    run = tmp_path / "run"
    size = (whole / "checkpoint-6" / "optimizer.pt").stat().st_size
    codes, shown = server.run(run, limit={"step": 5, "bytes": size - 1000})
    assert codes == [1]
    assert_one_line(
        shown, "checkpoint-6 could not be written", "checkpoint-4 is complete", "--resume_from_checkpoint true"
    )
    assert last_complete_checkpoint(run).name == "checkpoint-4"
    assert not (run / ".saving-checkpoint").exists()
    assert server.run(run, "--resume_from_checkpoint", "true")[0] == [0]
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_the_last_checkpoint_whole(server, unbroken, small_disk):
    whole, _ = unbroken("single")
    size = sum(p.stat().st_size for p in (whole / "checkpoint-6").rglob("*") if p.is_file())
    disk = small_disk(f"size={size * 7 // 4 // 1024}k")
    codes, shown = server.run(disk / "run")
    assert codes == [1]
    assert_one_line(shown, "checkpoint-4 could not be written", "checkpoint-2 is complete")
    assert last_complete_checkpoint(disk / "run").name == "checkpoint-2"
    assert server.run(disk / "run", "--resume_from_checkpoint", "true")[0] == [1]  # still full, and still whole
    assert last_complete_checkpoint(disk / "run").name == "checkpoint-2"


@pytest.mark.parametrize(
    ("is_removed", "kind", "message"),
    [(True, CheckpointError, "checkpoint-1 was abandoned: another process"), (False, FileNotFoundError, "of a bug")],
)
def test_a_checkpoint_that_another_process_removes_is_one_line_and_any_other_missing_file_is_a_bug(
    is_removed, kind, message, tmp_path, tiny_tokenizer
):
    """What a process meets that is still writing when another one runs out of space and removes the checkpoint."""

    class Interrupted(MatrixTrainer):
        def _save_window(self, folder):
            if is_removed:
                remove_checkpoint(folder.parent)
                remove_checkpoint(folder.parent)  # by a third one
            (folder / "missing" if is_removed else tmp_path / "of a bug" / "missing").touch()

    settings = config(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = Interrupted(tiny_model(), MatrixConfig(**settings), train_dataset=rows(), processing_class=tiny_tokenizer)
    with pytest.raises(kind, match=message):
        trainer.train()
