"""The models of the image side under one name; importing it registers them with `AutoModel`. The code is in
`models/`.
"""

from matrix_llm.ssl.models.backbones import feature_dim, pooled
from matrix_llm.ssl.models.loading import load_backbone
from matrix_llm.ssl.models.small_resnet import SmallResNetConfig, SmallResNetModel
from matrix_llm.ssl.models.ssl_config import SSLConfig
from matrix_llm.ssl.models.ssl_model import SSLModel, SSLOutput
from matrix_llm.ssl.models.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm

__all__ = [
    "SSLConfig",
    "SSLModel",
    "SSLOutput",
    "SmallResNetConfig",
    "SmallResNetModel",
    "SyncBatchNorm",
    "feature_dim",
    "load_backbone",
    "pooled",
    "synchronise_batch_norm",
]
