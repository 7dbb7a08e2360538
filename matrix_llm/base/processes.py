"""Processes that must not outlive this one."""

import subprocess
import sys
from collections.abc import Sequence

WATCH = """
import contextlib, os, signal, sys
sys.stdin.read()
for pid in sys.argv[1:]:
    with contextlib.suppress(OSError):
        os.kill(int(pid), signal.SIGKILL)
"""


def kill_with_this_process(pids: Sequence[int | None]) -> subprocess.Popen:
    """Start a watcher that kills the processes `pids` when this one is gone, by SIGKILL as well.

    It waits for the end of its standard input, which the system closes however this process ends. Kill the watcher
    once they have ended by themselves: their numbers will be given to others.
    """
    command = [sys.executable, "-I", "-c", WATCH, *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
