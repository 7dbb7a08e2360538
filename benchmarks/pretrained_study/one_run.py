"""One run of the study, in a process of its own: train, measure, write OUT/runs/NAME.json.

    python -m benchmarks.pretrained_study.one_run OUT --arm mce --seed 1 --rate 1e-4 [--tuning]

A run takes minutes and keeps no checkpoint: one that was killed is made again from its start, with the same bits.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.pretrained_study.cache import CachedSet
from benchmarks.pretrained_study.design import Sizes, make_arms
from benchmarks.pretrained_study.folder import read_setup, result_file
from benchmarks.pretrained_study.measuring import measure
from benchmarks.pretrained_study.mechanism import Travel, compare_with_ce
from benchmarks.pretrained_study.rows import draw
from benchmarks.pretrained_study.split import Split
from benchmarks.pretrained_study.training import Step, describe_steps, train
from matrix_llm.base.files import atomic_path, write_text

LOOKS = 4  # times that the gradients are compared after the start


def make_run(output: Path, arm_name: str, seed: int, rate: float, *, tuning: bool) -> dict[str, Any]:
    """Train and measure; the row of runs.jsonl, or of tuning.jsonl."""
    setup = read_setup(output)
    sizes, cache, model = Sizes(**setup["sizes"]), output / "cache", Path(setup["model"])
    arm = next(arm for arm in make_arms(sizes.rows) if arm.name == arm_name)
    pool = CachedSet.open(cache, "tuning_pool" if tuning else "pool")
    places = draw(seed, len(pool.rows), sizes.rows)
    row: dict[str, Any] = {"arm": arm.name, "seed": seed, "rate": rate, "settings": dict(arm.overrides)}

    # 1. train, comparing gradients on the way
    torch.manual_seed(seed)
    split, tokenizer = Split(model, sizes.trained_layers), AutoTokenizer.from_pretrained(model)
    probe = None if tuning else CachedSet.open(cache, "heldout")
    travel, started, looked = Travel(split), time.perf_counter(), 0.0
    steps: list[Step] = []
    curve: list[dict[str, float]] = []
    count = min(len(places), arm.overrides.get("max_train_rows", len(places))) // sizes.batch_rows

    def look() -> None:
        nonlocal looked
        begun = time.perf_counter()
        if probe is not None:
            curve.append({"step": len(steps), **compare_with_ce(split, probe, arm.overrides)})
            split.upper.train()
        looked += time.perf_counter() - begun

    look()
    for step in train(split, pool, places, arm.overrides, rate, sizes.batch_rows):
        steps.append(step)
        if not math.isfinite(step.ce) or not math.isfinite(step.gradient):
            return {**row, "status": "diverged", "steps": len(steps)}
        if len(steps) % max(1, count // LOOKS) == 0:
            look()
    row |= {"status": "done", "train_seconds": round(time.perf_counter() - started - looked, 1)}
    row |= {**describe_steps(steps), "curve_gradient": curve}

    # 2. measure
    begun = time.perf_counter()
    if tuning:
        row |= measure(split, tokenizer, cache, ["tuning_heldout"])
    else:
        row |= measure(split, tokenizer, cache, ["heldout", "math"], Path(setup["test"]), sizes.greedy)
        with atomic_path(output / "runs" / f"{arm.name}-s{seed}.npy") as path, path.open("wb") as file:
            np.save(file, travel.sketch())
    row["measure_seconds"] = round(time.perf_counter() - begun, 1)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the study, after `prepare`")
    parser.add_argument("--arm", required=True, choices=[arm.name for arm in make_arms(1)])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="the peak learning rate")
    parser.add_argument("--tuning", action="store_true", help="draw from the tuning pool, measure the tuning rows")
    options = parser.parse_args(arguments)
    row = make_run(options.output, options.arm, options.seed, options.rate, tuning=options.tuning)
    file = result_file(options.output, options.arm, options.seed, options.rate if options.tuning else None)
    write_text(file, json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
