"""A pretrained ResNet for other libraries: torchvision's names, detectron2's, or the backbone of a DETR.

    python matrix_llm/ssl/export.py torchvision --model runs/x --output resnet50.safetensors  # or .pth
    python matrix_llm/ssl/export.py detectron2 --model runs/x --output r50.pkl                # and r50.yaml, a C4 config, beside it
    python matrix_llm/ssl/export.py detr --model runs/x --output detr/

The weights are renamed, never changed: the features stay equal. Only transformers' ResNetModel is exported. Neither torchvision nor
detectron2 is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, PreTrainedModel, ResNetConfig, ResNetModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from matrix_llm.base.files import atomic_path, write_text

__all__ = [
    "ExportError",
    "detectron2_config",
    "detectron2_state",
    "detr_model",
    "from_torchvision",
    "torchvision_state_dict",
]

# MODEL.RESNETS.DEPTH of detectron2, for bottleneck layers: its C4 head is built of them
DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
SHAPE = ("num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act")
STRIDE = ("downsample_in_first_stage", "downsample_in_bottleneck")
COUNTER = "num_batches_tracked"
WANTED = "Give the weights of one of torchvision's resnet18 to resnet152."
NORM = ("weight", "bias", "running_mean", "running_var", COUNTER)


class ExportError(ValueError):
    """Says what was given, why it cannot be exported and the way out."""


# ------------------------------------------------------------------------------------------------------------------ names


def _layers(backbone: ResNetModel) -> Iterator[tuple[str, str, str, str]]:
    """A convolution and its normalisation by name: ours, torchvision's convolution and normalisation, detectron2's."""
    names = {name for name, _ in backbone.named_parameters()}
    yield "embedder.embedder", "conv1", "bn1", "stem.conv1"
    convolutions = 3 if backbone.config.layer_type == "bottleneck" else 2
    for stage, depth in enumerate(backbone.config.depths or ()):
        for block in range(depth):
            ours, theirs, res = (
                f"encoder.stages.{stage}.layers.{block}",
                f"layer{stage + 1}.{block}",
                f"res{stage + 2}.{block}",
            )
            for i in range(convolutions):
                yield f"{ours}.layer.{i}", f"{theirs}.conv{i + 1}", f"{theirs}.bn{i + 1}", f"{res}.conv{i + 1}"
            if f"{ours}.shortcut.convolution.weight" in names:
                yield f"{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{res}.shortcut"


def _resnet(backbone: PreTrainedModel) -> ResNetModel:
    """`backbone`, if it is transformers' own ResNetModel; a subclass may compute anything with the same names."""
    if type(backbone) is ResNetModel:
        return backbone
    kind, why = backbone.config.model_type, "these libraries' names are those of a ResNet"
    if kind == "small_resnet":
        why = "its stem is a 3 x 3 convolution without pooling, where these libraries have 7 x 7 and a pooling"
    raise ExportError(
        f"a {kind} backbone ({type(backbone).__name__}) cannot be exported: {why}. Pretrain a backbone of model_type resnet."
    )


def _standard(backbone: PreTrainedModel, library: str) -> ResNetModel:
    """Refuses what `library` has no name for, or would compute otherwise without a word."""
    model = _resnet(backbone)
    config: Any = model.config
    if len(config.depths) != 4:
        raise ExportError(
            f"depths={config.depths}, but {library}'s ResNet has four stages. Pretrain with four, or export to detr."
        )
    if config.hidden_act != "relu":
        raise ExportError(
            f"hidden_act={config.hidden_act!r}, but {library}'s ResNet has ReLU. Pretrain with relu, or export to detr."
        )
    if config.downsample_in_first_stage:
        raise ExportError(
            f"downsample_in_first_stage=True, but {library}'s first stage keeps the resolution. Export to detr."
        )
    return model


