"""Train and measure the runs of a study on this machine. A run whose row is in OUT/runs.jsonl is not repeated."""

import json
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.design import Arm, StudyError
from benchmarks.study.figures import training_figures
from benchmarks.study.folder import (
    BASE,
    MEASURED,
    PROBLEMS,
    RUNS,
    append_row,
    base_of,
    known_runs,
    register_setup,
    run_folder,
)
from benchmarks.study.processes import ROOT, last_line, measure_command, run_logged, say, train_command
from matrix_llm.run.run_folder import NON_FINITE


@dataclass(frozen=True)
class Study:
    """What all runs of a study share."""

    recipe: Path
    """The YAML file that every arm starts from."""
    output: Path
    """Folder of the study."""
    overrides: Sequence[str] = ()
    """Arguments of matrix_llm/train.py for every arm, such as ["--learning_rate", "1e-3"]."""
    measuring: Sequence[str] = ()
    """Arguments of benchmarks.study.measure for every run."""

    def log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"


@dataclass(frozen=True)
class Outcome:
    """The rows of one run."""

    row: dict[str, Any]
    """For runs.jsonl."""
    verdicts: dict[str, Any] | None = None
    """For problems.jsonl; None if the loss became non-finite."""


def train_and_measure(study: Study, arm: Arm, seed: int) -> Outcome:
    """Train and measure one run, continuing from whatever an earlier call left in its folder.

    Raises:
        StudyError: training or measuring failed. The message quotes the last line of the log.
    """
    folder = run_folder(study.output, arm.name, seed)
    log = study.log(folder.name)
    row: dict[str, Any] = {"arm": arm.name, "seed": seed, "settings": dict(arm.overrides)}

    # 1. Train, unless an earlier call did. Without a checkpoint there is nothing to resume, so the folder is emptied.
    resumed = False
    if not (folder / "results.json").is_file():
        resumed = any(folder.glob("checkpoint-*"))
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)
        overrides = [*study.overrides, *(["--resume_from_checkpoint", "true"] if resumed else [])]
        if run_logged(train_command(study.recipe, arm, seed, folder, overrides), log):
            if (folder / NON_FINITE).is_file():
                return Outcome({**row, "status": "diverged"})
            raise _failure(f"training {folder.name}", log)

    # 2. Measure, in a separate process as for training.
    measured = folder / MEASURED
    if not measured.is_file() and run_logged(measure_command(folder, measured, study.measuring), log):
        raise _failure(f"measuring {folder.name}", log)
    found = json.loads(measured.read_text(encoding="utf-8"))

    # 3. Checkpoints were kept for resuming and for the curve of effective ranks, and are now measured.
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    row |= {"status": "done", "resumed": resumed, **found["row"], **training_figures(folder)}
    return Outcome(row, {"arm": arm.name, "seed": seed, **found["problems"]})


def measure_base(study: Study) -> None:
    """Measure the weights that all runs start from, in OUT/base.json. A base that is not a local folder is skipped."""
    base, file = base_of(study.recipe, study.overrides), study.output / BASE
    if not base or file.is_file() or not (ROOT / base / "config.json").is_file():
        return
    if run_logged(measure_command(ROOT / base, file, study.measuring), study.log("base")):
        raise _failure(f"measuring {base}", study.log("base"))


def _failure(what: str, log: Path) -> StudyError:
    said = last_line(log.read_text(encoding="utf-8"))
    return StudyError(f"{what} failed: {said} The full log is {log}. Then run the same command again.")


class Worker:
    """Makes runs in the threads of a pool, and starts no further one after a failure."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.failure: Exception | None = None
        self._writing = threading.Lock()

    def make(self, arm: Arm, seed: int) -> None:
        """Make one run and append its rows. A failure is kept for the caller: other threads may finish their runs."""
        if self.failure:
            return
        started = time.perf_counter()
        try:
            outcome = train_and_measure(self.study, arm, seed)
        except Exception as error:
            self.failure = self.failure or error
            return
        with self._writing:
            if outcome.verdicts:
                append_row(self.study.output / PROBLEMS, outcome.verdicts)
            append_row(self.study.output / RUNS, outcome.row)  # last: this row marks the run as complete
        row = outcome.row
        result = f"{100 * row['accuracy_heldout']:.1f} %" if "accuracy_heldout" in row else row["status"]
        say(f"{arm.name}, seed {seed}: {result}, {time.perf_counter() - started:.0f} s")


def run_missing(study: Study, seeds: Sequence[int], arms: Sequence[Arm], workers: int = 1) -> int:
    """Make the runs that have no row yet, and return how many were missing.

    Seed by seed, so that a study that is cut short holds complete pairs.
    """
    register_setup(study.output, study.recipe, study.overrides, study.measuring)
    measure_base(study)
    known = known_runs(study.output)
    missing = [(arm, seed) for seed in seeds for arm in arms if (arm.name, seed) not in known]
    total = len(seeds) * len(arms)
    say(f"{len(missing)} of {total} runs to make; the others have their rows in {study.output / RUNS}")
    worker = Worker(study)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(lambda task: worker.make(*task), missing))
    if worker.failure:
        raise worker.failure
    return len(missing)
