"""Images in local files: a folder, an .npz, or CIFAR's binary version."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from matrix_llm.base.errors import ImageDataError
from matrix_llm.ssl.images.builtin import check_split, read_array
from matrix_llm.ssl.images.dataset import Images, check_labels, number_ids
from matrix_llm.ssl.images.decode import decode_image

__all__ = ["load_cifar", "load_folder", "load_npz"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")

# --- a folder of image files ------------------------------------------------------------------------------------------


def load_folder(root: Path, split: str) -> Images:
    """The images of a folder: one sub-folder for each class, or all in one place and without labels; `split` may be a
    folder inside.
    """
    # 1. The split
    folders = [entry.name for entry in _visible(root) if entry.is_dir()]
    splits = [name for name in folders if name in SPLITS]
    if splits and split not in folders:
        raise ImageDataError(
            f"{root} has the splits {', '.join(splits)}, but no {split!r}. Name one of them, or give the folder inside."
        )
    base = root / split if split in folders else root
    # 2. The files
    paths = list(_files_below(base, ""))
    if not paths:
        raise ImageDataError(f"{base} holds no image ({', '.join(SUFFIXES)}). Give another folder.")
    flat, nested = ([path for path in paths if ("/" in path) == inside] for inside in (False, True))
    if flat and nested:
        raise ImageDataError(
            f"{base} has images both inside and outside class folders ({nested[0]}, {flat[0]}). "
            "Move them all in, or all out."
        )
    if flat:
        return Images(str(base), paths, partial(_read_file, base, paths))
    # 3. The labels. A class that is missing here must not shift the labels of the others, so they count the folders
    # of the training split, if there is one.
    trained = []
    if base != root and "train" in folders:
        trained = [entry.name for entry in _visible(root / "train") if entry.is_dir()]
    classes = [path.split("/", 1)[0] for path in paths]
    names = list(dict.fromkeys([*trained, *classes]))
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[name] for name in classes])
    return Images(str(base), paths, partial(_read_file, base, paths), labels, names)


def _read_file(root: Path, paths: list[str], i: int) -> Image.Image:
    return decode_image(root / paths[i])


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder in order of name, without hidden ones."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda e: e.name)
    yield from (entry for entry in ordered if not entry.name.startswith((".", "__MACOSX")))


def _files_below(folder: Path, prefix: str, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Relative paths of the image files, in order of name; links are followed, but not in circles."""
    seen |= {folder.resolve()}
    for entry in _visible(folder):
        if entry.is_dir():
            if Path(entry.path).resolve() not in seen:
                yield from _files_below(Path(entry.path), f"{prefix}{entry.name}/", seen)
        elif entry.name.lower().endswith(SUFFIXES):
            yield prefix + entry.name


# --- arrays -----------------------------------------------------------------------------------------------------------


def load_npz(path: Path, split: str) -> Images:
    """An .npz with images (N, H, W) or (N, H, W, 3) uint8 and maybe labels, under the names of Keras or MedMNIST or
    without a split.
    """
    # 1. Find the arrays.
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive)
            pairs = [(f"x_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels")]  # Keras, MedMNIST
            pairs += [(x, y) for x in ("images", "x", "data") for y in ("labels", "y")]
            pairs += [(x, "") for x, _ in pairs]
            x, y = next(((x, y) for x, y in pairs if x in keys and y in ("", *keys)), ("", ""))
            if not x:
                raise ImageDataError(
                    f"{path} has {', '.join(keys) or 'no arrays'}, but neither x_{split} nor images. Rename them."
                )
            pixels, labels = archive[x], archive[y] if y else None
    except ImageDataError:
        raise
    except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise ImageDataError(
            f"{path} is not a readable .npz of plain arrays ({type(error).__name__}: {error})."
        ) from None
    # 2. Check them.
    pixels = pixels[..., 0] if pixels.ndim == 4 and pixels.shape[3] == 1 else pixels
    is_grey, is_colour = pixels.ndim == 3, pixels.ndim == 4 and pixels.shape[3] in (3, 4)
    if pixels.dtype != np.uint8 or not (is_grey or is_colour) or pixels.size == 0:
        raise ImageDataError(
            f"{path}: {x} is {pixels.shape} {pixels.dtype}, but images are (N, H, W) or (N, H, W, 3) uint8, 0 to 255."
        )
    checked = None if labels is None else check_labels(labels, f"{path}: {y}")
    if checked is not None and len(checked) != len(pixels):
        raise ImageDataError(f"{path}: {x} has {len(pixels)} images, but {y} has {len(checked)} labels.")
    return Images(str(path), number_ids(len(pixels)), partial(read_array, pixels), checked)


def load_cifar(folder: Path, split: str) -> Images | None:
    """CIFAR's binary version, or None where the folder does not hold it.

    A row is one label (CIFAR-10), or a coarse and a fine label (CIFAR-100), followed by 3 x 32 x 32 bytes.
    """
    # 1. The files of the split
    train = sorted(folder.glob("data_batch_*.bin")) or [p for p in [folder / "train.bin"] if p.is_file()]
    if not train:
        return None
    check_split(split, str(folder))
    files = train if split == "train" else [folder / ("test.bin" if train[0].name == "train.bin" else "test_batch.bin")]
    # 2. The width of a row. Either version may be called train.bin.
    width = 3074 if train[0].name == "train.bin" and train[0].stat().st_size % 3073 else 3073
    for file in files:
        size = file.stat().st_size if file.is_file() else 0
        if size == 0 or size % width:
            raise ImageDataError(
                f"{file} has {size:,} bytes, which is not a whole number of rows of {width}. Download it again."
            )
    # 3. Labels and pixels
    rows = np.concatenate([np.fromfile(file, dtype=np.uint8).reshape(-1, width) for file in files])
    pixels = np.ascontiguousarray(rows[:, width - 3072 :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    labels = check_labels(rows[:, width - 3073])
    meta = folder / ("batches.meta.txt" if width == 3073 else "fine_label_names.txt")
    class_names = meta.read_text(encoding="utf-8").split() if meta.is_file() else None
    return Images(str(folder), number_ids(len(rows)), partial(read_array, pixels), labels, class_names)
