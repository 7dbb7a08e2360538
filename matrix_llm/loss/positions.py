"""Which positions have a label, and whether every label is a token.

Legend: N positions, n the labelled ones among them, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matrix_llm.base.errors import DataError


def check_integers(labels: Tensor) -> None:
    """Raise TypeError for labels that are not integers."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels are {labels.dtype}, but token ids are integers.")


def label_error(label: int, position: int, vocabulary_size: int) -> DataError:
    """The error to raise for a label that is not a token."""
    return DataError(
        f"label {label} at position {position} is outside the vocabulary of {vocabulary_size}. The tokenizer may have "
        "more tokens than the model has vectors: resize the embeddings, or mask the position with ignore_index."
    )


class TrainedPositions:
    """The trained positions: those whose label is not `ignore_index`.

    On a GPU the counts are copied to the host asynchronously: create this before the backbone's forward, call `index()`
    after it, and the host never waits for the device.

    >>> TrainedPositions(torch.tensor([-100, 4, 1]), vocabulary=5).index()
    tensor([1, 2])
    """

    def __init__(
        self,
        labels: Tensor,  # (N,)
        vocabulary: int,  # V
        ignore_index: int = -100,
    ) -> None:
        if labels.ndim != 1:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, but must be (N,): one label per position.")
        check_integers(labels)
        labels = labels.long()  # before any comparison: in uint8, -100 is 156
        labelled = labels != ignore_index
        self.labels, self.vocabulary = labels, vocabulary
        self._wrong = labelled & ((labels < 0) | (labels >= vocabulary))
        self._order = torch.argsort(~labelled, stable=True)  # the labelled positions first, in order
        counts = torch.stack([labelled.sum(), self._wrong.sum()])
        self._copied = None
        if labels.is_cuda:
            self._counts = torch.empty(2, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._counts = counts

    def index(self) -> Tensor:
        """The labelled positions in order, (n,) int64.

        Raises:
            DataError: a label outside the vocabulary.
        """
        if self._copied is not None:
            self._copied.synchronize()
        labelled, wrong = self._counts.tolist()
        if wrong:
            position = int(torch.nonzero(self._wrong)[0])
            raise label_error(int(self.labels[position]), position, self.vocabulary)
        return self._order[:labelled]
