"""`Images`, a source of images with ids and optional labels, read one at a time; and what a training loader needs.

Every image comes out 8-bit grey ("L") or "RGB". One that cannot be read is named, and replaced in training by its
neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from matrix_llm.base.errors import ImageDataError
from matrix_llm.ssl.images.decode import convert_to_eight_bit

__all__ = ["EpochSampler", "Images", "TrainImages", "check_labels", "number_ids"]

GIVE_UP = 16  # unreadable images in a row


class Images(Dataset):
    """Images with ids, and with labels if the source has them. `images[i]` is (read(i), its label or -1).

    Args:
        name: of the source, for messages.
        ids: a relative file path or "row 17" for each image.
        reader: from an image's number in the source to the image.
        labels: (N,) int64, or None.
        class_names: what the labels count.
        rows: (N,) the images' numbers in the source; None is 0, 1, 2, ...
    """

    def __init__(
        self,
        name: str,
        ids: list[str],
        reader: Callable[[int], Image.Image],
        labels: Tensor | None = None,
        class_names: list[str] | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.name, self.ids, self.labels, self.class_names = name, ids, labels, class_names
        self._reader, self._rows = reader, np.arange(len(ids)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i), -1 if self.labels is None else int(self.labels[i])

    def read(self, i: int) -> Image.Image:
        """Image i, "L" or "RGB".

        Raises:
            ImageDataError: it is not an image, is cut short, is too large, or has no 8-bit form; names the source and
                the file.
        """
        try:
            return convert_to_eight_bit(self._reader(int(self._rows[i])))
        except (
            Exception
        ) as error:  # on damaged files, decoders raise OSError, SyntaxError, struct.error, IndexError, ...
            what = str(error) if isinstance(error, ImageDataError) else f"{type(error).__name__}: {error}"
            raise ImageDataError(f"{self.ids[i]} of {self.name} cannot be read ({what}).") from error

    def subset(self, indices: Sequence[int] | Tensor | np.ndarray) -> Images:
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[torch.from_numpy(chosen)]
        return Images(
            self.name, [self.ids[i] for i in chosen], self._reader, labels, self.class_names, self._rows[chosen]
        )


def number_ids(count: int) -> list[str]:
    """Ids for images that have no file name: ["row 0", "row 1", ...]."""
    return [f"row {i}" for i in range(count)]


def check_labels(values: Any, where: str = "labels") -> Tensor:
    """(N,) int64 labels from an array of shape (N,) or (N, 1).

    Raises:
        ImageDataError: another shape, or labels that are not whole numbers.
    """
    array = np.asarray(values)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ImageDataError(f"{where}: labels are {array.shape} {array.dtype}, but each image needs one whole number.")
    return torch.from_numpy(array.astype(np.int64))


class TrainImages(Dataset):
    """(epoch, index) -> (epoch, index, image, None), for `TwoViewCollator`.

    If image 3 cannot be read, the next readable one replaces it, with its own index and label, and the reason is
    returned: (0, 3) -> (0, 4, image 4, "owl/3.png of data/birds cannot be read (...).")
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, Image.Image, str | None]:
        epoch, index = key
        skipped: list[str] = []
        for step in range(min(GIVE_UP, len(self))):
            other = (index + step) % len(self)
            try:
                return epoch, other, self.images.read(other), "; ".join(skipped) or None
            except ImageDataError as error:
                skipped.append(str(error))
        raise ImageDataError(
            f"{len(skipped)} images in a row cannot be read. The first: {skipped[0]} Repair the data, or the path to "
            "it."
        )


class EpochSampler(Sampler):
    """(epoch, index) for every index, in an order that depends on (seed, epoch) alone.

    >>> sampler = EpochSampler(4, seed=0)
    >>> sampler.set_epoch(2)
    >>> sorted(sampler)
    [(2, 0), (2, 1), (2, 2), (2, 3)]
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return ((self.epoch, index) for index in order.tolist())
