"""Two runs into one output directory: the second is refused at once, and nothing that ends a run leaves it locked."""

import json
import os
import signal
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from matrix_llm import train
from matrix_llm.base.errors import RecipeError
from matrix_llm.run.lock import LOCK, one_run_at_a_time
from matrix_llm.ssl import pretrain
from tests.support.killed_runs import RECIPE, assert_one_line, assert_same_run
from tests.support.paths import ROOT

HOLD = """
import os, sys, time
from transformers import TrainingArguments
from matrix_llm.run.lock import one_run_at_a_time
with one_run_at_a_time(TrainingArguments(sys.argv[1], use_cpu=True)):
    child = os.fork() if "fork" in sys.argv else None
    if child != 0:
        print(child or os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts another process that holds the lock of a folder."""
    started = []

    def start(folder, *words):
        command = [sys.executable, "-c", HOLD, str(folder), *words]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        return started[-1], int(started[-1].stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def lock(folder):
    return one_run_at_a_time(TrainingArguments(str(folder), use_cpu=True))


def test_a_second_run_is_refused_before_anything_is_read_and_a_killed_one_does_not_block(
    hold, tmp_path, capsys, monkeypatch
):
    from matrix_llm.run import prepare

    run = tmp_path / "run"
    first, pid = hold(run)
    monkeypatch.setattr(prepare, "prepare_data", lambda *a, **k: pytest.fail("data was loaded"))
    monkeypatch.setattr(pretrain, "load_data", lambda *a, **k: pytest.fail("images were loaded"))
    language, images = tmp_path / "r.yaml", tmp_path / "s.yaml"
    language.write_text(json.dumps({**RECIPE, "output_dir": str(run)}))
    images.write_text(json.dumps({"dataset": "digits", "method": "simclr", "output_dir": str(run), "use_cpu": True}))
    for main, recipe in ((train.main, language), (pretrain.main, images)):
        assert main([str(recipe)]) == 2
        assert_one_line(
            capsys.readouterr().err, f"output_dir='{run}'", f"process {pid} on ", "since 20", "choose another"
        )
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (run / LOCK).is_file()  # it says who held the lock, and does not hold it
    with lock(run):
        assert f"process {os.getpid()} on" in (run / LOCK).read_text()
    assert not (run / LOCK).exists()


def test_a_worker_that_outlives_its_killed_run_does_not_keep_the_lock(hold, tmp_path):
    first, worker = hold(tmp_path, "fork")
    first.send_signal(signal.SIGKILL)
    first.wait()
    try:
        os.kill(worker, 0)  # it is still there
        with lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_refused_run_leaves_no_folder_behind(tmp_path):
    with pytest.raises(ValueError, match="rows"), lock(tmp_path / "a"):
        raise ValueError("no rows")
    with lock(tmp_path / "b"):
        (tmp_path / "b" / "recipe.yaml").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_the_holder_on_a_machine_that_is_gone_can_be_overruled(tmp_path, monkeypatch):
    with lock(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "elsewhere")
            with (
                pytest.raises(RecipeError, match=rf"If that machine is gone.*remove {tmp_path / LOCK}"),
                lock(tmp_path),
            ):
                pass
        (tmp_path / LOCK).unlink()
        with lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_named_and_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with lock(tmp_path):
        assert "without locks" in capsys.readouterr().out


@pytest.mark.slow
def test_all_processes_of_a_second_run_stop_and_those_of_the_first_share_its_lock(hold, server, unbroken, tmp_path):
    run = tmp_path / "run"
    first, _ = hold(run)
    codes, shown = server.run(run, engine="zero2")
    assert codes == [2, 2]
    assert_one_line(shown, "another run is writing there")
    first.kill()
    first.wait()
    assert server.run(run, engine="zero2")[0] == [0, 0]
    assert_same_run(run, unbroken("zero2")[0])
