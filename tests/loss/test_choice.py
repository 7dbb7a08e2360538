"""The table of token losses and their settings."""

import inspect
import math

import pytest

from matrix_llm.base.errors import RecipeError
from matrix_llm.loss import choice
from matrix_llm.loss.reference import FUNCTIONS
from tests.support.token_losses import CASES


@pytest.mark.parametrize("loss", choice.LOSSES)
def test_every_setting_reaches_its_function_and_has_a_sentence(loss):
    parameters = list(inspect.signature(FUNCTIONS[loss]).parameters)[1:]
    assert sorted(parameters) == sorted(choice.LOSSES[loss])
    assert all(each.description.endswith(".") for each in choice.LOSSES[loss].values())


@pytest.mark.parametrize(
    ("loss", "given_", "said"),
    [
        ("emos", {}, ["token_loss='emos'", "emo"]),
        ("mse", {}, ["token_loss='mse'", "kd"]),
        ("ce", {"alpha": 1}, ["ce", "alpha", "no settings", "Remove"]),
        ("focal", {"gama": 1}, ["focal", "gama", "gamma"]),
        ("focal", {"gamma": -1}, ["focal", "gamma=-1", "at least 0"]),
        ("focal", {"gamma": math.nan}, ["gamma=nan", "at least 0"]),
        ("focal", {"gamma": "much"}, ["gamma='much'", "a number"]),
        ("power", {}, ["power", "alpha", "Give"]),
        ("power", {"alpha": -2}, ["alpha=-2", "at least -1"]),
        ("threshold", {}, ["threshold", "at", "Give"]),
        ("threshold", {"at": 2}, ["at=2", "at most 1"]),
        ("threshold", {"at": 0.5, "side": "left"}, ["side='left'", "top", "bottom"]),
        ("eaft", {"k": 1}, ["k=1", "at least 2"]),
        ("eaft", {"k": 2.5}, ["k=2.5", "integer"]),
        ("asft", {"direction": "reverse"}, ["direction='reverse'", "model_ref"]),
        ("label_smoothing", {"epsilon": 1}, ["epsilon=1", "below 1"]),
        ("gem", {"beta": 0}, ["beta=0", "above 0"]),
        ("ntl", {"squash": 1}, ["squash=1", "above 1"]),
        ("ntl", {"kind": "mse", "squash": 2}, ["squash=2", "mse", "Remove"]),
        ("emo", {"mode": 3}, ["mode=3", "at most 2"]),
        ("emo", {"mode": True}, ["mode=True", "integer"]),
        ("emo", {"mode": 2, "clamp": 3}, ["clamp=3", "mode=2", "Remove"]),
        ("kd", {"top_k": 0}, ["top_k=0", "at least 1"]),
        ("kd", {"top_k": 4, "beta": 1}, ["top_k=4", "beta=1", "infinite"]),
        ("z_loss", {"weight": None}, ["weight=None", "a number"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused(loss, given_, said):
    with pytest.raises(RecipeError) as error:
        choice.check_settings(loss, given_)
    message = str(error.value)
    assert "\n" not in message
    assert all(each in message for each in said)


def test_settings_come_back_whole_and_may_be_given_back():
    assert choice.check_settings("emo", {"mode": "2"}) == {"mode": 2, "clamp": None, "with_target": True}
    for loss, settings in CASES:
        full = choice.check_settings(loss, settings)
        assert set(full) == set(choice.LOSSES[loss])
        assert choice.check_settings(loss, full) == full
