"""The options of `evaluate.py`: one dataclass for each protocol, from which the command line is made.

An option is declared once, by `option(default, help, ...)`: the parser, its help and the check of its range all come
from there.
"""

from __future__ import annotations

import argparse
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from matrix_llm.base.errors import ProbeError

__all__ = ["CommonSettings", "FewSettings", "KnnSettings", "LinearSettings", "SemiSettings", "read_settings"]


class Range(NamedTuple):
    """The numbers that an option allows."""

    words: str
    """The range in words, for the error message."""
    holds: Callable[[float], bool]
    """Whether a number lies in the range."""


AT_LEAST_0 = Range("at least 0", lambda x: x >= 0)
AT_LEAST_1 = Range("at least 1", lambda x: x >= 1)
ABOVE_0 = Range("above 0", lambda x: x > 0)
FRACTION = Range("from 0 to below 1", lambda x: 0 <= x < 1)
PROBABILITY = Range("from 0 to 1", lambda x: 0 <= x <= 1)
SHARE = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
PERCENT = Range("above 0 and at most 100", lambda x: 0 < x <= 100)
NORMALISED = Range("at least 2, because batch normalisation compares images", lambda x: x >= 2)
COMPARED = Range("at least 2: one draw says nothing about how draws differ", lambda x: x >= 2)
SIZE = Range("at least 4", lambda x: x >= 4)


def option(default: Any, help: str, *, range: Range | None = None, **argparse_settings: Any) -> Any:
    """A field that is also an option `--name` of the command line; `argparse_settings` go to `add_argument`."""
    metadata = {"default": default, "help": help, "range": range, "argparse": argparse_settings}
    return field(default=default, metadata=metadata)


def _number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


@dataclass(kw_only=True)
class CommonSettings(ABC):
    """The options of every protocol. An option's help text describes it."""

    model: str = option("", "a run's folder, random:FOLDER, pixels:FOLDER or pixels", required=True)
    data: str = option("", "the images: digits, a folder, an .npz, a Hub id, ... (images/load.py)", required=True)
    test_data: str | None = option(None, "where the test images are, if not in --data")
    train_split: str = option("train", "the part to train on")
    test_split: str = option("test", "the part to score")
    image_column: str | None = option(None, "column of a Hub data set with the images; found if not given")
    label_column: str | None = option(None, "column of a Hub data set with the labels; found if not given")
    out: Path | None = option(None, "the result's file; MODEL/eval/<name>.json if not given", type=Path)
    force: bool = option(False, "overwrite an earlier result", action="store_true")
    seed: int = option(0, "of everything that is drawn", type=int, range=AT_LEAST_0)
    device: str = option("auto", "e.g. cpu or cuda:0")
    workers: int | None = option(
        None, "processes that read images; chosen by the number of images if not given", type=int, range=AT_LEAST_0
    )
    eval_batch_size: int = option(256, "images through the network at a time", type=int, range=AT_LEAST_1)
    bf16: bool = option(False, "run the network in bfloat16", action="store_true")
    image_size: int | None = option(None, "of --model pixels; the first image's if not given", type=int, range=SIZE)

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_option(f, getattr(self, f.name))
        if self.image_size is not None and self.model != "pixels":
            raise ProbeError(
                f"--image_size {self.image_size} is for --model pixels only; a network has its own size. Remove it."
            )

    @property
    @abstractmethod
    def name(self) -> str:
        """The protocol's part of the result's file name."""

    @property
    def result_path(self) -> Path:
        """--out, or MODEL/eval/<name>.json, or runs/pixels/eval/<name>.json."""
        if self.out is not None:
            return self.out
        prefix, _, rest = self.model.rpartition(":")
        kind, folder = (f"{prefix}-", rest) if prefix in ("random", "pixels") else ("", self.model)
        root = Path("runs/pixels") if folder == "pixels" else Path(folder).expanduser()
        data = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.data).name or "data")
        seed = f"-seed{self.seed}" if self.seed else ""
        return root / "eval" / f"{kind}{self.name}-{data}{seed}.json"

    def _refuse_pixels(self) -> None:
        if self.model.partition(":")[0] == "pixels":
            raise ProbeError(
                f"--model {self.model} has no network to put augmented images through. "
                "Use knn, few, or linear --protocol lbfgs."
            )


