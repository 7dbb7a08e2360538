"""The folder of the study, OUT.

study.json      the model, the data and the sizes that all runs share, written by `prepare`
cache/          what the frozen layers make of every row
tuning.jsonl    one row per tuning run, written as it ends
runs.jsonl      one row per run of the study, written as it ends
runs/           the same rows as files, and ARM-sSEED.npy: the sketch of the way that the weights went
logs/           what the processes printed
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.design import StudyError
from benchmarks.study.folder import RUNS, SETUP
from matrix_llm.base.files import write_text

TUNING = "tuning.jsonl"
__all__ = ["RUNS", "SETUP", "TUNING", "checksum", "read_setup", "register_setup", "result_file"]


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def register_setup(output: Path, setup: Mapping[str, Any]) -> None:
    """Write OUT/study.json, or compare with the one that is there. Files count by their bytes, wherever they lie.

    Raises:
        StudyError: the folder belongs to another setup.
    """
    file = output / SETUP
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [key for key in ("sizes", "sha256") if before.get(key) != setup[key]]:
            raise StudyError(
                f"{output} holds a study with other {' and '.join(changed)}. Prepare it as before, or use another "
                "--output."
            )
    write_text(file, json.dumps(setup, indent=1) + "\n")


def read_setup(output: Path) -> dict[str, Any]:
    """What `prepare` wrote.

    Raises:
        StudyError: it has not been run, or not to its end.
    """
    file = output / SETUP
    if not file.is_file() or not (output / "cache" / "complete").is_file():
        raise StudyError(f"{output} has not been prepared. Run `pretrained_study.py prepare --output {output}` first.")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def result_file(output: Path, arm: str, seed: int, rate: float | None = None) -> Path:
    """Where a run's process leaves its row; with a rate, that of a tuning run."""
    return output / "runs" / (f"{arm}-s{seed}.json" if rate is None else f"tune-{arm}-s{seed}-{rate:g}.json")
