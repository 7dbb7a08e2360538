"""The nine methods (methods.py): how each combines its branches, and what it sets by epoch."""

import pytest
import torch

from matrix_llm.base.errors import RecipeError
from matrix_llm.ssl import losses
from matrix_llm.ssl.methods import METHODS, Branches
from matrix_llm.ssl.modeling import SSLModel
from tests.support.tiny_ssl import tiny_model, views


@pytest.mark.parametrize("method", METHODS)
def test_every_method_combines_its_branches_as_published(method):
    """Both directions, halved (Matrix-SSL, MEC, SimSiam) or summed (BYOL), one (MoCo); targets see the other view."""
    model, (x, y) = tiny_model(method).eval(), views()
    (_, z1, p1), (_, z2, p2) = model.online_branch(x), model.online_branch(y)
    t1, t2 = (model.target_branch(v) if METHODS[method].target else None for v in (x, y))
    unit = torch.nn.functional.normalize
    expected = {
        "matrix_ssl": lambda: (losses.matrix_ssl_loss(t2, p1) + losses.matrix_ssl_loss(t1, p2)) / 2,
        "mec": lambda: (losses.mec_loss(p1, t2) + losses.mec_loss(p2, t1)) / 2,
        "barlow_twins": lambda: losses.barlow_twins_loss(z1, z2),
        "vicreg": lambda: losses.vicreg_loss(z1, z2),
        "simclr": lambda: losses.nt_xent_loss(z1, z2),
        "moco": lambda: losses.moco_loss(z1, t2, model.queue),
        "byol": lambda: losses.byol_loss(p1, t2) + losses.byol_loss(p2, t1),
        "simsiam": lambda: losses.simsiam_loss(p1, p2, z1, z2),
        "swav": lambda: losses.swav_loss(*(unit(z, dim=1) @ unit(model.prototypes, dim=1).T for z in (z1, z2))),
    }[method]()
    torch.testing.assert_close(model(x, y).loss, expected)


def test_the_papers_preset_is_one_sided():
    config = tiny_model("matrix_ssl").config
    config.loss_settings = {"preset": "paper", "lambda_": 0.1}
    model, (x, y) = SSLModel(config).eval(), views()
    expected = losses.matrix_ssl_loss(model.target_branch(x), model.online_branch(y)[2], preset="paper", lambda_=0.1)
    torch.testing.assert_close(model(x, y).loss, expected)


def test_mec_lowers_eps_over_ten_epochs():
    schedule = METHODS["mec"].schedule
    assert [schedule({"eps": 64.0}, epoch)["eps"] for epoch in (0, 5, 10, 50)] == [512.0, 288.0, 64.0, 64.0]
    model, (x, y) = tiny_model("mec").eval(), views()
    assert not torch.isclose(model(x, y, epoch=0.0).loss, model(x, y, epoch=10.0).loss)
    assert torch.equal(model(x, y, epoch=10.0).loss, model(x, y).loss)


def test_swav_keeps_its_cosines_in_float32_under_autocast():
    model, (x, y) = tiny_model("swav").eval(), views()
    branches = Branches(
        model.online_branch(x)[1],
        model.online_branch(y)[1],
        None,
        None,
        None,
        None,
        prototypes=model.prototypes.detach(),
    )
    expected = METHODS["swav"].loss(branches)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(METHODS["swav"].loss(branches), expected)


@pytest.mark.parametrize(
    "settings", [{"preset": "papers"}, {"order": 0}, {"preset": "paper", "lambda_": 0.0}, {"eps": 0.0}]
)
def test_a_loss_setting_out_of_range_is_an_error_that_the_user_can_mend(settings):
    """pretrain.py prints the errors of this family in one line; any other would be a traceback."""
    model, (x, y) = tiny_model("mec" if "eps" in settings else "matrix_ssl"), views()
    model.config.loss_settings = settings
    with pytest.raises(RecipeError, match=next(reversed(settings))):
        model(x, y)