def _state(model: ResNetModel) -> dict[str, Tensor]:
    """Copies in float32 on the CPU: no memory is shared, with the model or between tensors, which .safetensors would refuse."""
    state = {name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


# ------------------------------------------------------------------------------------------------------------- torchvision


def torchvision_state_dict(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under torchvision's names: conv1.weight, bn1.*, layer1.0.conv1.weight, ..., layer1.0.downsample.0.weight.

    Returns:
        float32 (and int64 counters) on the CPU, without `fc.*`: load with strict=False, or after `net.fc = nn.Identity()`.

    Raises:
        ExportError: another architecture, or strides and activations that torchvision's ResNet v1.5 does not have.

    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic")
    >>> state = torchvision_state_dict(ResNetModel(config))
    >>> state["conv1.weight"].shape, state["layer2.0.downsample.0.weight"].shape
    (torch.Size([8, 3, 7, 7]), torch.Size([16, 8, 1, 1]))
    """
    model = _standard(backbone, "torchvision")
    if model.config.layer_type == "bottleneck" and model.config.downsample_in_bottleneck:
        where = "puts the stride in the 1 x 1 convolution, but torchvision's ResNet v1.5 has it in the 3 x 3"
        raise ExportError(
            f"downsample_in_bottleneck=True {where}. Export to detectron2 or detr, whose configurations say where it is."
        )
    state = _state(model)
    exported = {}
    for ours, conv, norm, _ in _layers(model):
        exported[f"{conv}.weight"] = state[f"{ours}.convolution.weight"]
        exported |= {f"{norm}.{key}": state[f"{ours}.normalization.{key}"] for key in NORM}
    return exported


def from_torchvision(source: Mapping[str, Tensor] | str | os.PathLike[str]) -> ResNetModel:
    """The inverse of `torchvision_state_dict`: a ResNetModel with these weights, its sizes read from their shapes.

    Args:
        source: a state dict, or a .safetensors or .pth file of one. A .pth is read by a loader that builds nothing but tensors.
            The classifier `fc.*` is left out; counters that are missing (files of 2017) start at 0.

    Returns:
        float32, in eval mode; the stride is in the 3 x 3 convolution, as in torchvision.

    Raises:
        ExportError: not a file of tensors, or not the weights of a plain ResNet (ResNeXt, wide, or with another stem).

    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 1])
    >>> from_torchvision(torchvision_state_dict(ResNetModel(config))).config.depths
    [1, 2, 1, 1]
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    given = source if isinstance(source, Mapping) else _read(Path(source))
    given = {str(key): value for key, value in given.items() if not str(key).startswith("fc.")}
    if not all(isinstance(value, Tensor) for value in given.values()):
        raise ExportError(
            f"{name} is no dict of tensors (keys: {', '.join(list(given)[:3])}). Give the state dict inside it."
        )
    model = ResNetModel(_config_of(given, name)).eval()
    expected = torchvision_state_dict(model)
    for key in sorted(expected.keys() | given.keys()):
        found, wanted = (tuple(tensors[key].shape) if key in tensors else "absent" for tensors in (given, expected))
        if found != wanted and not (found == "absent" and key.endswith(COUNTER)):
            raise ExportError(
                f"{name}: {key} is {found}, but {wanted} in a plain ResNet (not ResNeXt, not wide) of these sizes. {WANTED}"
            )
    given, state = expected | given, {}
    for ours, conv, norm, _ in _layers(model):
        state[f"{ours}.convolution.weight"] = given[f"{conv}.weight"]
        state |= {f"{ours}.normalization.{key}": given[f"{norm}.{key}"] for key in NORM}
    model.load_state_dict(state, strict=True)
    return model


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix not in (".safetensors", ".pth") or not path.is_file():
        raise ExportError(f"{path} is no .safetensors or .pth file. {WANTED}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        return found if isinstance(found, dict) else {}
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{path} cannot be read as tensors alone ({reason}). Save the bare state dict as .safetensors."
        ) from None


def _config_of(state: Mapping[str, Tensor], name: str) -> ResNetConfig:
    blocks = {(int(match[1]), int(match[2])) for key in state if (match := re.match(r"layer(\d+)\.(\d+)\.", key))}
    layer_type, last = ("bottleneck", "conv3") if "layer1.0.conv3.weight" in state else ("basic", "conv2")
    shapes = []
    for key in ("conv1.weight", *(f"layer{stage}.0.{last}.weight" for stage in range(1, 5))):
        if key not in state or state[key].ndim != 4:
            raise ExportError(f"{name} has no convolution {key}. {WANTED}")
        shapes.append(state[key].shape)
    (embedding, channels, *_), widths = shapes[0], [shape[0] for shape in shapes[1:]]
    depths = [sum(stage == wanted for stage, _ in blocks) for wanted in range(1, 5)]
    return ResNetConfig(
        num_channels=channels, embedding_size=embedding, hidden_sizes=widths, depths=depths, layer_type=layer_type
    )


# -------------------------------------------------------------------------------------------------------------- detectron2


