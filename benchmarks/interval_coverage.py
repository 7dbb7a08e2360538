"""How often the interval of a score with several samples of each problem holds the true accuracy.

    python benchmarks/interval_coverage.py

Runs are simulated: each problem's chance to be solved is drawn from a Beta distribution, its samples from that chance.
Beside `clustered_interval` stands Wilson's interval of all samples, as if each were a problem of its own.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from matrix_llm.base.statistics import clustered_interval, wilson_interval

DIFFICULTIES = {  # parameters of the Beta distribution
    "all problems alike": (50.0, 50.0),
    "half easy, half hard": (0.3, 0.3),
    "mostly easy": (1.8, 0.2),
    "mostly hard": (0.1, 1.9),
    "nearly all too hard": (0.02, 1.98),
}


def coverage(problems: int, samples: int, difficulty: tuple[float, float], runs: int) -> tuple[float, float]:
    """The share of runs in which the clustered interval holds the truth, and in which Wilson's of all samples does."""
    draw, truth = np.random.default_rng(0), difficulty[0] / sum(difficulty)
    clustered = pooled = 0
    for _ in range(runs):
        right = draw.binomial(samples, draw.beta(*difficulty, problems))
        low, high = clustered_interval((right / samples).tolist(), [samples] * problems)
        clustered += low <= truth <= high
        low, high = wilson_interval(int(right.sum()), samples * problems)
        pooled += low <= truth <= high
    return clustered / runs, pooled / runs


def table() -> Iterator[str]:
    yield f"{'problems':>8} {'samples':>7}  {'difficulty':20} {'clustered':>9} {'all samples':>11}"
    for problems in (5, 30, 200, 1319):
        for samples in (4, 16):
            for name, difficulty in DIFFICULTIES.items():
                clustered, pooled = coverage(problems, samples, difficulty, runs=500 if problems > 1000 else 2000)
                yield f"{problems:>8} {samples:>7}  {name:20} {100 * clustered:>7.1f} % {100 * pooled:>9.1f} %"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
