"""The moving average of the target network (training/callbacks.py)."""

import pytest
import torch

from matrix_llm.ssl.trainer import ema_momentum
from tests.support.tiny_ssl import tiny_model, train


def test_the_momentum_rises_on_a_cosine_to_one():
    assert ema_momentum(0, 200, 0.9, "cosine") == pytest.approx(0.9)
    assert ema_momentum(100, 200, 0.9, "cosine") == pytest.approx(0.95)
    assert ema_momentum(200, 200, 0.9, "cosine") == pytest.approx(1.0)
    assert ema_momentum(150, 200, 0.9, "constant") == 0.9


def test_the_target_network_follows_each_step(tmp_path):
    before = next(tiny_model("byol").backbone.parameters()).detach().clone()
    trainer = train("byol", 64, str(tmp_path), max_steps=1, ema_momentum=0.75, ema_schedule="constant")
    online, target = (
        next(part.parameters()) for part in (trainer.ssl_model.backbone, trainer.ssl_model.target_backbone)
    )
    assert not torch.equal(online, before)
    torch.testing.assert_close(target, 0.75 * before + 0.25 * online)
    whole = train("byol", 64, str(tmp_path / "b"), max_steps=3)
    assert whole.ema.momentum == 1.0  # the end of the cosine