def detectron2_state(backbone: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights under detectron2's names: stem.conv1.weight, stem.conv1.norm.*, res2.0.conv1.weight, ..., res2.0.shortcut.norm.*.

    Returns:
        float32, without the counters, which detectron2's frozen normalisation does not have. `detectron2_config` says where strides are.

    Raises:
        ExportError: another architecture, or strides, activations and shortcuts that detectron2's ResNet does not have.

    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1])
    >>> detectron2_state(ResNetModel(config))["res3.0.shortcut.norm.bias"].shape
    (32,)
    """
    model = _standard(backbone, "detectron2")
    widths = tuple(model.config.hidden_sizes or ())
    if any(before == after for before, after in pairwise(widths)):
        raise ExportError(
            f"hidden_sizes={widths}: detectron2 has no shortcut between stages of one width. Pretrain with growing widths."
        )
    state = _state(model)
    exported = {}
    for ours, _, _, theirs in _layers(model):
        exported[f"{theirs}.weight"] = state[f"{ours}.convolution.weight"].numpy()
        for key in NORM:
            if key != COUNTER:
                exported[f"{theirs}.norm.{key}"] = state[f"{ours}.normalization.{key}"].numpy()
    return exported


def detectron2_config(
    config: ResNetConfig, image_mean: Sequence[float], image_std: Sequence[float], weights: str
) -> str:
    """MoCo's published settings for Mask R-CNN with a C4 backbone on COCO (its 2x schedule), with this network's sizes.

    Args:
        image_mean, image_std: of the run, for pixels in 0 to 1; detectron2 has pixels in 0 to 255.
        weights: MODEL.WEIGHTS, the path of the .pkl.

    Returns:
        YAML. The ROI head's name is one that MoCo's detection/train_net.py registers.

    Raises:
        ExportError: a network that detectron2's configuration cannot describe. Its weights can be exported all the same.

    >>> "PIXEL_STD: [63.75, 63.75, 63.75]" in detectron2_config(ResNetConfig(), [0.5] * 3, [0.25] * 3, "r50.pkl")
    True
    """
    widths, depths, channels = tuple(config.hidden_sizes or ()), tuple(config.depths or ()), config.num_channels
    if config.layer_type != "bottleneck":
        raise ExportError(
            "layer_type='basic', but detectron2's C4 head is built of bottleneck layers. Use the weights in an FPN config."
        )
    if depths not in DEPTHS or widths != tuple(widths[0] * 2**i for i in range(4)) or widths[0] % 4:
        known = f"the depths {', '.join(map(str, DEPTHS))} and widths that double"
        raise ExportError(
            f"depths={depths}, hidden_sizes={widths}, but detectron2's keys describe {known}. Build the network in Python."
        )
    if channels not in (1, 3) or len(image_mean) != channels or len(image_std) != channels:
        raise ExportError(
            f"{channels} channel(s), image_mean={list(image_mean)}: detectron2 reads grey or RGB images, one mean a channel."
        )
    mean, std = ([round(255 * float(value), 6) for value in values] for values in (image_mean, image_std))
    return f"""\
