"""The images of an evaluation: whether both parts' labels mean the same, and which training labels to use."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from matrix_llm.base.errors import ImageDataError, ProbeError
from matrix_llm.ssl.evaluation.features import check_classes
from matrix_llm.ssl.evaluation.label_draws import class_balanced_split
from matrix_llm.ssl.evaluation.passes import labels_of
from matrix_llm.ssl.images.dataset import Images

__all__ = ["aligned", "choose_split", "read_split"]


def aligned(train: Images, test: Images) -> tuple[Images, Images, int]:
    """Both parts with labels that mean the same, and the number of classes. The arguments are not changed.

    Raises:
        ProbeError: no labels, classes that cannot be learned, or a test part that is the training part.
    """
    labels_of(train)
    test_labels = labels_of(test)
    # 1. One numbering. A folder's classes are counted where they are: the same class may be 2 here and 3 there.
    if train.class_names and test.class_names and train.class_names != test.class_names:
        present = [test.class_names[k] for k in test_labels.unique().tolist()]
        if unknown := [name for name in present if name not in train.class_names]:
            raise ProbeError(
                f"the test images have classes that {train.name} lacks: {', '.join(unknown[:5])}. Use one naming in "
                "both."
            )
        number = torch.tensor([train.class_names.index(n) if n in train.class_names else -1 for n in test.class_names])
        test = copy.copy(test)
        test.labels, test.class_names = number[test_labels], train.class_names
    # 2. Classes that can be learned
    classes = check_classes(labels_of(train), labels_of(test), train.class_names)
    # 3. Two different parts: equal ids and eight equal images are the same part.
    places = np.linspace(0, len(train) - 1, 8).astype(int).tolist()
    if train.ids == test.ids and all(_is_same(train, test, i) for i in places):
        raise ProbeError(
            f"the training and the test images ({train.name}) are the same. "
            "Give --test_data, or a folder with train/ and test/ inside."
        )
    return train, test, classes


def _is_same(a: Images, b: Images, i: int) -> bool:
    try:
        return a.read(i).tobytes() == b.read(i).tobytes()
    except ImageDataError:
        return True  # an unreadable image cannot tell the parts apart


def choose_split(train: Images, test: Images, *, percent: float | None, file: str | None, seed: int) -> Tensor:
    """Indices of the training images whose labels are used: those in the file, or the same number from each class by
    (seed, percent).

    Raises:
        ProbeError: see `read_split` and `class_balanced_split`; a class without an image; a file of another size than
            percent.
    """
    if file is None:
        assert percent is not None
        return class_balanced_split(labels_of(train), percent, seed)
    places = read_split(Path(file), train)
    check_classes(labels_of(train)[places], labels_of(test), train.class_names)
    share = 100 * len(places) / len(train)
    if percent is not None and abs(share - percent) > percent / 2:
        raise ProbeError(
            f"--percent {percent:g}, but {file} names {share:.3g} % of the training images. Leave --percent out."
        )
    return places


def read_split(path: Path, images: Images) -> Tensor:
    """Sorted indices of the images that a file names, one per line, by id or by file name alone (as in SimCLR's
    1percent.txt).

    Raises:
        ProbeError: the file cannot be read, names an image twice, or names one that is missing or not unique.
    """
    # 1. The names in the file
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(
            f"--split {path} cannot be read as text ({type(error).__name__}). Give another file."
        ) from None
    # 2. Where each name is; -1 marks a file name that several images share.
    by_name: dict[str, int] = {}
    for i, name in enumerate(images.ids):
        base = name.rsplit("/", 1)[-1]
        by_name[base] = -1 if base in by_name else i
    by_name |= {name: i for i, name in enumerate(images.ids)}
    # 3. The places
    absent = [name for name in names if by_name.get(name, -1) < 0]
    if absent or not names:
        what = "the file is empty"
        if absent:
            what = (
                f"{len(absent)} of its {len(names)} names are of no image, or of several, in {images.name}, "
                f"e.g. {absent[0]}"
            )
        raise ProbeError(
            f"--split {path}: {what}. Each line is an image's path below the split's folder, or its file name."
        )
    places = sorted(by_name[name] for name in names)
    if twice := [images.ids[a] for a, b in itertools.pairwise(places) if a == b]:
        raise ProbeError(f"--split {path} names {twice[0]} twice. Remove one.")
    return torch.tensor(places)
