"""The network to evaluate, found and checked before any weight is loaded.

runs/x          a run, or one of its checkpoints
random:runs/x   the same network before any training
pixels:runs/x   the pixels that it would see
pixels          the pixels of the images as they are
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from matrix_llm.base.errors import ImageDataError, ProbeError
from matrix_llm.base.safe_yaml import read_yaml
from matrix_llm.ssl.images.dataset import Images
from matrix_llm.ssl.images.eval_transform import PROCESSOR_FILE, EvalTransform
from matrix_llm.ssl.models.loading import load_backbone
from matrix_llm.ssl.models.ssl_config import SSLConfig

__all__ = ["Subject", "find_subject", "pixels_of", "recipe_flip"]


@dataclass
class Subject:
    """A network that was found but not loaded."""

    kind: str
    """"trained", "random" or "pixels"."""
    folder: Path | None
    """The model's folder; None for the pixels of the images as they are."""
    config: PreTrainedConfig | None
    """The backbone's configuration; None for the pixels of the images as they are."""
    transform: EvalTransform
    """How its images are prepared."""

    def load(self, seed: int) -> PreTrainedModel | None:
        """The backbone in eval mode, or None for pixels.

        Args:
            seed: of a random network.

        Raises:
            ProbeError: the weights cannot be loaded.
        """
        if self.kind == "pixels":
            return None
        if self.kind == "trained":
            assert self.folder is not None
            try:
                return load_backbone(self.folder, use_safetensors=True)  # a .bin is a pickle, which could run code
            except Exception as error:  # OSError, SafetensorError, RuntimeError of sizes that differ, ...
                first = (str(error).splitlines() or [""])[0]
                raise ProbeError(
                    f"the weights in {self.folder} cannot be loaded ({type(error).__name__}: {first}). Save the model "
                    "again."
                ) from error
        # AutoModel's own start, not SSLModel's zero start of the residual branches: in eval mode those would pass
        # nothing on, which makes a weaker baseline.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModel.from_config(self.config).eval()


def find_subject(model: str) -> Subject:
    """The network in a folder, named as in the module's list; `pixels` alone is `pixels_of`.

    Raises:
        ProbeError: no model in that folder, or one whose weights are not .safetensors.
        ImageDataError: how its images were prepared is unknown.
    """
    # 1. The folder
    prefix, _, rest = model.rpartition(":")
    kind, path = (prefix, rest) if prefix in ("random", "pixels") else ("trained", model)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ProbeError(
            f"{folder} {what}, so it holds no model. Give a run's folder, a checkpoint in it, random:FOLDER, or pixels."
        )
    # 2. How its images are prepared: a checkpoint shares the file of its run.
    prepared = next((place for place in (folder, folder.parent) if (place / PROCESSOR_FILE).is_file()), folder)
    transform = EvalTransform.load(prepared)
    # 3. The architecture
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:  # what transformers raises for an unknown or damaged configuration
        raise ProbeError(
            f"{folder / 'config.json'} names no model that transformers builds: {str(error).splitlines()[0]}"
        ) from None
    if isinstance(config, SSLConfig):
        config = config.backbone_config  # type: ignore[assignment]
    channels = getattr(config, "num_channels", transform.channels)
    if channels != transform.channels:
        raise ProbeError(
            f"{folder} takes {channels} channel(s), but {prepared / PROCESSOR_FILE} prepares {transform.channels}. "
            "Give the folder of a finished run."
        )
    # 4. The weights
    names = ("model.safetensors", "model.safetensors.index.json")
    if kind == "trained" and not any((folder / name).is_file() for name in names):
        raise ProbeError(f"{folder} has no model.safetensors, and no other weights are read. Save it with safetensors.")
    return Subject(kind, folder, config, transform)


def pixels_of(images: Images, image_size: int | None) -> Subject:
    """The pixels themselves. Size and channels are those of the first readable image, unless a size is given."""
    for i in range(len(images)):
        try:
            image = images.read(i)
        except ImageDataError:
            continue
        transform = EvalTransform(image_size or min(image.size), 1 if image.mode == "L" else 3, 1.0)
        return Subject("pixels", None, None, transform)
    raise ProbeError(f"none of the {len(images)} images of {images.name} can be read. Repair the data.")


def recipe_flip(folder: Path | None) -> float:
    """flip_prob of the run's recipe, or 0.5: images that pre-training did not flip, such as digits, are not flipped
    here.
    """
    for place in (folder, folder.parent) if folder else ():
        if (place / "recipe.yaml").is_file():
            try:
                recipe = read_yaml((place / "recipe.yaml").read_text(encoding="utf-8")) or {}
                value = recipe.get("flip_prob", 0.5)
                return value if isinstance(value, (int, float)) and 0 <= value <= 1 else 0.5
            except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
                return 0.5
    return 0.5
