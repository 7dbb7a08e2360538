"""The start of vLLM, which takes from seconds to minutes: its stage on the terminal, and all that it says in a file.

vLLM, torch and their native libraries write to the standard output and error of this process and of those that it
starts. While vLLM starts, both lead to the log file (the descriptors do, whatever sys.stdout is). vLLM's own processes
write there until they end; this process gets its terminal back.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matrix_llm.base.text import visible

# What the log holds once a stage has begun, in the order of the stages
STAGES = (
    (re.compile(r"Starting to load model"), "loading the weights"),
    (re.compile(r"(Loading weights|Model loading) took"), "measuring memory"),
    (re.compile(r"Dynamo bytecode transform|Warming up model for the compilation|Compiling a graph"), "compiling"),
    (re.compile(r"KV cache size"), "warming up"),
)
FIRST_STAGE = "starting its process"
PREFIX = re.compile(r"^(\([^)]*\) )?(ERROR|CRITICAL|WARNING|INFO)? ?(\d\d-\d\d \d\d:\d\d:\d\d )?(\[[^]]*\])?\s*")
REASON = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*")
NO_REASON = "Engine core initialization failed"  # vLLM's own last word, which only points to the lines before
LONGEST_REASON = 400  # characters
BLOCK = 2**16  # bytes of the log that are read at a time


@contextmanager
def start_logged(log: Path | None, *, shown: bool = True) -> Iterator[None]:
    """Run the block, in which vLLM starts, with its output in `log` and its stage on standard error.

    On a terminal the stage and the seconds are one line that changes; elsewhere each stage is a line.

    Args:
        log: replaced if it exists; None: the output is thrown away.
        shown: False where another process shows the stage.
    """
    path = Path(os.devnull) if log is None else log
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    finished = threading.Event()
    watcher = threading.Thread(target=_show_stages, args=(path, kept[1], finished), daemon=True)
    try:
        if shown:
            watcher.start()
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        finished.set()
        if shown:
            watcher.join()
        for place, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, place)
            os.close(descriptor)


def _show_stages(log: Path, terminal: int, finished: threading.Event) -> None:
    """Write the stage to the descriptor `terminal` until `finished` is set."""
    changes = os.isatty(terminal)
    started, text, last = time.monotonic(), "", ""
    with log.open(encoding="utf-8", errors="replace") as file:
        while not finished.is_set():
            text = text[-BLOCK:] + file.read(BLOCK)
            stage = stage_of(text) if text else FIRST_STAGE
            stage = last if stage == FIRST_STAGE and last else stage  # its line has left the window
            if changes:
                os.write(terminal, f"\r=> vLLM: {stage}, {time.monotonic() - started:.0f} s\x1b[K".encode())
            elif stage != last:
                os.write(terminal, f"=> vLLM: {stage}\n".encode())
            last = stage
            finished.wait(0.5)
    if changes:
        os.write(terminal, b"\r\x1b[K")


def stage_of(text: str) -> str:
    """The last stage that vLLM's log tells of.

    >>> stage_of("INFO [x.py:1] Starting to load model m...\\nINFO [y.py:2] Loading weights took 0.1 seconds")
    'measuring memory'
    """
    begun = [stage for pattern, stage in STAGES if pattern.search(text)]
    return begun[-1] if begun else FIRST_STAGE


def why_not_started(log: Path | None) -> str | None:
    """What the log gives as the reason why vLLM could not start, in one line; None if there is none.

    vLLM's processes print their tracebacks, so it is the last line there that names an error.
    """
    if log is None or not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4 * BLOCK))
        lines = file.read().decode("utf-8", "replace").splitlines()
    named = [found for line in lines if REASON.match(found := PREFIX.sub("", line)) and NO_REASON not in found]
    return visible(named[-1][:LONGEST_REASON]) if named else None
