"""Held-out figures: which rows of a batch count, and means by weight.

Legend: B batch, T sequence, R rows that were put into the batch (B, or several flattened into one sequence).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset


class CountedStream(IterableDataset):
    """A stream that tells its data loader, once it has ended, how many rows of the last batch were not seen before.

    accelerate knows that of data with a length alone. Counted in this process: not with dataloader_num_workers.
    """

    def __init__(self, stream: Any, loader: Any, rows_at_once: int) -> None:
        self.stream, self.loader, self.rows_at_once = stream, loader, rows_at_once

    def __iter__(self) -> Iterator[Any]:
        rows = 0
        for row in self.stream:
            rows += 1
            yield row
        self.loader.remainder = rows % self.rows_at_once

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)


def count_stream(loader: DataLoader) -> DataLoader:
    """Count the rows of a stream that is split over processes; any other loader stays as it is."""
    shard = getattr(loader, "dataset", None)  # of a caller's own loader, perhaps without one
    if isinstance(shard, IterableDatasetShard) and not isinstance(shard.dataset, CountedStream):
        rows_at_once = shard.batch_size * (1 if shard.split_batches else shard.num_processes)
        shard.dataset = CountedStream(shard.dataset, loader, rows_at_once)
    return loader


def mask_repeated_rows(inputs: dict[str, Any], accelerator: Accelerator) -> None:
    """Take the labels from rows that only complete the last batch of several processes.

    So that every process has a batch of the same size, the last one is completed with rows that were evaluated before.
    Without labels such a row has no loss, and no weight in any mean.

    Args:
        inputs: `labels` (B, T); `row_lengths` (R,) where the rows are flattened into one sequence.
    """
    lengths, labels = inputs.pop("row_lengths", None), inputs.get("labels")
    if labels is None:
        return
    rows = len(labels) if lengths is None else len(lengths)
    real = count_real_rows(accelerator, rows)
    if real == rows:
        return
    labels = labels.clone()
    if lengths is None:
        labels[real:] = -100
    else:
        labels[:, int(lengths[:real].sum()) :] = -100
    inputs["labels"] = labels


def count_real_rows(accelerator: Accelerator, rows: int) -> int:
    """How many of the `rows` rows in this process's batch were not evaluated before.

    In the last batch, over all processes in the order of their ranks, those come first; accelerate knows how many.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The mean of `values` by `weights`, or by equal ones; 0 where no weight is above 0.

    >>> weighted_mean([1.0, 4.0], [3, 1])
    1.75
    """
    weights = [1.0] * len(values) if weights is None else weights
    return sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1.0)
