"""Make what is missing: the cache, the tuning runs, the runs. A run whose row exists is not repeated."""

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.pretrained_study import cache
from benchmarks.pretrained_study.analysis import choose_rates, choose_seeds
from benchmarks.pretrained_study.design import PILOT_SEEDS, RATES, TUNING_SEEDS, Sizes, make_arms, tuned_as
from benchmarks.pretrained_study.folder import RUNS, TUNING, checksum, read_setup, register_setup, result_file
from benchmarks.pretrained_study.rows import read_sets
from benchmarks.study.design import StudyError
from benchmarks.study.folder import append_row
from benchmarks.study.processes import last_line, run_logged, say
from matrix_llm.base.files import read_jsonl, write_text

STAGES = ("pilot", "main", "all")


@dataclass(frozen=True)
class Task:
    """One run to make."""

    arm: str
    seed: int
    rate: float
    tuning: bool = False


def prepare(output: Path, model: Path, train: Path, test: Path, math: Path, sizes: Sizes) -> None:
    """Read the rows, run the frozen layers over them once, and keep what all runs share in OUT/study.json."""
    from benchmarks.pretrained_study.split import Split

    files = {"train": train, "test": test, "math": math}
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise StudyError(
            f"--model {model} holds no .safetensors file. Fetch it: matrix-llm fetch smollm2-135m {model}."
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    sets = read_sets(train, test, math, tokenizer, sizes)
    sha256 = {name: checksum(file) for name, file in files.items()} | {p.name: checksum(p) for p in weights}
    paths = {name: str(file.absolute()) for name, file in (files | {"model": model}).items()}
    register_setup(output, {**paths, "sizes": asdict(sizes), "sha256": sha256})
    split = Split(model, sizes.trained_layers)
    for name, rows in sets.items():
        for done in cache.prepare(split, name, rows, output / "cache"):
            say(f"{name}: {done} of {len(rows)} rows")
    write_text(output / "cache" / "complete", "\n")


def tuning_tasks(output: Path) -> list[Task]:
    """Every arm that is tuned, at every rate, on the tuning seeds."""
    arms = [arm.name for arm in make_arms(_sizes(output).rows) if tuned_as(arm.name) == arm.name]
    return [Task(arm, seed, rate, tuning=True) for seed in TUNING_SEEDS for arm in arms for rate in RATES]


def study_tasks(output: Path, stage: str) -> list[Task]:
    """The runs of a stage: `pilot` ce and mce on three seeds; `main` ce, mce and the control on all; `all` every arm.

    Seed by seed, so that a study that is cut short has complete pairs.
    """
    arms, rows = make_arms(_sizes(output).rows), read_jsonl(output / RUNS)
    rates = choose_rates(read_jsonl(output / TUNING))
    pilot = [Task(arm, seed, rates[arm]) for seed in PILOT_SEEDS for arm in ("ce", "mce")]
    if stage == "pilot":
        return pilot
    seeds = range(1, choose_seeds(rows) + 1)
    main = [Task(a.name, s, rates[tuned_as(a.name)]) for s in seeds for a in arms if a.group in ("main", "control")]
    if stage == "main":
        return main
    return main + [Task(a.name, s, rates[tuned_as(a.name)]) for s in seeds for a in arms if a.group == "secondary"]


def _sizes(output: Path) -> Sizes:
    return Sizes(**read_setup(output)["sizes"])


def known(output: Path) -> set[tuple[str, int, float, bool]]:
    """(arm, seed, rate, whether it tunes) of every row.

    Raises:
        StudyError: a row of an arm whose settings have changed since.
    """
    settings = {arm.name: dict(arm.overrides) for arm in make_arms(_sizes(output).rows)}
    found = set()
    for name in (TUNING, RUNS):
        for row in read_jsonl(output / name):
            if row["settings"] != settings.get(row["arm"]):
                raise StudyError(
                    f"{output / name} holds runs of {row['arm']} with other settings, {row['settings']}. "
                    "Use another --output, or remove those rows."
                )
            found.add((row["arm"], row["seed"], row["rate"], name == TUNING))
    return found


def make_missing(output: Path, tasks: Sequence[Task], workers: int) -> int:
    """Make the runs that have no row yet, one process each, and return how many there were.

    A failure stops further runs from starting; those under way may finish.
    """
    done = known(output)
    missing = [task for task in tasks if (task.arm, task.seed, task.rate, task.tuning) not in done]
    say(f"{len(missing)} of {len(tasks)} runs to make")
    failures: list[StudyError] = []
    writing = threading.Lock()

    def make(task: Task) -> None:
        if failures:
            return
        try:
            row = make_one(output, task)
        except StudyError as error:
            failures.append(error)
            return
        with writing:
            append_row(output / (TUNING if task.tuning else RUNS), row)
        ce = row.get("ce_tuning_heldout" if task.tuning else "ce_heldout")
        result = row["status"] if ce is None else f"held-out CE {ce:.5f}{', rises' if row['rises'] else ''}"
        say(f"{task.arm}, seed {task.seed}, rate {task.rate:g}: {result}")

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(make, missing))
    if failures:
        raise failures[0]
    return len(missing)


def make_one(output: Path, task: Task) -> Mapping[str, object]:
    """The row of one run, made in a process of its own, or left by one that ended before its row was appended."""
    file = result_file(output, task.arm, task.seed, task.rate if task.tuning else None)
    log = output / "logs" / f"{file.stem}.log"
    if not file.is_file():
        command = ["-m", "benchmarks.pretrained_study.one_run", str(output.absolute()), "--arm", task.arm]
        command += ["--seed", str(task.seed), "--rate", str(task.rate), *(["--tuning"] if task.tuning else [])]
        if run_logged(command, log):
            said = last_line(log.read_text(encoding="utf-8"))
            raise StudyError(f"{file.stem} failed: {said} The full log is {log}. Then run the same command again.")
    row: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    if row["rate"] != task.rate:
        raise StudyError(
            f"{file} was made at rate {row['rate']}, but the tuning now gives {task.rate}. Rows were added to "
            f"{output / TUNING} since: remove them, or use another --output."
        )
    return row
