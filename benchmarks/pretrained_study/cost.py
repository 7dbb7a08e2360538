"""What a run costs on this machine, measured.

python benchmarks/pretrained_study.py cost --model models/smollm2-135m --train gsm8k/train.jsonl
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.output import markdown_table
from benchmarks.pretrained_study.cache import CachedSet
from benchmarks.pretrained_study.design import Sizes, make_arms
from benchmarks.pretrained_study.rows import batches, read_rows
from benchmarks.pretrained_study.split import Split
from benchmarks.pretrained_study.training import train
from benchmarks.study.processes import ENVIRONMENT, ROOT

WARM_UP_STEPS, TIMED_STEPS = 1, 4


@dataclass(frozen=True)
class StepCost:
    """Of one optimizer step."""

    seconds: float
    """The mean over the timed steps, without the frozen layers if their states are cached."""
    cpu_seconds: float
    """The same as processor time of all threads, which other work on the machine changes less."""
    tokens: float
    """Tokens of a step."""


def time_steps(model: Path, train_file: Path, trained_layers: int, arm_name: str) -> StepCost:
    """Train a few steps in this process, on as many threads as torch has."""
    sizes, tokenizer = Sizes(), AutoTokenizer.from_pretrained(model)
    count = (WARM_UP_STEPS + TIMED_STEPS) * sizes.batch_rows
    rows = read_rows(train_file, tokenizer, sizes.max_length)[:count]
    split = Split(model, trained_layers)
    states = [] if split.is_whole else [s for b in batches(range(count), 8) for s in split.lower([rows[i] for i in b])]
    maps = [torch.cat(states).numpy()] if states else []
    starts = [sum(len(row.ids) for row in rows[:i]) for i in range(count)]
    pool = CachedSet(rows, [0.0] * count, maps, starts)
    arm = next(arm for arm in make_arms(count) if arm.name == arm_name)
    wall, processor = [], []
    for _ in train(split, pool, range(count), arm.overrides, 1e-5, sizes.batch_rows):
        wall.append(time.perf_counter())
        processor.append(time.process_time())
    timed = rows[WARM_UP_STEPS * sizes.batch_rows :]
    seconds, cpu = ((clock[-1] - clock[WARM_UP_STEPS - 1]) / TIMED_STEPS for clock in (wall, processor))
    return StepCost(seconds, cpu, sum(len(row.ids) for row in timed) / TIMED_STEPS)


def time_workers(arguments: Sequence[str], workers: int, threads: int) -> list[StepCost]:
    """The same in `workers` processes at a time, each with its own number of threads."""
    command = [sys.executable, "-m", "benchmarks.pretrained_study.cost", *arguments]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(workers)
    ]
    return [StepCost(**json.loads(process.communicate()[0].splitlines()[-1])) for process in started]


def cost_table(
    model: Path, train_file: Path, layers: Sequence[int] = (0, 6), arms: Sequence[str] = ("ce", "mce")
) -> str:
    """Seconds a step for each way to use two cores; "runs an hour" compares them."""
    lines = []
    for trained_layers in layers:
        for arm in arms:
            for workers, threads in ((1, 2), (2, 1)):
                words = [str(model.absolute()), str(train_file.absolute()), str(trained_layers), arm]
                found = time_workers(words, workers, threads)
                seconds, cpu = (
                    sum(getattr(cost, n) for cost in found) / len(found) for n in ("seconds", "cpu_seconds")
                )
                steps = Sizes().rows // Sizes().batch_rows
                lines.append(
                    [
                        "all" if trained_layers == 0 else f"last {trained_layers}",
                        arm,
                        f"{workers} x {threads}",
                        f"{seconds:.2f}",
                        f"{cpu:.2f}",
                        f"{found[0].tokens:.0f}",
                        f"{steps * seconds / 60:.1f}",
                        f"{workers * 3600 / (steps * seconds):.1f}",
                    ]
                )
    header = [
        "trained layers",
        "arm",
        "workers x threads",
        "seconds a step",
        "CPU seconds",
        "tokens",
        "minutes a run",
        "runs an hour",
    ]
    return markdown_table(header, lines)


if __name__ == "__main__":
    cost = time_steps(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    print(json.dumps(asdict(cost)))
