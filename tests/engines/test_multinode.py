"""Two "machines" on loopback, each started by its own `accelerate launch` as docs/multinode.md says, give the numbers of one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.engines import deepspeed_config, environment, free_port, skip_without_deepspeed
from tests.support.parity_runs import REFERENCE, Found, differences, job_of, shared_runner
from tests.support.paths import ROOT, SUPPORT

pytestmark = pytest.mark.slow
CASES = ("untied", "top_k 16")
LAUNCH = {
    "zero3": ["--use_deepspeed", "--deepspeed_multinode_launcher", "standard"],
    "fsdp2": ["--config_file", str(ROOT / "ds_configs" / "fsdp2.yaml")],
}


def launch(rank, port, flags, script, log):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *flags,
        "--num_machines",
        "2",
        "--num_processes",
        "2",
    ]
    command += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *script]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    runner = shared_runner(tmp_path_factory.mktemp("reference"))
    return runner.models, runner.results(REFERENCE)


@pytest.mark.parametrize("engine", LAUNCH)
def test_two_machines_match_one_process(engine, reference, tmp_path):
    skip_without_deepspeed(engine)
    models, expected = reference
    job = job_of(engine, tmp_path, models, CASES)
    (tmp_path / "job.json").write_text(json.dumps(job))
    port, logs = free_port(), [tmp_path / f"machine{rank}.log" for rank in range(2)]
    script = [str(SUPPORT / "distributed_run.py"), str(tmp_path / "job.json")]
    machines = [launch(rank, port, LAUNCH[engine], script, log) for rank, log in enumerate(logs)]
    try:
        codes = [machine.wait(1800) for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                machine.terminate()  # passed on to its process
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    for case in CASES:
        got = Found.read(tmp_path / case)
        assert got.engine["processes"] == 2
        assert (got.engine["head_is_partitioned"], got.engine["head_is_dtensor"]) == (
            engine == "zero3",
            engine == "fsdp2",
        )
        found = differences(got, expected[case])
        assert max(found.values()) < 1e-5, found


SRUN = """#!/bin/bash
# one node after the other, in the background; "exec" in the script makes each process the launcher itself
for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! >> "$PIDS"; nodes="$nodes $!"; done
status=0
for each in $nodes; do wait $each || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> "$REQUEUED"; fi
"""


def test_the_slurm_script_is_stopped_requeued_and_goes_on_to_the_end(tmp_path):
    """docs/slurm.sh itself on two loopback nodes, with stand-ins for srun and scontrol; SLURM's SIGTERM reaches the launchers."""
    from tests.support.tiny import TINY

    skip_without_deepspeed("zero2")
    run, steps = tmp_path / "run", 40
    settings = {
        **TINY,
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": 1000,
        "per_device_train_batch_size": 1,
    }
    settings |= {"output_dir": str(run), "deepspeed": deepspeed_config(tmp_path / "ds.json", 2)}
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = environment()
    env |= {
        "PATH": f"{tmp_path}{os.pathsep}{env['PATH']}",
        "PIDS": str(tmp_path / "pids"),
        "REQUEUED": str(tmp_path / "requeued"),
    }
    env |= {"SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "PER_NODE": "1"}

    def submit(log, **more):
        shown = {**env, "PORT": str(free_port()), **more}
        with log.open("w") as file:
            return subprocess.Popen(
                [str(ROOT / "docs" / "slurm.sh"), str(tmp_path / "r.yaml")],
                env=shown,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    first, log, metrics = submit(tmp_path / "first"), tmp_path / "first", run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert first.poll() is None, log.read_text()[-6000:]
        time.sleep(0.05)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    assert first.wait(1800) == 0, log.read_text()[-6000:]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    (saved,) = run.glob("checkpoint-*")
    assert 3 <= int(saved.name.split("-")[1]) < steps

    second, log = submit(tmp_path / "second"), tmp_path / "second"
    assert second.wait(1800) == 0, log.read_text()[-6000:]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # not again
    assert json.loads((run / "results.json").read_text())["processes"] == 2
    logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(
        range(1, steps + 1)
    )  # by one process, and none twice

    third, log = submit(tmp_path / "third", ENGINE="--no_such_flag"), tmp_path / "third"
    assert third.wait(1800) != 0, log.read_text()[-6000:]  # any other failure is not requeued
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
