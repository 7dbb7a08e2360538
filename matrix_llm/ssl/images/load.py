"""`load_images`: from the name of a source to its images.

load_images("data/birds", split="train")  ->  Images: ids ["owl/1.png", ...], labels (N,), class_names ["owl", ...],
read(0) -> PIL
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from matrix_llm.base.errors import ImageDataError
from matrix_llm.ssl.images.builtin import load_digits, load_synthetic
from matrix_llm.ssl.images.dataset import Images
from matrix_llm.ssl.images.files import load_cifar, load_folder, load_npz
from matrix_llm.ssl.images.hub import load_hub

__all__ = ["load_images"]


def load_images(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_rows: int | None = None,
) -> Images:
    """The images of a source.

    Args:
        source: one of
            "digits";
            "synthetic" (coloured shapes, 10 classes);
            a folder, with or without a sub-folder `split`, with one sub-folder for each class or all images in one
            place (no labels); an .npz with images (N, H, W[, 3]) uint8 and maybe labels, or with x_train, y_train,
            x_test, y_test; a folder with the binary version of CIFAR;
            a folder of Parquet files;
            a Hub id.
        split: the part to read.
        config, image_column, label_column: of a Hub data set; found if not given.
        max_rows: at most this many, at least 1, drawn at random with a fixed seed, because files are often sorted by
            class.

    Raises:
        ImageDataError: no such source or split, no images in it, or a layout from which the classes cannot be told.

    >>> images = load_images("digits", split="test")
    >>> len(images), images.read(0).size, images.class_names[int(images.labels[0])]
    (500, (8, 8), '0')
    """
    if max_rows is not None and max_rows < 1:
        raise ImageDataError(f"max_rows={max_rows} leaves no images. Give a positive number, or leave it out for all.")
    path = Path(source).expanduser()
    if source == "digits":
        images = load_digits(split)
    elif source == "synthetic":
        images = load_synthetic(split)
    elif path.is_file():
        if path.suffix != ".npz":
            raise ImageDataError(
                f"{path} is a file, but only an .npz is read. Give a folder of images, an .npz or a Hub id."
            )
        images = load_npz(path, split)
    elif path.is_dir():
        has_parquet = any(next(folder.glob("*.parquet"), None) for folder in (path, path / "data", path / split))
        images = load_cifar(path, split) or (
            load_hub(str(path), config, split, image_column, label_column) if has_parquet else load_folder(path, split)
        )
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ImageDataError(f"{path} does not exist. Give a folder of images, an .npz, a Hub id, digits or synthetic.")
    else:
        images = load_hub(source, config, split, image_column, label_column)
    if len(images) == 0:
        raise ImageDataError(f"{source!r}, split {split!r}, holds no images.")
    if max_rows is not None and max_rows < len(images):
        images = images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:max_rows]))
    return images
