"""A ResNet for small images, registered as `small_resnet`: CIFAR's usual change of the stem.

Importing this module registers it, so `AutoModel.from_pretrained(run)` works after `import matrix_llm.ssl.modeling`.
"""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModel, ResNetConfig, ResNetModel
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

__all__ = ["SmallResNetConfig", "SmallResNetModel"]


class SmallResNetConfig(ResNetConfig):
    """`ResNetConfig` for images of about 32 pixels: the stem is one 3 x 3 convolution of stride 1, without pooling."""

    model_type = "small_resnet"


class SmallResNetModel(ResNetModel):
    """`ResNetModel` with that stem.

    >>> import torch
    >>> config = SmallResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> SmallResNetModel(config)(torch.zeros(2, 3, 16, 16)).last_hidden_state.shape
    torch.Size([2, 16, 8, 8])
    """

    config_class = SmallResNetConfig

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__(config)
        self.embedder.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, activation=config.hidden_act
        )
        self.embedder.add_module("pooler", nn.Identity())  # replaces the 3 x 3 maximum
        self.post_init()


AutoConfig.register("small_resnet", SmallResNetConfig)
AutoModel.register(SmallResNetConfig, SmallResNetModel)
