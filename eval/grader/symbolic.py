"""The last rung: math-verify (sympy) in a worker process that can be killed.

A pair may take SECONDS of processor time, which the operating system counts for the worker alone, so that a verdict
does not depend on what else the machine does. A pair past that, or past the worker's memory, is ungraded with its
reason, and the next pair gets a new worker. No signal handlers are used, so this works in any thread.

The worker is warm before it is asked, carries the number of its request in every reply, and ends with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .errors import UngradedError

SECONDS = 3.0  # of processor time for one pair
PAUSES = (0.5, 5.0, 20.0)  # seconds between tries to start the worker
PATIENCE = 900.0  # seconds of wall time after which a worker is given up that neither answers nor dies

# -P: without it Python would look for sympy's imports in this folder first, and take latex.py for one of them
COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("symbolic_worker.py"))]


def available() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def equal(given: str, gold: str, *, seconds: float = SECONDS) -> bool:
    """math-verify's verdict on two answers in LaTeX.

    Raises:
        UngradedError: it is not installed, took more than `seconds` of processor time or its memory, or failed.
    """
    if not available():
        raise UngradedError("math-verify, which would have to decide, is not installed")
    return _worker.ask(given, gold, seconds)


class _Worker:
    """One process that answers pairs one by one, started when first asked and restarted after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()

    def ask(self, given: str, gold: str, seconds: float) -> bool:
        with self._lock:
            try:
                process = self._running()
                number = next(self._numbers)
                _write(process, {"id": number, "given": given, "gold": gold, "seconds": seconds})
                reply = _read(process)
                if reply.get("id") != number:
                    raise UngradedError("the symbolic worker answered another request")
            except BaseException:  # also Ctrl-C: a reply left unread would be taken for the next one
                self.stop()
                raise
        if reply["verdict"] is None:
            raise UngradedError(str(reply["reason"]))
        return bool(reply["verdict"])

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # A machine short of memory or processes may refuse the first try: that is no property of the pair.
        for pause in (*PAUSES, None):
            self.stop()
            try:
                return self._start()
            except (UngradedError, OSError) as problem:
                if pause is None:
                    raise UngradedError(f"the symbolic worker does not start: {problem}") from None
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _start(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*COMMAND, str(os.getpid())], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        _read(self._process)  # its first line means that it is warm
        return self._process

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def forget(self) -> None:
        """In a forked child: the worker is the parent's, and so is the lock that another thread may have held."""
        self.__init__()  # type: ignore[misc]


def _write(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write((json.dumps(request) + "\n").encode())
        process.stdin.flush()
    except OSError as error:
        raise UngradedError(f"the symbolic worker cannot be reached: {error.strerror}") from None


def _read(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The worker's next line.

    Raises:
        UngradedError: it died, with what ended it, or has been silent for PATIENCE.
    """
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(PATIENCE):
            raise UngradedError(f"the symbolic worker was silent for {PATIENCE:.0f} s")
    line = process.stdout.readline()
    if line:
        reply: dict[str, Any] = json.loads(line)
        return reply
    status = process.wait()
    if hasattr(signal, "SIGPROF") and status == -signal.SIGPROF:
        raise UngradedError("more processor time than the limit")
    raise UngradedError(f"the symbolic worker died (status {status})")


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
