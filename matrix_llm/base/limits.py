"""A bound on processor time and memory for code that came with somebody else's files, such as a chat template."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from matrix_llm.base.errors import LimitError

with contextlib.suppress(ImportError):  # not on Windows
    import resource

SECONDS = 5.0  # of processor time; a template takes milliseconds
MEMORY = 2**30  # bytes on top of what the process has
AGAIN = 0.1  # seconds until the signal is repeated, should the code have swallowed the error
STATM = Path("/proc/self/statm")  # its first number: pages of address space


@contextlib.contextmanager
def limited(what: str, seconds: float = SECONDS) -> Iterator[None]:
    """Stop the block when it takes too much processor time, or memory.

    Time is that of the process, so that a crowded machine changes nothing. Both limits are those of the operating
    system; they also hold within an operation of Python that looks at signals, such as 9**9**9. Time is limited in the
    main thread alone, and memory on Linux alone: elsewhere the block runs without.

    Args:
        what: what runs, for the message: "the chat template".

    Raises:
        LimitError: it was stopped.
    """
    try:
        with _limited_memory(), _limited_time(what, seconds):
            yield
    except MemoryError:
        raise LimitError(f"{what} asks for more than {MEMORY // 2**20:,} MiB of memory. Use another one.") from None


@contextlib.contextmanager
def _limited_time(what: str, seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    error = LimitError(f"{what} does not end: it was stopped after {seconds:g} s of processor time. Use another one.")
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        raise error

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if stopped:  # and the code has swallowed the error: Jinja does, where it tries to compute constants
        raise error


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        pages = int(STATM.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    ceilings = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *ceilings]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
