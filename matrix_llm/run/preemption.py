"""A run that is asked to stop (SIGTERM, Ctrl-C) saves a checkpoint at the next step on all processes, and exits with 0.

Schedulers, `accelerate launch` and torchrun send SIGTERM, and SIGKILL some time later. The signal handler only notes
the request. At the end of every optimizer step the processes agree, in one all-reduce of one number, whether any of
them was asked. A process that stopped alone would leave the others waiting in a collective.

A second Ctrl-C, a second or more after the first, aborts at once. A second SIGTERM changes nothing: launchers and
schedulers repeat what the process has already received, and they can send SIGKILL.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matrix_llm.base.console import command_name

LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed")
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent dies


@dataclass(frozen=True)
class StopRequest:
    """The first signal that asked the run to stop."""

    number: int
    """The signal, SIGTERM or SIGINT."""
    time: float
    """When it arrived, on the monotonic clock."""


class StopOnSignal(TrainerCallback):
    """Ends training at the next step, with a checkpoint, once any process has received a signal.

    A request that arrives during the last step does not stop the run: it saves its final weights.
    """

    launcher: list[str]
    """The command line of the launcher that started this process; [] without one."""
    training_has_begun: bool
    """True once training has begun. Earlier errors come from the recipe or the data."""
    stopped: bool
    """True once training has been ended early; the same on every process."""

    def __init__(self) -> None:
        self.launcher = _launcher_command()  # now: the launcher may be gone when the run stops
        self.training_has_begun = self.stopped = False
        self._training_is_over = False
        self._request: StopRequest | None = None

    @property
    def is_asked(self) -> bool:
        """Whether this process has received a signal."""
        return self._request is not None

    def receive(self, number: int, frame: object = None) -> None:
        """The signal handler.

        Raises:
            KeyboardInterrupt: a second Ctrl-C, a second or more after the first signal.
        """
        now = time.monotonic()
        if self._request is None:
            self._request = StopRequest(number, now)
            who = f"process {os.environ['RANK']} received " if "RANK" in os.environ else ""
            what = "saving a checkpoint at the end of this step"
            if self._training_is_over:
                what = "training is over, saving the final weights"
            text = f"\n=> {who}{signal.Signals(number).name}: {what} (Ctrl-C again aborts)\n"
            os.write(2, text.encode())  # print is not safe in a handler
        elif (
            number == signal.SIGINT and now - self._request.time > 1
        ):  # sooner: the launcher's copy of the same key press
            raise KeyboardInterrupt

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.training_has_begun = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._training_is_over = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        asked = self.is_asked
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            flag = torch.tensor([float(asked)], device=args.device)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def stop_on_signals() -> Iterator[StopOnSignal]:
    """Install the handlers for the block, and restore the earlier ones after it.

    Outside the main thread, where Python allows no handlers, the callback never stops the run.
    """
    callback = StopOnSignal()
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    before = {number: signal.signal(number, callback.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    if sys.platform == "linux" and callback.launcher:
        # `accelerate launch` with one process dies of SIGTERM without passing it on, so the kernel is asked to send it.
        # Not without a launcher: `nohup python ... &` must outlive its shell.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        yield callback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launcher_command() -> list[str]:
    """The command line of the parent process if it is a launcher; [] if it is not, or if there is no /proc to read."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []
    return words if any(word.rsplit("/", 1)[-1].startswith(LAUNCHERS) for word in words[:3]) else []


def resume_command(arguments: Sequence[str], launcher: Sequence[str] = (), script: str = "matrix_llm/train.py") -> str:
    """The command that resumes a stopped run.

    Args:
        arguments: those that the script was started with.
        launcher: the launcher's command line, up to its own arguments for the script; [] without a launcher.
        script: the script's path in the repository; its name is also that of the console command, `matrix-llm train`.

    >>> resume_command(["recipes/tiny.yaml", "--resume_from_checkpoint=true", "--seed", "1"])
    'python matrix_llm/train.py recipes/tiny.yaml --seed 1 --resume_from_checkpoint true'
    """
    # 1. everything up to the script, which the launcher knows by its path or its module name
    file, module = Path(script).name, script.removesuffix(".py").replace("/", ".")
    if command_name(""):
        place = next((i for i, word in enumerate(launcher) if Path(word).name in ("matrix-llm", "matrix_llm")), None)
        start = [*(launcher[: place + 1] if place is not None else ["matrix-llm"]), Path(script).stem]
    else:
        place = next((i for i, word in enumerate(launcher) if word.endswith(file) or word == module), None)
        start = list(launcher[: place + 1]) if place is not None else ["python", script]
    # 2. the arguments, without an earlier --resume_from_checkpoint and its value
    kept: list[str] = []
    value_follows = False
    for word in arguments:
        if word.startswith("--") and word[2:].replace("-", "_").split("=")[0] == "resume_from_checkpoint":
            value_follows = "=" not in word
        elif value_follows and not word.startswith("--"):
            value_follows = False
        else:
            kept.append(word)
            value_follows = False
    return shlex.join([*start, *kept, "--resume_from_checkpoint", "true"])
