"""The last rung: math-verify (sympy) in a worker process that can be killed.

A pair that takes longer than SECONDS, or that kills the worker, is ungraded (None), and the next pair gets a new
worker. No signals are used, so this works in any thread.
"""

import atexit
import contextlib
import importlib.util
import json
import selectors
import subprocess
import sys
import threading
from pathlib import Path

SECONDS = 3.0
START_SECONDS = 60.0  # to import sympy, which takes about one

# -P: without it Python would look for sympy's imports in this folder first, and take latex.py for one of them
COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("symbolic_worker.py"))]


def available() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def equal(given: str, gold: str, *, seconds: float = SECONDS) -> bool | None:
    """math-verify's verdict; None if it is not installed, ran out of time or memory, or died."""
    return _worker.ask(given, gold, seconds) if available() else None


class _Worker:
    """One process that answers pairs one by one, started when first asked and restarted after it had to be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, given: str, gold: str, seconds: float) -> bool | None:
        with self._lock:
            process = self._running()
            if process is None or process.stdin is None:
                return None
            try:
                process.stdin.write((json.dumps([given, gold]) + "\n").encode())
                process.stdin.flush()
                line = _read_line(process, seconds)
                if line is not None:
                    return json.loads(line)
            except (OSError, ValueError):
                pass
            self.stop()  # too slow, or dead: its next line would answer this pair and not the next one
            return None

    def _running(self) -> "subprocess.Popen[bytes] | None":
        if self._process is None or self._process.poll() is not None:
            self.stop()
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            if _read_line(self._process, START_SECONDS) is None:  # its first line means that it is ready
                self.stop()
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


def _read_line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() or None if selector.select(seconds) else None


_worker = _Worker()
atexit.register(_worker.stop)
