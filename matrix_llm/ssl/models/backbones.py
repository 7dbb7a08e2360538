"""What a backbone must provide; it can be any model that `transformers.AutoModel` builds.

Legend: B images, C channels, S pixels a side, F features of the backbone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

__all__ = ["feature_dim", "pooled", "zero_init_residual"]


def pooled(
    backbone: PreTrainedModel,
    pixel_values: Tensor,  # (B, C, S, S)
) -> Tensor:
    """(B, F): the model's own pooled output if it has one, otherwise the mean over positions."""
    output = backbone(pixel_values)
    features = getattr(output, "pooler_output", None)
    if features is not None:
        return features.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))


def feature_dim(backbone: PreTrainedModel) -> int:
    """F, read from the configuration."""
    sizes = getattr(backbone.config, "hidden_sizes", None)
    return int(sizes[-1] if sizes else backbone.config.hidden_size)


@torch.no_grad()
def zero_init_residual(backbone: nn.Module) -> None:
    """Set the last normalisation of each residual branch to 0, so that each block starts as the identity."""
    for module in backbone.modules():
        if isinstance(module, (ResNetBasicLayer, ResNetBottleNeckLayer)):
            nn.init.zeros_(module.layer[-1].normalization.weight)  # type: ignore[union-attr, arg-type]