@dataclass(kw_only=True)
class TrainedSettings(CommonSettings):
    """The options of every protocol that trains on augmented images."""

    momentum: float = option(0.9, "of the optimizer", type=float, range=FRACTION)
    weight_decay: float = option(0.0, "of the optimizer", type=float, range=AT_LEAST_0)
    flip_prob: float | None = option(
        None, "of training images; the recipe's if not given, or 0.5", type=float, range=PROBABILITY
    )
    crop_scale_min: float = option(0.08, "smallest share of a training image that is cropped", type=float, range=SHARE)


@dataclass(kw_only=True)
class LinearSettings(TrainedSettings):
    """A linear classifier on frozen features."""

    protocol: str = option("trained", "trained: on augmented images, the paper's", choices=["trained", "lbfgs"])
    optimizer: str | None = option(
        None, "lars if not given, or sgd where lars would have too few steps", choices=["lars", "sgd"]
    )
    epochs: int = option(100, "passes over the training images", type=int, range=AT_LEAST_1)
    batch_size: int = option(4096, "images in a step", type=int, range=NORMALISED)
    base_learning_rate: float = option(0.03, "for 256 images", type=float, range=AT_LEAST_0)
    C: float | str = option(
        1.0,
        "of lbfgs: a number, or auto: chosen on a fifth of the training part",
        type=_number_or_auto,
        range=ABOVE_0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol == "trained":
            self._refuse_pixels()

    @property
    def name(self) -> str:
        return "lbfgs" if self.protocol == "lbfgs" else "linear"


@dataclass(kw_only=True)
class KnnSettings(CommonSettings):
    """Options of the nearest-neighbour protocol."""

    k: Sequence[int] = option((20, 200), "nearest training images that vote", type=int, nargs="+", range=AT_LEAST_1)
    temperature: float = option(0.07, "of the votes' weights", type=float, range=ABOVE_0)

    @property
    def name(self) -> str:
        return "knn"


@dataclass(kw_only=True)
class SemiSettings(TrainedSettings):
    """Options of fine-tuning on a part of the labels."""

    percent: float | None = option(
        None, "of the training images, the same number from each class", type=float, range=PERCENT
    )
    split: str | None = option(None, "a file that names the images, one a line")
    epochs: int = option(20, "passes over the labelled images", type=int, range=AT_LEAST_1)
    batch_size: int = option(256, "images in a step", type=int, range=NORMALISED)
    backbone_learning_rate: float = option(
        0.002, "Barlow Twins' for 1 %%, as is the head's", type=float, range=AT_LEAST_0
    )
    head_learning_rate: float = option(0.5, "of the linear classifier", type=float, range=AT_LEAST_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percent is None and self.split is None:
            raise ProbeError("semi needs to know which labels it may use. Give --percent 1, or --split FILE.")
        self._refuse_pixels()

    @property
    def name(self) -> str:
        return f"semi-{self.percent:g}" if self.percent is not None else f"semi-{Path(str(self.split)).stem}"


@dataclass(kw_only=True)
class FewSettings(CommonSettings):
    """Options of few labels on frozen features."""

    labels_per_class: int = option(5, "labelled images of each class", type=int, range=AT_LEAST_1)
    draws: int = option(20, "random choices of the labelled images", type=int, range=COMPARED)
    C: float = option(1.0, "inverse strength of the penalty", type=float, range=ABOVE_0)

    @property
    def name(self) -> str:
        return f"few-{self.labels_per_class}"


def _check_option(f: Field, value: Any) -> None:
    """Raise a ProbeError where a number is outside the option's range."""
    range_ = f.metadata["range"]
    values = value if isinstance(value, (list, tuple)) else (value,)
    for each in values:
        if range_ is None or each is None or isinstance(each, str):
            continue
        if not (math.isfinite(each) and range_.holds(each)):
            raise ProbeError(f"--{f.name} {each:g} must be {range_.words}.")


COMMANDS: dict[str, type[CommonSettings]] = {
    "linear": LinearSettings,
    "knn": KnnSettings,
    "semi": SemiSettings,
    "few": FewSettings,
}


def read_settings(arguments: Sequence[str] | None, description: str | None) -> CommonSettings:
    """The settings of a command line; --help and what argparse refuses end the process.

    Raises:
        ProbeError: a value out of range, or settings that contradict each other.
    """
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, settings in COMMANDS.items():
        sub = commands.add_parser(
            command, help=str(settings.__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        for f in fields(settings):
            extra = f.metadata["argparse"]
            default = {} if extra.get("required") else {"default": f.metadata["default"]}
            sub.add_argument(f"--{f.name}", help=f.metadata["help"], **default, **extra)
    given = vars(parser.parse_args(arguments))
    return COMMANDS[given.pop("command")](**given)
