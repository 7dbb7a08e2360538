"""The layers of a ResNet in each library, and which networks can be exported.

The weights are renamed, never changed, so the features stay equal. Only transformers' ResNetModel is exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, ResNetModel

from matrix_llm.base.errors import ExportError

__all__ = ["COUNTER", "NORM", "LayerNames", "check_resnet", "check_standard_resnet", "copy_state", "layer_names"]

COUNTER = "num_batches_tracked"
NORM = ("weight", "bias", "running_mean", "running_var", COUNTER)


class LayerNames(NamedTuple):
    """The names of one convolution and its normalisation."""

    ours: str  # the layer, with .convolution and .normalization
    conv: str  # torchvision's convolution
    norm: str  # torchvision's normalisation
    detectron2: str  # the convolution, with .norm


def layer_names(backbone: ResNetModel) -> Iterator[LayerNames]:
    """The names of every convolution with its normalisation, in order."""
    present = {name for name, _ in backbone.named_parameters()}
    yield LayerNames("embedder.embedder", "conv1", "bn1", "stem.conv1")
    convolutions = 3 if backbone.config.layer_type == "bottleneck" else 2
    for stage, depth in enumerate(backbone.config.depths or ()):
        for block in range(depth):
            ours = f"encoder.stages.{stage}.layers.{block}"
            tv, res = f"layer{stage + 1}.{block}", f"res{stage + 2}.{block}"
            for i in range(convolutions):
                yield LayerNames(f"{ours}.layer.{i}", f"{tv}.conv{i + 1}", f"{tv}.bn{i + 1}", f"{res}.conv{i + 1}")
            if f"{ours}.shortcut.convolution.weight" in present:
                yield LayerNames(f"{ours}.shortcut", f"{tv}.downsample.0", f"{tv}.downsample.1", f"{res}.shortcut")


def check_resnet(backbone: PreTrainedModel) -> ResNetModel:
    """The backbone, after checking that it is transformers' own ResNetModel: a subclass may compute anything with the
    same names.

    Raises:
        ExportError: another architecture.
    """
    if type(backbone) is ResNetModel:
        return backbone
    kind, why = backbone.config.model_type, "these libraries' names are those of a ResNet"
    if kind == "small_resnet":
        why = "its stem is a 3 x 3 convolution without pooling, where these libraries have 7 x 7 and a pooling"
    raise ExportError(
        f"a {kind} backbone ({type(backbone).__name__}) cannot be exported: {why}. Pretrain a backbone of model_type "
        "resnet."
    )


def check_standard_resnet(backbone: PreTrainedModel, library: str) -> ResNetModel:
    """The backbone, after checking that `library` has a name for every layer and would compute the same with it.

    Raises:
        ExportError: another architecture, number of stages, activation or stride.
    """
    model = check_resnet(backbone)
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


def copy_state(model: ResNetModel) -> dict[str, Tensor]:
    """Copies in float32 on the CPU. Nothing shares memory, neither with the model nor with another tensor:
    .safetensors would refuse it.
    """
    state = {name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
