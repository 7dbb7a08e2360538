"""Backbones are loaded whole or not at all (models/loading.py)."""

import pytest

from matrix_llm.ssl.modeling import load_backbone
from tests.support.tiny_ssl import tiny_model


def test_a_backbone_with_missing_weights_is_refused_not_started_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("simclr").backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embedder.embedder.convolution.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weight\(s\).*embedder.embedder.convolution"):
        load_backbone(tmp_path)
