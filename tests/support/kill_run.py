"""A server that runs matrix_llm/train.py in forked processes, some of which kill themselves with SIGKILL.

It imports everything once. A line of JSON in is a job, a line of JSON out the exit code of each of its processes.

{"arguments": [...], "processes": 2, "log": "/tmp/log", "output": "/tmp/run", "kill": {"rank": 1, "step": 3}}

Other kills:
- "kill": {"rank": 0, "event": 12, "tear": true}
- "kill": {"rank": 0, "moving": "checkpoint-4"}
Instead of "kill":
- "signal": {"rank": 1, "step": 3, "name": "SIGTERM"} sends a signal
- "limit": {"step": 5, "bytes": 150000} forbids larger files from that step on
- "nan": {"rank": 1, "step": 3} spoils that process's weights
"env" adds environment variables; "grace" is how many seconds pass between SIGTERM and SIGKILL to the other processes.

"step" kills before the backward pass of that step. An event is one operation on a file below the output directory while
the run trains or saves (a file opened for writing or removed, a folder made, moved or removed), and "event" kills just
before it; "tear" first cuts the file of a checkpoint that was written last to half, as a kill in the middle of writing
would. "moving" kills just before that folder of the run gets another name.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])


def kill_this_process() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def watch(job: dict, rank: int) -> dict:
    """Install what is to be done to this process, and count its events."""
    from matrix_llm.trainer import MatrixTrainer

    kill = job.get("kill") if (job.get("kill") or {}).get("rank") == rank else None
    output, counter = job["output"], {"events": 0, "on": False}
    last_file = [""]

    def hook(name: str, args: tuple) -> None:
        if not counter["on"] or name not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = args[0] if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        path = os.fsdecode(path)
        if not path.startswith(output) or (name == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        counter["events"] += 1
        moving = kill and name == "os.rename" and os.path.join(output, kill.get("moving", "")) == path
        if kill and (moving or counter["events"] == kill.get("event")):
            if kill.get("tear") and os.path.isfile(last_file[0]):
                os.truncate(last_file[0], os.path.getsize(last_file[0]) // 2)
            kill_this_process()
        if name == "open":
            # a kill does not shorten metrics.jsonl, to which lines are appended
            last_file[0] = path if "/.saving" in path else ""
        if path.endswith("results.partial.json") and name == "os.remove":
            counter["on"] = False  # the run is finished

    train, step = MatrixTrainer.train, MatrixTrainer.training_step

    def counted_train(self, *args, **kwargs):
        counter["on"] = True
        return train(self, *args, **kwargs)

    def killed_step(self, *args, **kwargs):
        if kill and self.state.global_step + 1 == kill.get("step"):
            kill_this_process()
        if (asked := job.get("signal")) and (rank, self.state.global_step + 1) == (asked["rank"], asked["step"]):
            os.kill(os.getpid(), getattr(signal, asked["name"]))
        if (spoil := job.get("nan")) and (rank, self.state.global_step + 1) == (spoil["rank"], spoil["step"]):
            next(p for n, p in self.model.named_parameters() if n.endswith("norm.weight")).data.fill_(float("nan"))
        if (limit := job.get("limit")) and self.state.global_step + 1 == limit["step"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit["bytes"], resource.RLIM_INFINITY))
        return step(self, *args, **kwargs)

    MatrixTrainer.train, MatrixTrainer.training_step = counted_train, killed_step
    sys.addaudithook(hook)
    return counter


def child(job: dict, rank: int, port: int) -> None:
    import torch

    from matrix_llm.train import main

    torch.set_num_threads(1)
    log = os.open(job["log"] + f".{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["processes"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["processes"]),
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(job["processes"])}
    os.environ |= job.get("env", {})
    if "ACCELERATE_USE_FSDP" in os.environ:
        from tests.support import fsdp_on_cpu

        fsdp_on_cpu.allow()
    counter = watch(job, rank)
    status = 70
    try:
        status = main(job["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        Path(f"{job['log']}.{rank}.events").write_text(str(counter["events"]))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict) -> list[int]:
    """The exit codes. When one process fails, the others get SIGTERM and then SIGKILL, as from a launcher."""
    from tests.support.engines import free_port

    port = free_port()
    pids = {}
    for rank in range(job["processes"]):
        if (pid := os.fork()) == 0:
            child(job, rank, port)
        pids[pid] = rank
    codes = [0] * job["processes"]
    left, deadline = set(pids), time.monotonic() + 240
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.02)
            if time.monotonic() > deadline:
                for each in left:
                    os.kill(each, signal.SIGKILL)
            continue
        left.discard(pid)
        codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        if codes[pids[pid]] != 0 and left:
            for each in left:
                os.kill(each, signal.SIGTERM)
            deadline = time.monotonic() + job.get("grace", 3)
    return codes


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)
    import matplotlib.pyplot  # noqa: F401
    import trl  # noqa: F401

    import matrix_llm.model.load
    import matrix_llm.plan.steps
    import matrix_llm.publish.push
    import matrix_llm.run.metrics
    import matrix_llm.trainer  # noqa: F401

    if "DS_ACCELERATOR" in os.environ:
        import deepspeed  # noqa: F401
    for line in sys.stdin:
        os.write(answers, (json.dumps(run(json.loads(line))) + "\n").encode())
