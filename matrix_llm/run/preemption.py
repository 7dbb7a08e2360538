"""A run that is asked to stop (SIGTERM, Ctrl-C) saves a checkpoint on all processes at the next step and exits with status 0.

Schedulers, `accelerate launch` and torchrun send SIGTERM and follow with SIGKILL after a while, so the handler only notes the
request. At the end of every optimizer step the processes agree whether any of them was asked: one all-reduce of one number.
Stopping on one process's own flag would leave the others waiting in a collective.

A second Ctrl-C, a second or more after the first, aborts at once. A repeated SIGTERM changes nothing: launchers and schedulers
pass on what the process has already received, and they have SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed")
PR_SET_PDEATHSIG = 1


class StopOnSignal(TrainerCallback):
    """Ends training at the next step, with a checkpoint, once any process has been asked to.

    `stopped` is True afterwards, on every process; a request during the last step is no reason to stop before the end.
    """

    def __init__(self) -> None:
        self.launcher = _parent_command()  # now: it may be gone when the run stops
        self.stopped = False
        self._training = True
        self._asked: tuple[float, int] | None = None

    def receive(self, number: int, frame: object = None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now, number
            who = f"process {os.environ['RANK']} received " if "RANK" in os.environ else ""
            what = (
                "saving a checkpoint at the end of this step"
                if self._training
                else "training is over, saving its weights"
            )
            text = f"\n=> {who}{signal.Signals(number).name}: {what} (Ctrl-C again aborts)\n"
            os.write(2, text.encode())  # print is not safe in a handler
        elif number == signal.SIGINT and now - self._asked[0] > 1:
            raise KeyboardInterrupt

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        asked = self._asked is not None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            flag = torch.tensor([float(asked)], device=args.device)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def stop_on_signals() -> Iterator[StopOnSignal]:
    """Installs the handlers for the time of the block; elsewhere than in the main thread, where Python allows none, it does nothing."""
    callback = StopOnSignal()
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    before = {number: signal.signal(number, callback.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    if sys.platform == "linux" and callback.launcher:
        # `accelerate launch` with one process dies of SIGTERM without telling its child: the kernel tells it. Without a launcher,
        # `nohup python ... &` must outlive its shell.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        yield callback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parent_command() -> list[str]:
    """The command line of the parent process if it is a launcher; [] if it is not, or where /proc is not there to tell."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []
    return words if any(word.rsplit("/", 1)[-1].startswith(LAUNCHERS) for word in words[:3]) else []


def resume_command(arguments: Sequence[str], launcher: Sequence[str] = (), script: str = "matrix_llm/train.py") -> str:
    """The command that goes on with the run: the launcher's own where it is known, `python SCRIPT` otherwise.

    >>> resume_command(["recipes/tiny.yaml", "--resume_from_checkpoint=true", "--seed", "1"])
    'python matrix_llm/train.py recipes/tiny.yaml --seed 1 --resume_from_checkpoint true'
    """
    file, module = Path(script).name, script.removesuffix(".py").replace("/", ".")
    place = next((index for index, word in enumerate(launcher) if word.endswith(file) or word == module), None)
    start = list(launcher[: place + 1]) if place is not None else ["python", script]
    kept: list[str] = []
    value_follows = False
    for word in arguments:
        if word.startswith("--") and word[2:].replace("-", "_").split("=")[0] == "resume_from_checkpoint":
            value_follows = "=" not in word
        elif not value_follows or word.startswith("--"):
            kept.append(word)
            value_follows = False
        else:
            value_follows = False
    return shlex.join([*start, *kept, "--resume_from_checkpoint", "true"])
