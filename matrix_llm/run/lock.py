"""One run at a time in an output directory: a lock that the first process holds, and that vanishes with it.

The lock is the operating system's (flock) on OUTPUT/.lock, not the file itself: it is gone the moment its process ends,
however it ends, so a killed run never blocks its resumption. The file only says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from torch import distributed
from transformers import TrainingArguments

from matrix_llm.base.console import is_first_process, say
from matrix_llm.base.errors import RecipeError

LOCK = ".lock"  # in the output directory, while a run writes there

# What file systems answer that have no locks (some network and parallel ones).
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

_open: set[int] = set()  # the locks of this process


def _close_in_child() -> None:
    """A forked child (a data loader's worker) may outlive a killed run, and must not keep the lock alive."""
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def one_run_at_a_time(training: TrainingArguments) -> Iterator[None]:
    """Hold the lock of output_dir for the block, for all processes of this run. A collective: every process calls it.

    Raises:
        RecipeError: another run holds it; the same error in every process.
    """
    output = Path(str(training.output_dir))
    existed = output.is_dir()
    lock, reason = _take(output) if is_first_process() else (None, None)
    try:
        if training.world_size > 1:  # the others stop for the first one's reason
            reasons = [reason]
            distributed.broadcast_object_list(reasons)
            reason = reasons[0]
        if reason is not None:
            raise RecipeError(reason)
        yield
    finally:
        if lock is not None:
            (output / LOCK).unlink(missing_ok=True)  # while it is still held
            _open.discard(lock)
            os.close(lock)
            if not existed:
                with contextlib.suppress(OSError):  # not empty: the run has begun
                    output.rmdir()


def _take(output: Path) -> tuple[int | None, str | None]:
    """(the lock, None), or (None, why another run's lock forbids this one); (None, None) without locks."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None, None
    file = output / LOCK
    while True:
        # 1. open the file, and lock what was opened
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the run before this one has just removed an empty folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno in NO_LOCKS:
                say(f"=> {output} is on a file system without locks: a second run there would not be noticed.")
                return None, None
            return None, _refusal(file)
        # 2. the run before this one may have removed the file in between: the lock is then on a file without a name
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(file)):
                break
        os.close(lock)
    # 3. who holds it, for the other run's error
    _open.add(lock)
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
    return lock, None


def _refusal(file: Path) -> str:
    try:
        holder = file.read_text(encoding="utf-8").strip()
    except OSError:
        holder = ""
    reason = (
        f"output_dir={str(file.parent)!r}: another run is writing there ({holder or 'it has just started'}). "
        "Wait for it, stop it, or choose another output_dir."
    )
    if holder and f" on {socket.gethostname()}," not in holder:
        reason += f" If that machine is gone, and its file server has not noticed, remove {file}."
    return reason
