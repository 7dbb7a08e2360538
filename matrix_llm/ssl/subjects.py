"""What an evaluation is of: the network that --model names, the images of both parts, the labels that may be used.

Everything here is checked before a weight is loaded.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from matrix_llm.base.errors import ImageDataError, ProbeError
from matrix_llm.ssl.augment import PROCESSOR_FILE, EvalTransform
from matrix_llm.ssl.data import Images
from matrix_llm.ssl.loops import labels_of
from matrix_llm.ssl.modeling import SSLConfig, load_backbone
from matrix_llm.ssl.probes import check_classes, class_balanced_split

__all__ = ["Subject", "aligned", "choose_split", "find_subject", "pixels_of", "read_split", "recipe_flip"]


@dataclass
class Subject:
    """The network that --model names, found but not loaded."""

    kind: str  # "trained", "random" or "pixels"
    folder: Path | None
    config: PreTrainedConfig | None  # the backbone's
    transform: EvalTransform

    def load(self, seed: int) -> PreTrainedModel | None:
        if self.kind == "pixels":
            return None
        if self.kind == "trained":
            assert self.folder is not None
            return load_backbone(self.folder, use_safetensors=True)  # a .bin is a pickle, which could run code
        # Not SSLModel's zero start of the residual branches: in eval mode these would pass nothing on, a weaker baseline.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModel.from_config(self.config).eval()


def pixels_of(images: Images, image_size: int | None) -> Subject:
    """The pixels themselves, of the size and channels of the first readable image where no size is given."""
    for i in range(len(images)):
        try:
            image = images.read(i)
        except ImageDataError:
            continue
        return Subject(
            "pixels", None, None, EvalTransform(image_size or min(image.size), 1 if image.mode == "L" else 3, 1.0)
        )
    raise ProbeError(f"none of the {len(images)} images of {images.name} can be read.")


def find_subject(model: str) -> Subject:
    """The network in a folder, `random:` the same before training, or `pixels:` what it would see.

    Raises:
        ProbeError: no folder of a model, or one whose images were prepared in an unknown way.
    """
    prefix, _, rest = model.rpartition(":")
    kind, path = (prefix, rest) if prefix in ("random", "pixels") else ("trained", model)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ProbeError(
            f"{folder} {what}, so it holds no model. Give a run's folder, a checkpoint in it, random:FOLDER, or pixels."
        )
    beside = next((place for place in (folder, folder.parent) if (place / PROCESSOR_FILE).is_file()), folder)
    try:
        transform = EvalTransform.load(beside)
    except ValueError as error:
        raise ProbeError(str(error)) from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ProbeError(
            f"{folder / 'config.json'} names no model that transformers builds: {str(error).splitlines()[0]}"
        ) from None
    if isinstance(config, SSLConfig):
        config = config.backbone_config  # type: ignore[assignment]
    channels = getattr(config, "num_channels", transform.channels)
    if channels != transform.channels:
        raise ProbeError(
            f"{folder} takes {channels} channel(s), but {beside / PROCESSOR_FILE} prepares {transform.channels}."
        )
    if (
        kind == "trained"
        and not (folder / "model.safetensors").is_file()
        and not (folder / "model.safetensors.index.json").is_file()
    ):
        raise ProbeError(
            f"{folder} has no model.safetensors, the one kind of weights that is read. Save it with safetensors."
        )
    return Subject(kind, folder, config, transform)


def aligned(train: Images, test: Images) -> tuple[Images, Images, int]:
    """Both with labels that mean the same, and the number of classes.

    Raises:
        ProbeError: no labels, classes that cannot be learned, or a test part that is the training part.
    """
    labels_of(train)
    test_labels = labels_of(test)
    if train.class_names and test.class_names and train.class_names != test.class_names:
        unknown = [
            test.class_names[k] for k in test_labels.unique().tolist() if test.class_names[k] not in train.class_names
        ]
        if unknown:
            raise ProbeError(
                f"the test images have classes that {train.name} lacks: {', '.join(unknown[:5])}. Use one naming in both."
            )
        number = torch.tensor([train.class_names.index(n) if n in train.class_names else -1 for n in test.class_names])
        test = copy.copy(test)  # folders are counted where they are: the same class may be 2 here and 3 there
        test.labels, test.class_names = number[test_labels], train.class_names
    classes = check_classes(labels_of(train), labels_of(test), train.class_names)
    if train.ids == test.ids and all(
        _same(train, test, i) for i in np.linspace(0, len(train) - 1, 8).astype(int).tolist()
    ):
        raise ProbeError(
            f"the training and the test images ({train.name}) are the same. Give --test_data, or a folder with train/ and test/ inside."
        )
    return train, test, classes


def _same(a: Images, b: Images, i: int) -> bool:
    try:
        return a.read(i).tobytes() == b.read(i).tobytes()
    except ImageDataError:
        return True  # says nothing


def read_split(path: Path, images: Images) -> Tensor:
    """Sorted places of the images that a file names, one a line, by id or (as in SimCLR's 1percent.txt) by file name alone.

    Raises:
        ProbeError: the file cannot be read, or names an image twice, or one that is not there or not there once.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(
            f"--split {path} cannot be read as text ({type(error).__name__}). Give a file with one image name a line."
        ) from None
    by_name: dict[str, int] = {}
    for i, name in enumerate(images.ids):
        base = name.rsplit("/", 1)[-1]
        by_name[base] = -1 if base in by_name else i
    by_name |= {name: i for i, name in enumerate(images.ids)}
    absent = [name for name in names if by_name.get(name, -1) < 0]
    if absent or not names:
        listed = (
            f"{len(absent)} of its {len(names)} names are of no image, or of several, in {images.name}, e.g. {absent[0]}"
            if names
            else "empty"
        )
        raise ProbeError(
            f"--split {path}: {listed}. Each line is an image's path below the split's folder, or its file name."
        )
    places = sorted(by_name[name] for name in names)
    if twice := [images.ids[a] for a, b in itertools.pairwise(places) if a == b]:
        raise ProbeError(f"--split {path} names {twice[0]} twice. Remove one.")
    return torch.tensor(places)


def recipe_flip(folder: Path | None) -> float:
    """flip_prob of the run's recipe, or 0.5: images that are not flipped in training, such as digits, are not here."""
    for place in (folder, folder.parent) if folder else ():
        if (place / "recipe.yaml").is_file():
            try:
                value = (yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8")) or {}).get(
                    "flip_prob", 0.5
                )
                return value if isinstance(value, (int, float)) and 0 <= value <= 1 else 0.5
            except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
                return 0.5
    return 0.5


def choose_split(train: Images, test: Images, *, percent: float | None, file: str | None, seed: int) -> Tensor:
    """Places of the training images whose labels are used: those in the file, or drawn by (seed, percent), as many of each class.

    Raises:
        ProbeError: see `read_split` and `class_balanced_split`; a class without an image; a file of another size than percent.
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
