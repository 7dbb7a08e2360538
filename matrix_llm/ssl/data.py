"""Where images come from: folders, Hub data sets, .npz and CIFAR files, scikit-learn's digits, and shapes drawn on the spot.

    load_images("data/birds", split="train")  ->  Images: ids ["owl/1.png", ...], labels (N,), class_names ["owl", ...], read(0) -> PIL

Every source is read one image at a time, and every image comes out 8-bit grey ("L") or "RGB". A file that cannot be read is named,
and replaced in training by its neighbour; no decoder runs on what is not one of `FORMATS` or has more than `MAX_PIXELS`.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from matrix_llm.base.errors import ImageDataError

__all__ = ["EpochSampler", "ImageDataError", "Images", "TrainImages", "load_images"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # not EPS, which starts Ghostscript, whatever the file is called
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; where Pillow starts to warn of decompression bombs
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
GIVE_UP, ORIENTATION = 16, 0x0112  # unreadable images in a row; EXIF's tag


class Images(Dataset):
    """Images with ids, and with labels where the source has them. `images[i]` is (read(i), its label or -1).

    Args:
        name: of the source, for messages; ids: a relative file path or "row 17", one an image.
        reader: from an image's number in the source to the image; rows: (N,) those numbers, or None for 0, 1, 2, ...
        labels: (N,) int64 or None; class_names: what they count.
    """

    def __init__(
        self, name: str, ids: list[str], reader: Callable[[int], Image.Image], labels: Tensor | None = None,
        class_names: list[str] | None = None, rows: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.name, self.ids, self.labels, self.class_names = name, ids, labels, class_names
        self._reader, self._rows = reader, np.arange(len(ids)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i), -1 if self.labels is None else int(self.labels[i])

    def read(self, i: int) -> Image.Image:
        """Image i, "L" or "RGB".

        Raises:
            ImageDataError: no image, cut short, too large, or of a kind with no 8-bit form; names the source and the file.
        """
        try:
            return _eight_bit(self._reader(int(self._rows[i])))
        except (
            Exception
        ) as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, ... on damaged files
            what = str(error) if isinstance(error, ImageDataError) else f"{type(error).__name__}: {error}"
            raise ImageDataError(f"{self.ids[i]} of {self.name} cannot be read ({what}).") from error

    def subset(self, indices: Sequence[int] | Tensor | np.ndarray) -> Images:
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[torch.from_numpy(chosen)]
        return Images(
            self.name, [self.ids[i] for i in chosen], self._reader, labels, self.class_names, self._rows[chosen]
        )


# ----------------------------------------------------------------------------------------------------------- reading one image


def _decode(file: str | Path | io.BytesIO) -> Image.Image:
    """The first frame, upright (a camera notes in EXIF how it was held), with every byte read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageDataError(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; make it smaller"
                )
            image.load()
            return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageDataError(f"too large: {error}") from None


