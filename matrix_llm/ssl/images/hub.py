"""Images of a Hub data set, or of a folder of Parquet files, through `datasets`."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from matrix_llm.base.errors import ImageDataError
from matrix_llm.ssl.images.dataset import Images, check_labels, number_ids
from matrix_llm.ssl.images.decode import decode_image

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_hub"]


def load_hub(source: str, config: str | None, split: str, image_column: str | None, label_column: str | None) -> Images:
    """The images of a data set. Columns that are None are found by type and name."""
    import datasets

    try:
        rows = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # offline, gated, no such split or configuration: the Hub client has a class for each
        raise ImageDataError(
            f"{source!r}, split {split!r}, is neither a local path nor readable from the Hub: {type(error).__name__}: "
            f"{error} "
            "Check the name and the connection, or give a local folder."
        ) from None
    column = _find_image_column(rows, source, image_column)
    labels, class_names = _find_labels(rows, source, label_column)
    # The files stay encoded: an image is decoded when it is read, under this package's limits.
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Images(source, number_ids(len(rows)), partial(_read_row, rows, column), labels, class_names)


def _find_image_column(rows: Dataset, source: str, asked: str | None) -> str:
    import datasets

    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    column = asked or ("image" if "image" in images else next(iter(images), None))
    if column is None or column not in images:
        what = f"image_column={column!r}, but" if asked else "no column of images:"
        has = ", ".join(rows.column_names)
        raise ImageDataError(f"{source!r}: {what} the columns are {has}. Give as image_column one of the type Image.")
    return column


def _find_labels(rows: Dataset, source: str, asked: str | None) -> tuple[Tensor | None, list[str] | None]:
    """The labels and the names of the classes, or None for both. A column of type ClassLabel is tried first, then a
    usual name.
    """
    import datasets

    features = rows.features
    if asked and asked not in features:
        raise ImageDataError(
            f"{source!r} has no label column {asked!r}; its columns are {', '.join(rows.column_names)}."
        )
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    likely = [name for name in ("label", "labels", "fine_label", "class") if name in features]
    chosen = asked or next((name for name in likely if name in classes), None) or next(iter([*classes, *likely]), None)
    if not chosen:
        return None, None
    values: Any = rows.select_columns([chosen]).with_format("numpy")[:][chosen]
    class_names = None
    if isinstance(features[chosen], datasets.ClassLabel):
        class_names = list(features[chosen].names)
    elif np.asarray(values).dtype.kind in "UO" and all(isinstance(v, str) for v in values):
        class_names = sorted(set(values))
        values = np.searchsorted(class_names, values)
    labels = check_labels(values, f"{source!r}, column {chosen!r}")
    is_secret = len(labels) and bool((labels == -1).all())  # how the Hub marks labels that are not published
    return None if is_secret else labels, class_names


def _read_row(rows: Any, column: str, i: int) -> Image.Image:
    """The image of a row, which `datasets` keeps as its file: {"bytes": ..., "path": ...}."""
    value = rows[i][column]
    if not isinstance(value, dict) or (value.get("bytes") is None and value.get("path") is None):
        raise ImageDataError(f"the column {column!r} holds {type(value).__name__}, not an image")
    return decode_image(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])
