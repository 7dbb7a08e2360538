"""The optimizers of pre-training (training/optimizers.py): each weight once, at its own learning rate."""

import pytest

from tests.support.tiny_ssl import train


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_every_optimizer_trains_each_weight_once(tmp_path, optimizer):
    trainer = train("swav", 64, str(tmp_path), max_steps=1, optimizer=optimizer)
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.ssl_model.parameters() if p.requires_grad)


def test_only_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    for method, fixed in (("simsiam", True), ("byol", False)):
        trainer = train(method, 64, str(tmp_path / method), max_steps=4, warmup_steps=2)
        rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        predictor, backbone = (
            rates[id(next(part.parameters()))] for part in (trainer.ssl_model.predictor, trainer.ssl_model.backbone)
        )
        assert backbone < 0.01  # the end of the cosine
        assert (predictor == 0.05) is fixed
        assert id(next(trainer.ssl_model.probe.parameters())) in rates
