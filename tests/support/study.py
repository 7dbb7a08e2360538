"""Rows of a study whose truth is known, and a recipe for a real one that takes seconds."""

from pathlib import Path

import numpy as np

from benchmarks.study.folder import PROBLEMS, RUNS, append_row

MINIMAL_STUDY_RECIPE = """
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer_vocab_size: 300
dataset: builtin
builtin_rows: 60
eval_dataset: builtin
builtin_eval_rows: 8
prompt_template: plain
max_steps: 3
per_device_train_batch_size: 4
effective_rank_steps: 1
logging_steps: 1
save_strategy: steps
save_steps: 2
use_cpu: true
bf16: false
"""


def write_synthetic_study(folder: Path, gains: dict[str, float], seeds: int = 5, size: int = 2000) -> None:
    """runs.jsonl and problems.jsonl: each arm's accuracy is 0.6, plus its gain, plus 1 point of noise over seeds.

    The noise has mean 0 in each arm, so that arms with equal gains do not differ by chance either.
    """
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 1, size)
    for arm, gain in gains.items():
        noise = rng.normal(0, 0.01, seeds)
        for seed, deviation in enumerate(noise - noise.mean(), start=1):
            right = difficulty + rng.normal(0, 0.1, size) < 0.6 + gain + deviation
            run = {"arm": arm, "seed": seed}
            figures = {
                "accuracy_heldout": right.mean(),
                "ce_heldout": 0.1 + rng.normal(0, 0.01),
                "train_seconds": 9.0,
                "grad_norm": 0.5,
                "rank_head": 4.0,
            }
            row = {**run, "status": "done", **figures, "curve_ce": [[1, 2.0], [2, 1.0]]}
            append_row(folder / RUNS, row)
            correct = "".join(map(str, right.astype(int)))
            append_row(folder / PROBLEMS, {**run, "set": "heldout", "correct": correct})
