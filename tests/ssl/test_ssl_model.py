"""The model of every method (models/ssl_model.py): what trains, the target network, and MoCo's queue."""

import pytest
import torch
from transformers import AutoModel

from matrix_llm.ssl.methods import METHODS
from matrix_llm.ssl.modeling import SSLConfig, SSLModel
from tests.support.tiny_ssl import BACKBONE, tiny_model, views


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_each_trained_weight_a_gradient_and_survives_saving(method, tmp_path):
    model = tiny_model(method)
    out = model(*views(), labels=torch.arange(6))
    (out.loss + out.probe_loss).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(
        p.grad is None
        for part in (model.target_backbone, model.target_projector)
        if part is not None
        for p in part.parameters()
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, SSLModel)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_the_probe_sends_no_gradient_into_the_backbone():
    model = tiny_model("simsiam")
    model(*views(), labels=torch.arange(6)).probe_loss.backward()
    assert model.probe[1].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.backbone.parameters())


def test_the_target_network_starts_equal_and_moves_by_one_minus_the_momentum():
    model = tiny_model("byol")
    online, target = next(model.backbone.parameters()), next(model.target_backbone.parameters())
    assert torch.equal(online, target)
    before = target.clone()
    with torch.no_grad():
        online.add_(1.0)
    model.update_target(0.75)
    torch.testing.assert_close(target, before + 0.25)
    assert not any(p.requires_grad for p in model.target_backbone.parameters())


def test_the_target_network_normalises_with_its_own_batch_statistics():
    """As in the released code: its running statistics move by themselves and are not copied from the online network."""
    model = tiny_model("matrix_ssl").train()
    with torch.no_grad():
        model.target_backbone.embedder.embedder.convolution.weight.mul_(3)
    model(*views())
    model.update_target(1.0)
    online = model.backbone.embedder.embedder.normalization
    target = model.target_backbone.embedder.embedder.normalization
    assert target.num_batches_tracked == 2  # once a view
    torch.testing.assert_close(3 * online.running_mean, target.running_mean)


def test_the_residual_branches_start_at_zero_unless_told_otherwise():
    config = {
        "method": "simsiam",
        "backbone_config": dict(BACKBONE),
        "projector_widths": [8, 8],
        "predictor_widths": [4, 8],
    }
    for zero in (True, False):
        model = SSLModel(SSLConfig(**config, zero_init_residual=zero))
        last = model.backbone.encoder.stages[0].layers[0].layer[-1].normalization.weight
        assert bool((last == 0).all()) is zero


def test_the_queue_holds_the_newest_keys_and_wraps_around():
    model = tiny_model("moco").train()
    size = len(model.queue)
    keys = torch.nn.functional.normalize(torch.randn(size - 1, 12), dim=1)
    model.enqueue(keys)
    more = torch.nn.functional.normalize(torch.randn(3, 12), dim=1)
    model.enqueue(more)
    torch.testing.assert_close(model.queue[size - 1], more[0])
    torch.testing.assert_close(model.queue[:2], more[1:])
    torch.testing.assert_close(model.queue[2:-1], keys[2:])
    with pytest.raises(ValueError, match=r"queue_size=40.*41.*at least 41"):
        model.enqueue(torch.randn(41, 12))


def test_the_queue_is_read_before_it_is_written():
    """A key that were its own negative would make the loss depend on itself."""
    model = tiny_model("moco").train()
    x, y = views(4)
    before = model.queue.clone()
    expected = METHODS["moco"].loss_function(model.online_branch(x)[1], model.target_branch(y), before)
    torch.testing.assert_close(model(x, y).loss, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.queue, before)


def test_moco_passes_each_network_over_one_view_alone():
    model = tiny_model("moco").train()
    model(*views())
    assert model.backbone.embedder.embedder.normalization.num_batches_tracked == 1
    assert model.target_backbone.embedder.embedder.normalization.num_batches_tracked == 1