def _eight_bit(image: Image.Image) -> Image.Image:
    """To "L" or "RGB": transparent parts on white, 16 bits to 8. A plain conversion keeps hidden colours and clips the 16 bits."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "F":
        raise ImageDataError("floating-point pixels have no fixed range; save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageDataError(f"pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits a channel")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("L" if image.mode == "1" else "RGB")


def _read_file(root: Path, paths: list[str], i: int) -> Image.Image:
    return _decode(root / paths[i])


def _read_row(rows: Any, column: str, i: int) -> Image.Image:
    """A row of `datasets`, whose image is kept as its file: {"bytes": ..., "path": ...}."""
    value = rows[i][column]
    if not isinstance(value, dict) or (value.get("bytes") is None and value.get("path") is None):
        raise ImageDataError(f"the column {column!r} holds {type(value).__name__}, no image")
    return _decode(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])


# -------------------------------------------------------------------------------------------------------------------- sources


def _read_array(pixels: np.ndarray, i: int) -> Image.Image:
    return Image.fromarray(pixels[i])


def _numbered(count: int) -> list[str]:
    return [f"row {i}" for i in range(count)]


def _check_split(split: str, source: str) -> None:
    if split not in ("train", "test"):
        raise ImageDataError(f"{source!r} has the splits train and test, not {split!r}. Give one of these.")


def _digits(split: str) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8 x 8: 1,297 to train on and 500 to test, the classes in equal shares."""
    _check_split(split, "digits")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImageDataError(
            "digits come with scikit-learn, which is not installed: pip install 'matrix-llm[ssl]'."
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    rows = np.sort(parts[0] if split == "train" else parts[1])
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return Images(
        "digits", _numbered(len(labels)), partial(_read_array, images), _as_labels(labels), list("0123456789")
    ).subset(rows)


SHAPES: dict[str, list[tuple[float, float]]] = {  # corners, in a square from -1 to 1
    "disc": [(math.cos(k * math.pi / 16), math.sin(k * math.pi / 16)) for k in range(32)],
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "arrow": [(-1, -0.4), (0, -0.4), (0, -1), (1, 0), (0, 1), (0, 0.4), (-1, 0.4)],
    "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
}
SYNTHETIC = {"train": 5000, "test": 1000}


def _draw_shape(split: str, side: int, i: int) -> Image.Image:
    """One of five shapes, filled or as an outline, with colours, a place and a size of its own."""
    rng = np.random.default_rng([tuple(SYNTHETIC).index(split), i])
    outlined, shape = divmod(i % 10, len(SHAPES))
    back, front = (tuple(rng.integers(*limits, 3).tolist()) for limits in ((0, 96), (128, 256)))
    radius = side * rng.uniform(0.2, 0.32)
    x, y = rng.uniform(radius + 1, side - radius - 1, 2)
    corners = [(x + radius * dx, y + radius * dy) for dx, dy in list(SHAPES.values())[shape]]
    image = Image.new("RGB", (side, side), back)
    ImageDraw.Draw(image).polygon(corners, fill=None if outlined else front, outline=front, width=max(side // 24, 1))
    return image


def _synthetic(split: str, side: int = 64) -> Images:
    _check_split(split, "synthetic")
    ids, names = _numbered(SYNTHETIC[split]), [f"{how} {shape}" for how in ("filled", "outlined") for shape in SHAPES]
    return Images("synthetic", ids, partial(_draw_shape, split, side), torch.arange(len(ids)) % 10, names)


def _as_labels(values: Any, where: str = "labels") -> Tensor:
    array = np.asarray(values)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ImageDataError(f"{where}: labels are {array.shape} {array.dtype}, but each image needs one whole number.")
    return torch.from_numpy(array.astype(np.int64))


def _npz(path: Path, split: str) -> Images:
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
    pixels = pixels[..., 0] if pixels.ndim == 4 and pixels.shape[3] == 1 else pixels
    if (
        pixels.dtype != np.uint8
        or pixels.ndim not in (3, 4)
        or (pixels.ndim == 4 and pixels.shape[3] not in (3, 4))
        or pixels.size == 0
    ):
        raise ImageDataError(
            f"{path}: {x} is {pixels.shape} {pixels.dtype}, but images are (N, H, W) or (N, H, W, 3) uint8, 0 to 255."
        )
    checked = None if labels is None else _as_labels(labels, f"{path}: {y}")
    if checked is not None and len(checked) != len(pixels):
        raise ImageDataError(f"{path}: {x} has {len(pixels)} images, but {y} has {len(checked)} labels.")
    return Images(str(path), _numbered(len(pixels)), partial(_read_array, pixels), checked)


def _cifar(folder: Path, split: str) -> Images | None:
    """The binary version: rows of one label (CIFAR-10) or a coarse and a fine label (CIFAR-100), then 3 x 32 x 32 bytes."""
    train = sorted(folder.glob("data_batch_*.bin")) or [p for p in [folder / "train.bin"] if p.is_file()]
    if not train:
        return None
    _check_split(split, str(folder))
    files = train if split == "train" else [folder / ("test.bin" if train[0].name == "train.bin" else "test_batch.bin")]
    width = 3074 if train[0].name == "train.bin" and train[0].stat().st_size % 3073 else 3073
    for file in files:
        size = file.stat().st_size if file.is_file() else 0
        if size == 0 or size % width:
            raise ImageDataError(f"{file} has {size:,} bytes, which are no whole rows of {width}. Download it again.")
    rows = np.concatenate([np.fromfile(file, dtype=np.uint8).reshape(-1, width) for file in files])
    pixels = np.ascontiguousarray(rows[:, width - 3072 :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    meta = folder / ("batches.meta.txt" if width == 3073 else "fine_label_names.txt")
    class_names = meta.read_text(encoding="utf-8").split() if meta.is_file() else None
    return Images(
        str(folder), _numbered(len(rows)), partial(_read_array, pixels), _as_labels(rows[:, width - 3073]), class_names
    )


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (
            entry for entry in sorted(entries, key=lambda e: e.name) if not entry.name.startswith((".", "__MACOSX"))
        )


def _files_below(folder: Path, prefix: str, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Relative paths of the image files, in order of name; links are followed, though not in circles."""
    seen |= {folder.resolve()}
    for entry in _visible(folder):
        if entry.is_dir():
            if Path(entry.path).resolve() not in seen:
                yield from _files_below(Path(entry.path), f"{prefix}{entry.name}/", seen)
        elif entry.name.lower().endswith(SUFFIXES):
            yield prefix + entry.name


def _folder(root: Path, split: str) -> Images:
    folders = [entry.name for entry in _visible(root) if entry.is_dir()]
    splits = [name for name in folders if name in SPLITS]
    if splits and split not in folders:
        raise ImageDataError(
            f"{root} has the splits {', '.join(splits)}, but no {split!r}. Name one of them, or give the folder inside."
        )
    base = root / split if split in folders else root
    paths = list(_files_below(base, ""))
    if not paths:
        raise ImageDataError(f"{base} holds no image ({', '.join(SUFFIXES)}). Give another folder.")
    flat, nested = ([path for path in paths if ("/" in path) == inside] for inside in (False, True))
    if flat and nested:
        raise ImageDataError(
            f"{base} has images in class folders and beside them ({nested[0]}, {flat[0]}). Move them all in, or all out."
        )
    if flat:
        return Images(str(base), paths, partial(_read_file, base, paths))
    # A class that is missing here must not shift the labels of the others: they count the folders of the training split, if there is one.
    trained = (
        [entry.name for entry in _visible(root / "train") if entry.is_dir()]
        if base != root and "train" in folders
        else []
    )
    classes = [path.split("/", 1)[0] for path in paths]
    names = list(dict.fromkeys([*trained, *classes]))
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[name] for name in classes])
    return Images(str(base), paths, partial(_read_file, base, paths), labels, names)


def _hub(source: str, config: str | None, split: str, image_column: str | None, label_column: str | None) -> Images:
    import datasets

    try:
        rows = datasets.load_dataset(source, config, split=split)
    except (
        Exception
    ) as error:  # offline, gated, no such split, no such configuration: the Hub client has a class for each
        raise ImageDataError(
            f"{source!r}, split {split!r}, is neither a local path nor readable from the Hub: {type(error).__name__}: {error} "
            "Check the name and the connection, or give a local folder."
        ) from None
    features, has = rows.features, ", ".join(rows.column_names)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    column = image_column or ("image" if "image" in images else next(iter(images), None))
    if column is None or column not in images:
        asked = f"image_column={column!r}, but" if image_column else "no column of images:"
        raise ImageDataError(f"{source!r}: {asked} the columns are {has}. Give as image_column one of the type Image.")
    if label_column and label_column not in features:
        raise ImageDataError(f"{source!r} has no label column {label_column!r}; its columns are {has}.")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    likely = [name for name in ("label", "labels", "fine_label", "class") if name in features]
    chosen = (
        label_column
        or next((name for name in likely if name in classes), None)
        or next(iter([*classes, *likely]), None)
    )
    labels = class_names = None
    if chosen:
        values = rows.select_columns([chosen]).with_format("numpy")[:][chosen]
        if isinstance(features[chosen], datasets.ClassLabel):
            class_names = list(features[chosen].names)
        elif np.asarray(values).dtype.kind in "UO" and all(isinstance(v, str) for v in values):
            class_names = sorted(set(values))
            values = np.searchsorted(class_names, values)
        labels = _as_labels(values, f"{source!r}, column {chosen!r}")
        labels = None if len(labels) and bool((labels == -1).all()) else labels  # -1 is how the Hub says "kept secret"
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Images(source, _numbered(len(rows)), partial(_read_row, rows, column), labels, class_names)


def load_images(
    source: str, *, split: str = "train", config: str | None = None, image_column: str | None = None, label_column: str | None = None,
    max_rows: int | None = None,
) -> Images:  # fmt: skip
    """The images of a source.

    Args:
        source: "digits"; "synthetic" (coloured shapes, 10 classes); a folder with `split` as a sub-folder or without, its images in one
            sub-folder a class, or all in one place and without labels; an .npz with images (N, H, W[, 3]) uint8 and maybe labels, or
            x_train, y_train, x_test, y_test; a folder with the binary version of CIFAR; a folder of Parquet files; or a Hub id.
        config, image_column, label_column: of a Hub data set; found where not given.
        max_rows: at most so many, drawn at random with a fixed seed: files are often sorted by class.

    Raises:
        ImageDataError: no such source or split, no images in it, or a layout that leaves open what is a class.

    >>> images = load_images("digits", split="test")
    >>> len(images), images.read(0).size, images.class_names[int(images.labels[0])]
    (500, (8, 8), '0')
    """
    if max_rows is not None and max_rows < 1:
        raise ImageDataError(f"max_rows={max_rows} leaves no images. Give a positive number, or leave it out for all.")
    path = Path(source).expanduser()
    if source in ("digits", "synthetic"):
        images = _digits(split) if source == "digits" else _synthetic(split)
    elif path.is_file():
        if path.suffix != ".npz":
            raise ImageDataError(
                f"{path} is a file, but only an .npz is read. Give a folder of images, an .npz or a Hub id."
            )
        images = _npz(path, split)
    elif path.is_dir():
        parquet = any(next(folder.glob("*.parquet"), None) for folder in (path, path / "data", path / split))
        images = _cifar(path, split) or (
            _hub(str(path), config, split, image_column, label_column) if parquet else _folder(path, split)
        )
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ImageDataError(f"{path} does not exist. Give a folder of images, an .npz, a Hub id, digits or synthetic.")
    else:
        images = _hub(source, config, split, image_column, label_column)
    if len(images) == 0:
        raise ImageDataError(f"{source!r}, split {split!r}, holds no images.")
    if max_rows is not None and max_rows < len(images):
        images = images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:max_rows]))
    return images


# --------------------------------------------------------------------------------------------------------------- for training


class TrainImages(Dataset):
    """(epoch, index) -> (epoch, index, image, None), for `TwoViewCollator`.

    Where image 3 cannot be read, the next that can stands in, with its own index and label, and the reason is told:
    (0, 3) -> (0, 4, image 4, "owl/3.png of data/birds cannot be read (...).")
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
            f"{len(skipped)} images in a row cannot be read. The first: {skipped[0]} Repair the data, or the path to it."
        )


class EpochSampler(Sampler):
    """(epoch, index) for every index, in an order that (seed, epoch) alone decide.

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
