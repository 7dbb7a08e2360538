"""Figures of one run: what its own logs say, how well its confidence is calibrated, how much its samples differ.

Means over runs and tests between arms are in statistics.py.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matrix_llm.base.files import read_jsonl
from matrix_llm.run.run_folder import METRICS

BINS = 15


def training_figures(folder: Path) -> dict[str, Any]:
    """Seconds, memory, gradient norm and curves of a finished run, from its results.json and metrics.jsonl."""
    results, entries = json.loads((folder / "results.json").read_text(encoding="utf-8")), read_jsonl(folder / METRICS)

    def curve(key: str, digits: int) -> list[list[float]]:
        return [[entry["step"], round(entry[key], digits)] for entry in entries if key in entry]

    norms = [entry["grad_norm"] for entry in entries if "grad_norm" in entry]
    memory = [entry["peak_memory_gib"] for entry in entries if "peak_memory_gib" in entry]
    figures = {
        "grad_norm": round(sum(norms) / len(norms), 4) if norms else None,
        # A resumed run reports the seconds after its last start alone, so it has none to compare.
        "train_seconds": None if results.get("resumed_from") else results.get("train_seconds"),
        "steps": results.get("steps"),
        "versions": results.get("versions"),
        "peak_memory_gib": round(max(memory), 3) if memory else None,
        "curve_ce": curve("ce", 4),
        "curve_rank_head": curve("effective_rank", 3),
    }
    if "eval_ce" in (evaluation := results.get("evaluation", {})):
        figures["ce_recipe"] = round(evaluation["eval_ce"], 6)
    return figures


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[bool], bins: int = BINS) -> float:
    """ECE = sum_b n_b / n |accuracy_b - confidence_b| over equal-width bins ((b - 1) / bins, b / bins].

    Guo et al. 2017, eq. 3. NaN without predictions.

    >>> expected_calibration_error([0.75, 0.75, 0.75, 0.75], [True, True, True, False])
    0.0
    """
    if len(confidences) != len(correct):
        raise ValueError(
            f"{len(confidences)} confidences and {len(correct)} verdicts: each prediction needs one of both."
        )
    if not len(correct):
        return math.nan
    c, right = np.asarray(confidences, dtype=float), np.asarray(correct, dtype=float)
    place = np.clip(np.ceil(c * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - c, minlength=bins)  # n_b (accuracy_b - confidence_b)
    return float(np.abs(gaps).sum() / len(c))


def distinct_n(responses: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all those of one problem's responses; NaN if all are too short.

    >>> distinct_n(["a b c", "a b d"], 2)
    0.75
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, responses) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def distinct_answers(answers: Sequence[str | None]) -> float:
    """Number of different final answers over the number of samples of one problem; "no answer" counts as an answer.

    >>> distinct_answers(["7", "7", None, "8"])
    0.75
    """
    return len(set(answers)) / len(answers)


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; 0 if all are."""
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else 0.0
