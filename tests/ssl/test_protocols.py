"""The interval of a mean over draws (evaluation/protocols.py)."""

import numpy as np

from matrix_llm.ssl.evaluation.protocols import interval_of_mean


def test_interval_of_mean_covers_the_mean_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    covered = [low < 0 < high for low, high in (interval_of_mean(list(rng.normal(size=5))) for _ in range(1000))]
    assert 0.93 < np.mean(covered) < 0.97