# Mask R-CNN, C4, COCO: MoCo's settings, 2x schedule (1x: STEPS [60000, 80000], MAX_ITER 90000).
VERSION: 2
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: {json.dumps(weights)}
  MASK_ON: true
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS:
    DEPTH: {DEPTHS[depths]}
    NORM: SyncBN
    STRIDE_IN_1X1: {json.dumps(config.downsample_in_bottleneck)}
    STEM_OUT_CHANNELS: {config.embedding_size}
    RES2_OUT_CHANNELS: {widths[0]}
    WIDTH_PER_GROUP: {widths[0] // 4}
  RPN: {{PRE_NMS_TOPK_TEST: 6000, POST_NMS_TOPK_TEST: 1000}}
  ROI_HEADS: {{NAME: Res5ROIHeadsExtraNorm}}  # a norm after res5; registered by MoCo's detection/train_net.py, not by detectron2
INPUT: {{FORMAT: {"RGB" if channels == 3 else "L"}, MIN_SIZE_TRAIN: [640, 672, 704, 736, 768, 800], MIN_SIZE_TEST: 800}}
DATASETS: {{TRAIN: [coco_2017_train], TEST: [coco_2017_val]}}
SOLVER: {{IMS_PER_BATCH: 16, BASE_LR: 0.02, STEPS: [120000, 160000], MAX_ITER: 180000}}
TEST: {{PRECISE_BN: {{ENABLED: true}}}}
"""


class _Pickler(pickle.Pickler):
    """Writes arrays as numpy.ndarray(shape, dtype, buffer): NumPy 2 names its own private modules, which the NumPy beside many a
    detectron2 does not have. The buffer is a bytearray, so that the arrays that are read can be written to."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


# -------------------------------------------------------------------------------------------------------------------- DETR


def detr_model(backbone: PreTrainedModel, num_labels: int, **settings: Any) -> DetrForObjectDetection:
    """A DETR (Carion et al. 2020) on this backbone; everything else is newly initialised, from PyTorch's random state.

    Its normalisations are frozen at the backbone's running statistics, as in DETR. All convolutions can be trained, where transformers'
    constructor freezes a ResNet's; `model.model.freeze_backbone()` and `unfreeze_backbone()` change that.

    Args:
        backbone: a ResNetModel of any depth; its last stage is what the transformer sees.
        num_labels: classes without "no object". COCO's category ids reach 90: 91.
        settings: of transformers' DetrConfig, e.g. num_queries.

    Raises:
        ExportError: another architecture, or no class.

    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    >>> detr_model(ResNetModel(config), 2, **small)(torch.zeros(1, 3, 32, 32)).logits.shape  # two classes and "no object"
    torch.Size([1, 4, 3])
    """
    model = _resnet(backbone)
    if num_labels < 1:
        raise ExportError(f"num_labels={num_labels}, but a detector has at least one class. COCO's ids need 91.")
    sizes: dict[str, Any] = {name: getattr(model.config, name) for name in (*SHAPE, *STRIDE)}
    sizes["out_features"] = [f"stage{len(sizes['depths'])}"]
    settings |= {"num_channels": model.config.num_channels, "num_labels": num_labels}
    config = DetrConfig(backbone_config=ResNetConfig(**sizes), **settings)
    detector = DetrForObjectDetection(config)
    detector.model.backbone.model.load_state_dict(_state(model), strict=True)
    detector.model.unfreeze_backbone()
    return detector


# ------------------------------------------------------------------------------------------------------------ command line


def _normalisation(path: str) -> tuple[list[float], list[float]]:
    """(mean, std) for pixels in 0 to 1, of the run's preprocessor_config.json."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(path)
        return list(found["image_mean"]), list(found["image_std"])
    except (OSError, KeyError):
        raise ExportError(
            f"{path} has no preprocessor_config.json with image_mean and image_std. Give the root of a finished run."
        ) from None


def _check_output(target: str, output: Path) -> None:
    endings = {"torchvision": (".pth", ".safetensors"), "detectron2": (".pkl",)}.get(target)
    if endings is None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ExportError(f"--output {output} exists and is no empty folder. Give a new folder.")
    elif output.suffix not in endings or output.is_dir():
        raise ExportError(
            f"--output {output}, but weights for {target} are a file ending in {' or '.join(endings)}. Rename it."
        )


def _write_torchvision(backbone: PreTrainedModel, output: Path) -> None:
    state = torchvision_state_dict(backbone)
    with atomic_path(output) as temporary:
        if output.suffix == ".safetensors":
            safetensors.torch.save_file(state, temporary)
        else:
            torch.save(state, temporary)
    print(f"{output}: {len(state)} tensors. Load with strict=False: the classifier fc is not in it.")


def _write_detectron2(backbone: PreTrainedModel, output: Path, model: str) -> None:
    state = detectron2_state(backbone)
    # an author other than "Caffe2": detectron2 then matches the ends of names, so that res5 also finds roi_heads.res5, and renames none
    with atomic_path(output) as temporary, temporary.open("wb") as file:
        _Pickler(file, protocol=4).dump({"model": state, "__author__": "matrix_llm", "matching_heuristics": True})
    print(f"{output}: {len(state)} arrays.")
    written = output.with_suffix(".yaml")
    try:
        write_text(written, detectron2_config(_resnet(backbone).config, *_normalisation(model), weights=str(output)))
        print(f"{written}: a configuration for it.")
    except ExportError as error:
        print(f"{written} is not written: {error}", file=sys.stderr)


def _write_detr(backbone: PreTrainedModel, output: Path, model: str, num_labels: int) -> None:
    detector, (mean, std) = detr_model(backbone, num_labels), _normalisation(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        detector.save_pretrained(folder)
        DetrImageProcessorPil(image_mean=mean, image_std=std).save_pretrained(folder)
        os.replace(folder, output)
    print(
        f"{output}: a DETR whose backbone alone is pretrained. Load it with DetrForObjectDetection.from_pretrained and train it."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["torchvision", "detectron2", "detr"])
    parser.add_argument(
        "--model", required=True, help="the root of a run, one of its checkpoints, or a name on the Hub"
    )
    parser.add_argument("--output", required=True, type=Path, help=".pth or .safetensors; .pkl; a new folder")
    parser.add_argument(
        "--num_labels", type=int, default=91, help="detr: classes without 'no object'; COCO's ids need 91, the default"
    )
    options = parser.parse_args(arguments)
    try:
        _check_output(options.target, options.output)
        from matrix_llm.ssl.modeling import load_backbone

        backbone = load_backbone(options.model, dtype=torch.float32)
        if options.target == "torchvision":
            _write_torchvision(backbone, options.output)
        elif options.target == "detectron2":
            _write_detectron2(backbone, options.output, options.model)
        else:
            _write_detr(backbone, options.output, options.model, options.num_labels)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
