"""benchmarks/study_statistics.py against SciPy, values by hand, and simulations."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study_statistics as statistics

from eval.statistics import mcnemar_exact, pass_at_k


@pytest.mark.parametrize("df", [2, 4, 9, 30])
def test_t_probabilities_and_quantiles_are_scipys(df):
    scipy = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.3, 2.0, 11.0):
        assert statistics.t_two_sided(t, df) == pytest.approx(2 * scipy.t.sf(t, df), rel=1e-9)
    assert statistics.t_quantile(0.95, df) == pytest.approx(scipy.t.ppf(0.975, df), rel=1e-9)


def test_paired_t_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    found, expected = statistics.paired_t(a - b), scipy.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_t_of_one_seed_or_of_equal_differences_says_so():
    assert math.isnan(statistics.paired_t([0.3]).p)
    assert statistics.paired_t([0.0, 0.0, 0.0]).p == 1.0
    assert statistics.paired_t([0.5, 0.5, 0.5]).p == 0.0


def test_sign_flip_counts_patterns_and_has_its_floor():
    assert statistics.sign_flip([1, 2, 3, 4, 5]) == 2 / 32
    assert statistics.sign_flip([1, -1]) == 1.0
    assert (
        statistics.sign_flip([1, 2, -3, 4]) == 10 / 16
    )  # |10 - 2 s| >= 4 for the 5 subsets with sum s <= 3, and their complements
    assert statistics.sign_flip(list(np.linspace(0.5, 1.5, 20)), repeats=2000) < 0.01


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_minimum_detectable_effect_has_eighty_percent_power(seeds):
    scipy = pytest.importorskip("scipy.stats")
    effect = statistics.minimum_detectable_effect(2.0, seeds) * math.sqrt(seeds) / 2.0
    critical = scipy.t.ppf(0.975, seeds - 1)
    power = scipy.nct.sf(critical, seeds - 1, effect) + scipy.nct.cdf(-critical, seeds - 1, effect)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert statistics.holm([0.6, math.nan, 0.9])[0::2] == pytest.approx([1.0, 1.0])
    assert math.isnan(statistics.holm([0.6, math.nan])[1])


def test_mcnemar_and_pass_at_k_by_hand():
    assert mcnemar_exact(1, 9) == 22 / 1024  # 2 (1 + 10) / 2^10
    assert [pass_at_k(8, 2, k) for k in (1, 4, 8)] == pytest.approx([0.25, 1 - 15 / 70, 1.0])  # C(6, 4) / C(8, 4)


def test_ece_by_hand():
    confidences, right = [0.05, 0.05, 0.62, 0.66, 1.0], [False, True, True, False, True]
    # bin (0, 1/15]: 2 of 5, |0.5 - 0.05|; bin (9/15, 10/15]: 2 of 5, |0.5 - 0.64|; bin (14/15, 1]: right, |1 - 1|
    assert statistics.expected_calibration_error(confidences, right) == pytest.approx(0.4 * 0.45 + 0.4 * 0.14)
    assert math.isnan(statistics.expected_calibration_error([], []))


def test_diversity_by_hand():
    assert statistics.distinct_n(["a b c", "a b c"], 1) == 0.5
    assert math.isnan(statistics.distinct_n(["a"], 2))
    assert statistics.distinct_answers(["1", "1", None, None]) == 0.5


def simulated(rng, effect=0.0, seeds=8, problems=300):
    """(S, P) differences with spread over seeds, over problems, and over both."""
    over_seeds, over_problems = rng.normal(0, 0.03, (seeds, 1)), rng.normal(0, 0.3, (1, problems))
    return effect + over_seeds + over_problems + rng.normal(0, 0.3, (seeds, problems))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(150):
        low, high = statistics.hierarchical_bootstrap(simulated(rng, effect=0.1), repeats=400)
        covered += low <= 0.1 <= high
    assert 0.87 <= covered / 150 <= 1.0  # eight seeds: a little narrow, as its docstring says


def test_bootstrap_is_seeded_and_wider_than_one_over_problems_alone():
    d = simulated(np.random.default_rng(2))
    found = statistics.hierarchical_bootstrap(d)
    assert found == statistics.hierarchical_bootstrap(d)
    alone = statistics.hierarchical_bootstrap(d.mean(0, keepdims=True))
    assert found[1] - found[0] > alone[1] - alone[0]
    with pytest.raises(ValueError, match="one row a seed"):
        statistics.hierarchical_bootstrap(np.zeros(3))
