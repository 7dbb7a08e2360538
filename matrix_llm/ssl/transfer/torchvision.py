"""torchvision's names for the weights of a ResNet, in both directions. torchvision is not needed."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, ResNetConfig, ResNetModel

from matrix_llm.base.errors import ExportError
from matrix_llm.ssl.transfer.layers import COUNTER, NORM, check_standard_resnet, copy_state, layer_names

__all__ = ["from_torchvision", "torchvision_state_dict"]

WANTED = "Give the weights of one of torchvision's resnet18 to resnet152."


def torchvision_state_dict(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under torchvision's names: conv1.weight, bn1.*, layer1.0.conv1.weight, ...,
    layer1.0.downsample.0.weight.

    Returns:
        float32 (and int64 counters) on the CPU, without `fc.*`: load with strict=False, or after `net.fc =
        nn.Identity()`.

    Raises:
        ExportError: another architecture, or strides and activations that torchvision's ResNet v1.5 does not have.

    >>> sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
    >>> config = ResNetConfig(**sizes, layer_type="basic")
    >>> state = torchvision_state_dict(ResNetModel(config))
    >>> state["conv1.weight"].shape, state["layer2.0.downsample.0.weight"].shape
    (torch.Size([8, 3, 7, 7]), torch.Size([16, 8, 1, 1]))
    """
    model = check_standard_resnet(backbone, "torchvision")
    if model.config.layer_type == "bottleneck" and model.config.downsample_in_bottleneck:
        where = "puts the stride in the 1 x 1 convolution, but torchvision's ResNet v1.5 has it in the 3 x 3"
        raise ExportError(
            f"downsample_in_bottleneck=True {where}. Export to detectron2 or detr, whose configurations say where it "
            "is."
        )
    state = copy_state(model)
    exported = {}
    for ours, conv, norm, _ in layer_names(model):
        exported[f"{conv}.weight"] = state[f"{ours}.convolution.weight"]
        exported |= {f"{norm}.{key}": state[f"{ours}.normalization.{key}"] for key in NORM}
    return exported


def from_torchvision(source: Mapping[str, Tensor] | str | os.PathLike[str]) -> ResNetModel:
    """The inverse of `torchvision_state_dict`: a ResNetModel with these weights, its sizes read from their shapes.

    Args:
        source: a state dict, or a .safetensors or .pth file of one. A .pth is read by a loader that can build tensors
            only. The classifier `fc.*` is left out; counters that are missing (files of 2017) start at 0.

    Returns:
        float32, in eval mode; the stride is in the 3 x 3 convolution, as in torchvision.

    Raises:
        ExportError: not a file of tensors, or not the weights of a plain ResNet (ResNeXt, wide, or with another stem).

    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 1])
    >>> from_torchvision(torchvision_state_dict(ResNetModel(config))).config.depths
    [1, 2, 1, 1]
    """
    # 1. Read it.
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    given = source if isinstance(source, Mapping) else _read(Path(source))
    given = {str(key): value for key, value in given.items() if not str(key).startswith("fc.")}
    if not all(isinstance(value, Tensor) for value in given.values()):
        raise ExportError(
            f"{name} is not a dict of tensors (keys: {', '.join(list(given)[:3])}). Give the state dict inside it."
        )
    # 2. Compare every name and shape with those of a plain ResNet of these sizes.
    model = ResNetModel(_config_of(given, name)).eval()
    expected = torchvision_state_dict(model)
    for key in sorted(expected.keys() | given.keys()):
        found, wanted = (tuple(tensors[key].shape) if key in tensors else "absent" for tensors in (given, expected))
        if found != wanted and not (found == "absent" and key.endswith(COUNTER)):
            raise ExportError(
                f"{name}: {key} is {found}, but {wanted} in a plain ResNet (not ResNeXt, not wide) of these sizes. "
                f"{WANTED}"
            )
    # 3. Rename.
    given, state = expected | given, {}
    for ours, conv, norm, _ in layer_names(model):
        state[f"{ours}.convolution.weight"] = given[f"{conv}.weight"]
        state |= {f"{ours}.normalization.{key}": given[f"{norm}.{key}"] for key in NORM}
    model.load_state_dict(state, strict=True)
    return model


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix not in (".safetensors", ".pth") or not path.is_file():
        raise ExportError(f"{path} is not a .safetensors or .pth file. {WANTED}")
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
    """The sizes of the ResNet, read from the names and shapes of its weights."""
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
