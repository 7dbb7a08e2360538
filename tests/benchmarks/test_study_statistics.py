"""benchmarks/study/statistics.py against SciPy's own tests, values by hand, and simulations."""

import math

import numpy as np
import pytest
from scipy.stats import nct, t, ttest_rel

from benchmarks.study import statistics
from eval.statistics import mcnemar_exact, pass_at_k


def test_paired_t_is_the_t_test_of_two_related_samples():
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    found, expected = statistics.paired_t(a - b), ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.mean, found.sd, found.seeds) == (pytest.approx((a - b).mean()), pytest.approx((a - b).std(ddof=1)), 5)


def test_paired_t_of_one_seed_or_of_equal_differences_says_so():
    assert math.isnan(statistics.paired_t([0.3]).p)
    assert statistics.paired_t([0.0, 0.0, 0.0]).p == 1.0
    assert statistics.paired_t([0.5, 0.5, 0.5]).p == 0.0


def test_sign_flip_counts_patterns_and_has_its_floor():
    assert statistics.sign_flip([1, 2, 3, 4, 5]) == 2 / 32
    assert statistics.sign_flip([1, -1]) == 1.0
    # |10 - 2 s| >= 4 for the 5 subsets with sum s <= 3, and their complements
    assert statistics.sign_flip([1, 2, -3, 4]) == 10 / 16
    many = list(np.linspace(0.5, 1.5, 20))
    assert statistics.sign_flip(many, repeats=2000) < 0.01
    mixed = [*many[:-1], -20]
    assert statistics.sign_flip(mixed, repeats=2000) == statistics.sign_flip(mixed, repeats=2000)


def test_sign_flip_counts_accuracies_that_tie_up_to_rounding_as_ties():
    differences = [0.8 - 0.4, 0.9 - 0.8, 0.2 - 0.6, 0.0]  # 4, 1, -4 and 0 tenths, up to rounding
    assert statistics.sign_flip(differences) == statistics.sign_flip([4, 1, -4, 0]) == 1.0


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 11])
@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_minimum_detectable_effect_has_eighty_percent_power(seeds, alpha):
    noncentrality = statistics.minimum_detectable_effect(2.0, seeds, alpha=alpha) * math.sqrt(seeds) / 2.0
    critical = t.ppf(1 - alpha / 2, seeds - 1)
    draws = nct.rvs(seeds - 1, noncentrality, size=200_000, random_state=0)
    assert np.mean(np.abs(draws) > critical) == pytest.approx(0.8, abs=0.004)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert statistics.holm([0.6, math.nan, 0.9])[0::2] == pytest.approx([1.0, 1.0])
    assert math.isnan(statistics.holm([0.6, math.nan])[1])


def test_mcnemar_and_pass_at_k_by_hand():
    assert mcnemar_exact(1, 9) == 22 / 1024  # 2 (1 + 10) / 2^10
    assert [pass_at_k(8, 2, k) for k in (1, 4, 8)] == pytest.approx([0.25, 1 - 15 / 70, 1.0])  # C(6, 4) / C(8, 4)


def simulate(rng, effect=0.0, seeds=8, problems=300):
    """(S, P) differences with spread over seeds, over problems, and over both."""
    over_seeds, over_problems = rng.normal(0, 0.03, (seeds, 1)), rng.normal(0, 0.3, (1, problems))
    return effect + over_seeds + over_problems + rng.normal(0, 0.3, (seeds, problems))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(150):
        low, high = statistics.hierarchical_bootstrap(simulate(rng, effect=0.1), repeats=400)
        covered += low <= 0.1 <= high
    assert 0.87 <= covered / 150 <= 1.0  # eight seeds: a little narrow, as its docstring says


def test_bootstrap_is_seeded_and_wider_than_one_over_problems_alone():
    d = simulate(np.random.default_rng(2))
    found = statistics.hierarchical_bootstrap(d)
    assert found == statistics.hierarchical_bootstrap(d)
    alone = statistics.hierarchical_bootstrap(d.mean(0, keepdims=True))
    assert found[1] - found[0] > alone[1] - alone[0]
    with pytest.raises(ValueError, match=r"\(3,\).*row per seed"):
        statistics.hierarchical_bootstrap(np.zeros(3))
