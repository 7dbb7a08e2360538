"""The processes that a study starts, and its progress lines."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.design import Arm

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one thread rounds alike in every run
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",  # glibc keeps freed memory: the same bits with fewer page faults
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


def say(text: str) -> None:
    print(f"=> {text}", flush=True)


def train_command(recipe: Path, arm: Arm, seed: int, folder: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The interpreter's arguments that train one run. The arm's settings come last, so `overrides` cannot undo them."""
    script = [str(ROOT / "matrix_llm" / "train.py"), str(recipe)]
    return [*script, *overrides, "--seed", str(seed), "--output_dir", str(folder), *arm.arguments]


def measure_command(folder: Path, file: Path, options: Sequence[str] = ()) -> list[str]:
    """Arguments of the interpreter that measure the checkpoint in `folder` and write `file`."""
    return ["-m", "benchmarks.study.measure", str(folder), "--out", str(file), *options]


def run_logged(command: Sequence[str], log: Path) -> int:
    """Exit status of `python COMMAND`, started in the repository's root; its output is appended to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        return subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
        ).returncode


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing.")
