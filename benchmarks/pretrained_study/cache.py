"""What the frozen layers make of every row, and the base's CE on it, computed once and read by all runs.

    OUT/cache/pool-000.npy    (tokens, H) float32: the states of 128 rows, one after another, read through a memory map
    OUT/cache/pool-000.json   the rows' ids and labels, and the base's summed CE of each

A block is moved into place when it is complete, so `prepare` continues where it was stopped. The whole model
(trained_layers 0) has no frozen part, and then no .npy files.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.pretrained_study.rows import Tokens
from benchmarks.pretrained_study.split import Split
from matrix_llm.base.files import atomic_path, write_text
from matrix_llm.base.modes import evaluation_mode

BLOCK, BATCH = 128, 8  # rows


def prepare(split: Split, name: str, rows: Sequence[Tokens], folder: Path) -> Iterator[int]:
    """Write the blocks of one set that are missing; yields how many rows are done."""
    for number, start in enumerate(range(0, len(rows), BLOCK)):
        block = rows[start : start + BLOCK]
        stem = folder / f"{name}-{number:03}"
        if not stem.with_suffix(".json").is_file():
            states, losses = _states_and_losses(split, block)
            if not split.is_whole:
                with atomic_path(stem.with_suffix(".npy")) as path, path.open("wb") as file:
                    np.save(file, torch.cat(states).cpu().numpy())
            found = {"ids": [r.ids for r in block], "labels": [r.labels for r in block], "base_ce": losses}
            write_text(stem.with_suffix(".json"), json.dumps(found))  # last: it marks the block as complete
        yield min(start + BLOCK, len(rows))


def _states_and_losses(split: Split, rows: Sequence[Tokens]) -> tuple[list[Tensor], list[float]]:
    """Of each row the states (T_i, H) and the base's summed CE; padding is kept small by going from short to long."""
    states: dict[int, Tensor] = {}
    losses: dict[int, float] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    with evaluation_mode(split.full), torch.no_grad():
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            chosen = [rows[i] for i in places]
            lower = None if split.is_whole else split.lower(chosen)
            inputs = split.inputs(chosen, lower)
            hidden = split.upper.base_model(**inputs.arguments, use_cache=False).last_hidden_state[:, :-1]
            target = inputs.labels[:, 1:]
            for n, place in enumerate(places):
                kept = target[n] != -100
                logits = split.upper.get_output_embeddings()(hidden[n][kept]).float()
                losses[place] = torch.nn.functional.cross_entropy(logits, target[n][kept], reduction="sum").item()
                if lower is not None:
                    states[place] = lower[n]
    return [states[i] for i in sorted(states)], [losses[i] for i in range(len(rows))]


@dataclass(frozen=True)
class CachedSet:
    """One set of rows, as `prepare` left it."""

    rows: list[Tokens]
    base_ce: list[float]
    """The base's CE of each row, summed over its trained positions."""
    maps: list[np.ndarray]
    """One memory map for each block; empty for the whole model."""
    starts: list[int]
    """Where in its block each row's states start."""

    @classmethod
    def open(cls, folder: Path, name: str) -> "CachedSet":
        rows: list[Tokens] = []
        base_ce: list[float] = []
        maps: list[np.ndarray] = []
        starts: list[int] = []
        for path in sorted(folder.glob(f"{name}-[0-9]*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            block = [Tokens(*row) for row in zip(found["ids"], found["labels"], strict=True)]
            lengths = [len(row.ids) for row in block]
            starts += np.cumsum([0, *lengths[:-1]]).tolist()
            rows += block
            base_ce += found["base_ce"]
            if path.with_suffix(".npy").is_file():
                maps.append(np.load(path.with_suffix(".npy"), mmap_mode="r"))
        return cls(rows, base_ce, maps, starts)

    def states(self, places: Sequence[int]) -> list[Tensor] | None:
        """(T_i, H) of each of these rows; None for the whole model."""
        if not self.maps:
            return None
        found = []
        for place in places:
            start = self.starts[place]
            block = self.maps[place // BLOCK]
            found.append(torch.from_numpy(np.array(block[start : start + len(self.rows[place].ids)])))
        return found
