"""A model's modes and generation settings, changed for a block of code and restored afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode for the block, then restore each one's mode, even where the caller had mixed them.

    >>> layer = nn.Dropout()
    >>> with evaluation_mode(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True  # not .train(), which would switch its children too


@contextmanager
def neutral_generation(model: Any) -> Iterator[None]:
    """Set the model's own generation settings aside for the block: `generate` takes from them what it is not given.

    A generation_config.json has some sixty settings that change a text (suppress_tokens, sequence_bias, guidance_scale,
    max_time, ...), and new versions of transformers add more, so that naming each with its neutral value never ends.
    """
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT reads and sets its base's
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before
