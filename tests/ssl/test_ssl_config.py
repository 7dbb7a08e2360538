"""The configuration of a model (models/ssl_config.py): what cannot work is refused."""

import pytest

from matrix_llm.ssl.modeling import SSLConfig
from tests.support.tiny_ssl import BACKBONE


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "matrixssl"}, "Did you mean matrix_ssl"),
        ({"method": "byol", "loss_settings": {"gamma": 1.0}}, r"gamma.*byol.*no settings.*Remove"),
        ({"method": "matrix_ssl", "loss_settings": {"gama": 1.0}}, "which takes gamma, preset, order, mu, lambda_"),
        ({"method": "simclr", "predictor_widths": [4, 8]}, "simclr has no predictor"),
        ({"method": "byol", "projector_widths": [8, 8], "predictor_widths": [4, 9]}, "the same last width"),
        ({"method": "byol", "queue_size": 10}, r"queue_size=10.*byol has none"),
        ({"method": "moco", "queue_size": 0}, r"queue_size=0.*moco needs"),
    ],
)
def test_a_configuration_that_cannot_work_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SSLConfig(backbone_config=dict(BACKBONE), **settings)
