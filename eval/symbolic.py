"""The last rung: math-verify (sympy) in a worker process that can be killed.

The worker reads one JSON line [given, gold] and answers one JSON line. It holds at most MEMORY bytes of address space; a pair
that takes longer than SECONDS, or kills the worker, is ungraded (None), and the next pair gets a new worker. No signals:
this works in any thread.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import atexit
import contextlib
import importlib.util
import json
import selectors
import subprocess
import threading

SECONDS = 3.0
START_SECONDS = 60.0
MEMORY = 2 * 2**30

_lock = threading.Lock()
_worker: subprocess.Popen[bytes] | None = None


def available() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _read_line(worker: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    assert worker.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        return worker.stdout.readline() or None if selector.select(seconds) else None


def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.wait()
        for pipe in (_worker.stdin, _worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        _worker = None


atexit.register(_stop)


def _start() -> "subprocess.Popen[bytes] | None":
    global _worker
    if _worker is None or _worker.poll() is not None:
        _stop()
        command = [sys.executable, str(Path(__file__).resolve())]
        _worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if _read_line(_worker, START_SECONDS) is None:  # "ready": imports take about a second
            _stop()
    return _worker


def equal(given: str, gold: str, *, seconds: float = SECONDS) -> bool | None:
    """math-verify's verdict, or None: it is not installed, ran out of its time or memory, or died."""
    if not available():
        return None
    with _lock:
        worker = _start()
        if worker is None or worker.stdin is None:
            return None
        try:
            worker.stdin.write((json.dumps([given, gold]) + "\n").encode())
            worker.stdin.flush()
            line = _read_line(worker, seconds)
            if line is None:
                _stop()
                return None
            return json.loads(line)
        except (OSError, ValueError):
            _stop()
            return None


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import LatexExtractionConfig, parse, verify

    how = [LatexExtractionConfig()]
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        given, gold = json.loads(line)
        try:
            sides = [
                parse(f"${text}$", extraction_config=how, parsing_timeout=None, raise_on_error=True)
                for text in (gold, given)
            ]
            verdict = (
                bool(verify(sides[0], sides[1], timeout_seconds=None, raise_on_error=True)) if all(sides) else False
            )
        except MemoryError:
            verdict = None  # type: ignore[assignment]
        except Exception:  # whatever sympy throws at untrusted text
            verdict = False
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
