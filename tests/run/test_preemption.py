"""A run that is asked to stop saves on all processes and resumes to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matrix_llm.run import preemption
from matrix_llm.run.checkpoint_files import last_complete_checkpoint
from matrix_llm.run.preemption import StopOnSignal, resume_command
from tests.support.engines import deepspeed_config, free_port, skip_without_deepspeed
from tests.support.killed_runs import RECIPE, assert_one_line, assert_same_run
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "rank", "name"), [("single", 0, "SIGTERM"), ("single", 0, "SIGINT"), ("zero2", 1, "SIGTERM")]
)
def test_a_signal_to_one_process_saves_on_all_and_exits_0_and_the_resumed_run_is_the_unbroken_one(
    engine,
    rank,
    name,
    server,
    unbroken,
    tmp_path,
):
    whole, _ = unbroken(engine)
    run = tmp_path / "run"
    codes, shown = server.run(run, engine=engine, signal={"rank": rank, "step": 5, "name": name})
    assert set(codes) == {0}, shown[-4000:]
    assert last_complete_checkpoint(run).name == "checkpoint-5"
    assert not (run / "model.safetensors").exists()
    assert f"{name}: saving a checkpoint at the end of this step" in shown
    assert f"=> resume with: python matrix_llm/train.py {tmp_path}/run.yaml --resume_from_checkpoint true" in shown
    codes, shown = server.run(run, "--resume_from_checkpoint", "true", engine=engine)
    assert set(codes) == {0}, shown[-4000:]
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_signal_in_the_last_step_does_not_keep_the_run_from_finishing(server, unbroken, tmp_path):
    codes, shown = server.run(tmp_path / "run", signal={"rank": 0, "step": RECIPE["max_steps"], "name": "SIGTERM"})
    assert codes == [0]
    assert "resume with" not in shown
    assert_same_run(tmp_path / "run", unbroken("single")[0])


LAUNCHES = {"one process": ["--num_processes", "1", "--cpu"], "zero2": ["--num_processes", "2", "--use_deepspeed"]}


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and needs Linux to hear of a launcher's end")
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_sigterm_to_accelerate_launch_itself_saves_before_the_workers_go(name, tmp_path):
    settings = {
        **RECIPE,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 100000,
        "save_steps": 1000,
        "logging_steps": 1,
        "builtin_rows": 64,
    }
    settings |= {"per_device_train_batch_size": 1, "eval_strategy": "no"}
    if name == "zero2":
        skip_without_deepspeed("zero2")
        settings["deepspeed"] = deepspeed_config(tmp_path / "ds.json", 2)
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *LAUNCHES[name],
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    command += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command += [str(ROOT / "matrix_llm" / "train.py"), str(tmp_path / "r.yaml")]
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, launcher, log)
        workers = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(workers) == (2 if name == "zero2" else 1)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(40)
        wait_for(lambda: not any(lives(pid) for pid in workers), None, log)
    finally:
        if launcher.poll() is None:
            launcher.kill()
    shown = log.read_text()
    last = last_complete_checkpoint(tmp_path / "run")
    assert last is not None, shown[-4000:]
    assert f"saved in {last}" in shown
    assert (
        f"accelerate.commands.launch {' '.join(LAUNCHES[name])}" in shown.split("=> resume with: ")[1]
    )  # the launcher's own command
    assert not list((tmp_path / "run").glob(".*"))


def wait_for(what, process, log, seconds=90):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, log.read_text()[-4000:]
        assert process is None or process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.05)


def test_a_second_ctrl_c_aborts_and_a_repeated_sigterm_does_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    stop = StopOnSignal()
    stop.receive(signal.SIGINT)
    stop.receive(signal.SIGINT)  # the launcher's copy of the same key press
    now[0] = 2.0
    stop.receive(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with preemption.stop_on_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop.receive
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_resume_command_replaces_an_earlier_resumption():
    for given in (["--resume_from_checkpoint", "x y"], ["--resume-from-checkpoint=true"], ["--resume_from_checkpoint"]):
        command = resume_command(["r.yaml", *given, "--seed", "1"])
        assert command.endswith("matrix_llm/train.py r.yaml --seed 1 --resume_from_checkpoint true")


@pytest.mark.parametrize(
    ("argv", "launcher", "resumed"),
    [
        ("matrix-llm train", "", "matrix-llm train"),
        ("matrix-llm demo", "", "matrix-llm train"),  # demo names its recipe itself
        ("matrix-llm train", "accelerate launch -m matrix_llm train r.yaml", "accelerate launch -m matrix_llm train"),
        ("matrix-llm demo", "accelerate launch -m matrix_llm demo", "accelerate launch -m matrix_llm train"),
        ("train.py", "accelerate launch matrix_llm/train.py r.yaml", "accelerate launch matrix_llm/train.py"),
        (
            "train.py",
            "accelerate launch --log_dir matrix_llm train.py",
            "accelerate launch --log_dir matrix_llm train.py",
        ),
    ],
)
def test_the_resume_command_is_the_console_command_where_that_was_given(argv, launcher, resumed, monkeypatch):
    monkeypatch.setattr("sys.argv", [argv, "r.yaml"])
    assert resume_command(["r.yaml"], launcher.split()) == f"{resumed} r.yaml --resume_from_checkpoint true"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_one_line(engine, server, tmp_path):
    skip_without_deepspeed(engine)
    start = time.monotonic()
    codes, shown = server.run(tmp_path / "run", engine=engine, nan={"rank": 1, "step": 4}, grace=60)
    assert codes == [1, 1], shown[-4000:]
    assert_one_line(shown, "The loss is nan at step 4, on the data rows [", "resume from", "checkpoint-2")
    assert time.monotonic() - start < 45  # nobody waited for SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_checkpoint_that_one_process_cannot_write_stops_all(engine, server, unbroken, tmp_path):
    skip_without_deepspeed(engine)
    run = tmp_path / "run"
    codes, shown = server.run(run, engine=engine, limit={"step": 5, "bytes": 150_000}, grace=60)
    # each by itself, or with the launcher's SIGTERM after the other: nobody hangs
    assert set(codes) in ({1}, {1, -signal.SIGTERM}), (codes, shown[-4000:])
    assert "Traceback" not in shown
    assert "checkpoint-6 could not be written" in shown
    assert last_complete_checkpoint(run).name == "checkpoint-4"
