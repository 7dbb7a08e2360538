"""Load a backbone, from a run of this package or from any other model.

Importing `SSLModel` registers it and `small_resnet` with `AutoModel`, so that their folders load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel

from matrix_llm.base.errors import ModelError
from matrix_llm.ssl.models.ssl_model import SSLModel

__all__ = ["load_backbone"]


def load_backbone(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load the backbone alone, in eval mode: of a run, of one of its checkpoints, or any other model that `AutoModel`
    loads.

    Args:
        path: a folder, or a name on the Hub.
        kwargs: for `from_pretrained`.

    Raises:
        OSError, ValueError: from `transformers`, where there is no such model.
        ModelError: the file lacks weights that the configuration asks for. `transformers` would start them at random.
    """
    model, report = AutoModel.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **kwargs)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{path} lacks {len(missing)} weight(s) of its configuration ({', '.join(missing[:3])}, ...). "
            "Save the model again."
        )
    return (model.backbone if isinstance(model, SSLModel) else model).eval()
