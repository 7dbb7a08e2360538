"""A DETR whose backbone is a pretrained ResNet."""

from __future__ import annotations

from typing import Any

from transformers import DetrConfig, DetrForObjectDetection, PreTrainedModel, ResNetConfig

from matrix_llm.base.errors import ExportError
from matrix_llm.ssl.transfer.layers import check_resnet, copy_state

__all__ = ["detr_model"]

SHAPE = ("num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act")
STRIDE = ("downsample_in_first_stage", "downsample_in_bottleneck")


def detr_model(backbone: PreTrainedModel, num_labels: int, **settings: Any) -> DetrForObjectDetection:
    """A DETR (Carion et al. 2020) on this backbone. Everything else is newly initialised, from PyTorch's random state.

    Its normalisations are frozen at the backbone's running statistics, as in DETR. All convolutions can be trained,
    although transformers' constructor freezes a ResNet's; `model.model.freeze_backbone()` and `unfreeze_backbone()`
    change that.

    Args:
        backbone: a ResNetModel of any depth; its last stage is what the transformer sees.
        num_labels: classes without "no object", at least 1. COCO's category ids reach 90, so give 91.
        settings: of transformers' DetrConfig, e.g. num_queries.

    Raises:
        ExportError: another architecture, or no class.

    >>> import torch
    >>> from transformers import ResNetModel
    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    >>> detector = detr_model(ResNetModel(config), 2, **small)
    >>> detector(torch.zeros(1, 3, 32, 32)).logits.shape  # two classes and "no object"
    torch.Size([1, 4, 3])
    """
    model = check_resnet(backbone)
    if num_labels < 1:
        raise ExportError(f"num_labels={num_labels}, but a detector has at least one class. COCO's ids need 91.")
    sizes: dict[str, Any] = {name: getattr(model.config, name) for name in (*SHAPE, *STRIDE)}
    sizes["out_features"] = [f"stage{len(sizes['depths'])}"]
    settings |= {"num_channels": model.config.num_channels, "num_labels": num_labels}
    config = DetrConfig(backbone_config=ResNetConfig(**sizes), **settings)
    detector = DetrForObjectDetection(config)
    detector.model.backbone.model.load_state_dict(copy_state(model), strict=True)
    detector.model.unfreeze_backbone()
    return detector
