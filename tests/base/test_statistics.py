"""The statistics of scores against scipy, direct formulas, and the figures by which the paper's scores are judged."""

import doctest
import math
import random
from statistics import NormalDist

import pytest

from matrix_llm.base import statistics
from matrix_llm.base.statistics import (
    bootstrap_difference,
    clustered_interval,
    mcnemar_exact,
    minimum_detectable_difference,
    pass_at_k,
    sign_flip_test,
    two_proportion,
    wilson_interval,
)

AWKWARD = [(0, 1), (1, 1), (0, 7), (7, 7), (1, 3), (1, 1319), (1318, 1319), (913, 1319), (1510, 5000), (1, 10**6)]


def test_the_docstrings_are_true():
    result = doctest.testmod(statistics)
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.parametrize(("correct", "total"), AWKWARD)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_is_scipys(correct, total, confidence):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, total, confidence) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_is_a_published_value_and_one_computed_by_hand():
    """By hand for 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.71674, radius
    1.96 sqrt(0.016 + 0.009604) / 1.38415 = 0.22657.
    """
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I, method 3
    assert wilson_interval(8, 10) == pytest.approx((0.49017, 0.94331), abs=2e-4)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 30, 1319, 10**6])
def test_wilson_ends_are_exact_at_none_and_all_and_hold_the_share_between(total):
    assert wilson_interval(0, total)[0] == 0.0
    assert wilson_interval(total, total)[1] == 1.0
    for correct in {0, 1, total // 2, total}:
        low, high = wilson_interval(correct, total)
        assert 0 <= low <= correct / total <= high <= 1
        mirrored = wilson_interval(total - correct, total)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


SHARES = {
    "one problem": ([0.25], [4]),
    "one problem, every second sample": ([0.5], [2]),
    "alike": ([0.5] * 40, [4] * 40),  # fewer differences than chance gives: n samples are no more than n problems
    "almost none": ([0.25, *[0] * 99], [4] * 100),
    "almost all": ([0.75, *[1] * 99], [4] * 100),
    "mixed": ([0, 0.25, 0.5, 0.75, 1] * 9, [4] * 45),
    "unequal numbers of samples": ([1, 1 / 3, 0.5, 0.875, 0], [1, 3, 2, 8, 5]),
    "pass@3 of 4": ([0, 0.75, 1, 1, 1] * 5, [4 / 3] * 25),
}


@pytest.mark.parametrize(("shares", "draws"), SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_clustered_interval_is_the_score_interval_at_the_effective_number_of_problems(shares, draws, confidence):
    """Both ends solve |mean - p| = z sqrt(p (1 - p) D / m): by SciPy's root finder, with numpy's variance."""
    optimize, np = pytest.importorskip("scipy.optimize"), pytest.importorskip("numpy")
    padded = np.array([*shares, 0, 1])
    effect = np.var(padded) / (padded.mean() * (1 - padded.mean()))
    effect = np.clip(effect, np.mean(1 / np.array(draws)), 1)
    mean, m, z = np.mean(shares), len(shares), NormalDist().inv_cdf((1 + confidence) / 2)

    def distance(p):
        return abs(mean - p) - z * math.sqrt(p * (1 - p) * effect / m)

    low, high = clustered_interval(shares, draws, confidence)
    assert low == pytest.approx(optimize.brentq(distance, 1e-15, mean), abs=1e-9)
    assert high == pytest.approx(optimize.brentq(distance, mean, 1 - 1e-15), abs=1e-9)
    assert 0 <= low < mean < high <= 1


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 7), (7, 7), (1, 3), (5, 9), (913, 1319)])
@pytest.mark.parametrize("samples", [1, 4])
def test_where_the_samples_of_a_problem_agree_the_clustered_interval_is_wilsons(correct, total, samples):
    shares = [1.0] * correct + [0.0] * (total - correct)
    assert clustered_interval(shares, [samples] * total) == wilson_interval(correct, total)


@pytest.mark.parametrize("name", ["one problem", "alike", "almost none", "almost all", "mixed"])
def test_the_clustered_interval_lies_between_those_of_all_samples_and_of_as_many_problems(name):
    shares, draws = SHARES[name]
    low, high = clustered_interval(shares, draws)
    mean = sum(shares) / len(shares)
    for count, sign in ((len(shares), 1), (sum(draws), -1)):
        z2 = NormalDist().inv_cdf(0.975) ** 2 / count
        width = 2 * math.sqrt(z2 * mean * (1 - mean) + z2 * z2 / 4) / (1 + z2)
        assert sign * (high - low) <= sign * width + 1e-9


def test_one_right_sample_among_hundreds_moves_the_interval_little():
    """At 0 of 400 samples the interval is that of 100 problems; it must not shrink to that of 400 at the next one."""
    none, one = clustered_interval([0.0] * 100, [4] * 100), clustered_interval([0.25] + [0.0] * 99, [4] * 100)
    assert none[0] == 0 < one[0]
    assert abs(one[1] - none[1]) < 0.005
    assert one[1] > 2 * wilson_interval(1, 400)[1]


@pytest.mark.parametrize("share", [2.0**-53, 2.0**-40, 1 - 2.0**-40, 1 - 2.0**-53])
def test_rounding_does_not_take_the_interval_over_its_bounds(share):
    for total in range(1, 60):
        low, high = clustered_interval([share] + [float(share > 0.5)] * (total - 1), [4] * total)
        assert 0 <= low < high <= 1


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.1, 1.9), (50, 50)])
def test_the_clustered_interval_covers_the_truth_where_that_of_all_samples_does_not(a, b):
    """Simulated: 400 runs of 40 problems with 8 samples; a problem's chance to be solved is drawn from Beta(a, b)."""
    np = pytest.importorskip("numpy")
    random_numbers, truth, covered, naive = np.random.default_rng(1), a / (a + b), 0, 0
    for _ in range(400):
        right = random_numbers.binomial(8, random_numbers.beta(a, b, 40))
        low, high = clustered_interval((right / 8).tolist(), [8] * 40)
        covered += low <= truth <= high
        low, high = wilson_interval(int(right.sum()), 320)
        naive += low <= truth <= high
    assert covered / 400 >= 0.93
    assert naive / 400 < 0.8 or a == 50  # problems that are all alike do not cluster


@pytest.mark.parametrize(
    ("shares", "draws"), [([], []), ([0.5], [1, 2]), ([1.5], [2]), ([-0.1], [2]), ([0.5], [0.5]), ([math.nan], [2])]
)
def test_the_clustered_interval_refuses_what_is_no_share(shares, draws):
    with pytest.raises(ValueError, match=r"shares.*draws.*in \[0, 1\]"):
        clustered_interval(shares, draws)


@pytest.mark.parametrize("bad", [(1, 0), (0, 0), (-1, 5), (6, 5), (0.5, 5), (2, 5.0), (True, 5), ("3", 5), (3, -5)])
def test_wilson_refuses_what_is_no_count(bad):
    with pytest.raises(ValueError, match=r"both must be integers.*successes.*total"):
        wilson_interval(*bad)


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 95])
def test_wilson_refuses_a_confidence_that_is_no_share(confidence):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        wilson_interval(1, 2, confidence)


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (0, 1), (1, 1), (0, 10), (3, 17), (17, 3), (100, 101), (2500, 2400), (0, 2000), (331, 412)]
)
def test_mcnemar_is_scipys_binomial_test(a, b):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_is_symmetric_never_above_one_and_refuses_what_is_no_count():
    for a in range(12):
        for b in range(12):
            assert mcnemar_exact(a, b) == mcnemar_exact(b, a) <= 1
    for bad in ((-1, 3), (1.0, 3), (3, None)):
        with pytest.raises(ValueError, match="number of problems"):
            mcnemar_exact(*bad)


def test_the_papers_improvements_are_within_chance_when_unpaired():
    assert round(two_proportion(round(0.692 * 1319), 1319, round(0.723 * 1319), 1319), 2) == 0.08
    assert round(two_proportion(1500, 5000, 1510, 5000), 2) == 0.83


@pytest.mark.parametrize(
    "counts", [(913, 1319, 954, 1319), (3, 7, 900, 2000), (1, 2, 1, 2), (0, 5, 5, 5), (499, 500, 4000, 5000)]
)
def test_two_proportion_squared_is_the_pearson_chi_square(counts):
    scipy_stats = pytest.importorskip("scipy.stats")
    a, n, b, m = counts
    expected = scipy_stats.chi2_contingency([[a, n - a], [b, m - b]], correction=False).pvalue
    assert two_proportion(a, n, b, m) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", [(0, 5, 0, 9), (5, 5, 9, 9)])
def test_two_perfect_or_two_empty_scores_do_not_differ(counts):
    assert two_proportion(*counts) == 1.0


def test_the_same_improvement_is_significant_when_paired_and_not_when_unpaired():
    a = [1] * 913 + [0] * 406  # 69.2 %
    b = [1] * 954 + [0] * 365  # 72.3 %, solves all that a solves
    assert two_proportion(sum(a), 1319, sum(b), 1319) > 0.05
    assert mcnemar_exact(0, 41) < 1e-9
    low, high = bootstrap_difference(a, b)
    assert 0 < low < 41 / 1319 < high


def test_the_bootstrap_is_the_resampling_of_pairs():
    """Against the plain loop: draw problems with replacement, take the difference of the two means on the draw."""
    draw = random.Random(1)
    a = [draw.randint(0, 1) for _ in range(83)]
    b = [x if draw.random() < 0.7 else draw.randint(0, 1) for x in a]
    pairs = list(zip(a, b, strict=True))
    differences = sorted(sum(y - x for x, y in draw.choices(pairs, k=83)) / 83 for _ in range(4000))
    low, high = bootstrap_difference(a, b)
    assert low == pytest.approx(differences[100], abs=1.5 / 83)
    assert high == pytest.approx(differences[3900], abs=1.5 / 83)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_on_many_problems_the_bootstrap_is_the_normal_interval(confidence):
    """Of 10,000 problems A alone solves 1,000 and B alone 1,500: variance of one difference 0.25 - 0.05^2."""
    a, b = [1] * 1000 + [0] * 9000, [0] * 1000 + [1] * 1500 + [0] * 7500
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt((0.25 - 0.05**2) / 10_000)
    low, high = bootstrap_difference(a, b, confidence=confidence, repeats=40_000)
    assert (low, high) == pytest.approx((0.05 - half, 0.05 + half), abs=0.05 * half)


def test_the_bootstrap_repeats_with_its_seed_narrows_with_more_problems_and_takes_shares():
    a, b = [0, 1, 1, 0, 1, 0, 0] * 11, [1, 1, 0, 0, 1, 1, 0] * 11
    assert bootstrap_difference(a, b, seed=3) == bootstrap_difference(a, b, seed=3)
    assert bootstrap_difference(a, a) == (0.0, 0.0)
    assert bootstrap_difference([0], [1]) == (1.0, 1.0)
    width = [high - low for low, high in (bootstrap_difference(a * m, b * m) for m in (1, 16))]
    assert width[1] == pytest.approx(width[0] / 4, rel=0.1)
    low, high = bootstrap_difference([0.25, 0.5, 0.75] * 20, [0.5, 0.5, 1.0] * 20)
    assert 0 < low < 1 / 6 < high < 0.25
    assert low == pytest.approx(-bootstrap_difference([0.5, 0.5, 1.0] * 20, [0.25, 0.5, 0.75] * 20)[1], abs=0.01)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 0])])
def test_the_bootstrap_needs_pairs(a, b):
    with pytest.raises(ValueError, match="same problems on both sides"):
        bootstrap_difference(a, b)


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_flip_test_is_scipys_permutation_test_of_pairs(seed):
    stats, np = pytest.importorskip("scipy.stats"), pytest.importorskip("numpy")
    draw = np.random.default_rng(seed)
    a, b = draw.integers(0, 5, 12) / 4, draw.integers(0, 4, 12) / 3
    exact = stats.permutation_test(
        (b, a), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=5000,
        vectorized=True,
    ).pvalue  # fmt: skip
    assert sign_flip_test(a, b) == pytest.approx(exact, abs=0.006)
    assert sign_flip_test(b, a) == sign_flip_test(a, b)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 12), (1, 9), (0, 20), (7, 7), (40, 41)])
def test_the_sign_flip_test_of_single_samples_is_mcnemars(only_a, only_b):
    a = [1] * only_a + [0] * only_b + [1] * 50
    b = [0] * only_a + [1] * only_b + [1] * 50
    assert sign_flip_test(a, b) == pytest.approx(mcnemar_exact(only_a, only_b), abs=0.006)


def test_the_sign_flip_test_of_differences_that_only_rounding_makes_is_one():
    thirds = [1 / 3, 2 / 3, 1.0] * 10
    assert sign_flip_test(thirds, [1 - 2 / 3, 1 - 1 / 3, 3 * (1 / 3)] * 10) == 1.0
    with pytest.raises(ValueError, match="same problems on both sides"):
        sign_flip_test([1], [1, 0])


@pytest.mark.parametrize(("total", "share"), [(1319, 0.2), (500, 0.11), (5000, 0.35), (97, 0.6)])
def test_a_difference_of_the_detectable_size_is_detected_four_times_in_five(total, share):
    """Simulated: McNemar's z over 40,000 runs whose true difference is the one returned."""
    np = pytest.importorskip("numpy")
    difference = minimum_detectable_difference(total, share)
    chances = [(share + difference) / 2, (share - difference) / 2, 1 - share]
    draws = np.random.default_rng(0).multinomial(total, chances, size=40_000)
    b, a = draws[:, 0], draws[:, 1]
    found = np.abs(b - a) / np.sqrt(np.maximum(a + b, 1)) > 1.959964
    assert found.mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("total", "share", "power"), [(1319, 0.2, 0.8), (31, 0.9, 0.9), (97, 0.6, 0.5), (12, 1.0, 0.8)]
)
def test_the_detectable_difference_solves_its_equation(total, share, power):
    d = minimum_detectable_difference(total, share, power)
    z = NormalDist().inv_cdf
    assert d * math.sqrt(total) == pytest.approx(
        z(0.975) * math.sqrt(share) + z(power) * math.sqrt(share - d * d), abs=1e-12
    )


def test_detectable_differences_shrink_with_problems_and_power_and_never_exceed_the_discordant_share():
    sizes = [minimum_detectable_difference(n, 0.2) for n in (100, 1319, 5000, 10**6)]
    assert sizes == sorted(sizes, reverse=True)
    assert minimum_detectable_difference(1319, 0.2, power=0.9) > minimum_detectable_difference(1319, 0.2, power=0.5)
    assert minimum_detectable_difference(1319, 0.2, power=0.5) == pytest.approx(
        1.959964 * math.sqrt(0.2 / 1319), rel=1e-6
    )
    assert minimum_detectable_difference(100, 0.0) == math.inf
    assert minimum_detectable_difference(3, 0.5) == math.inf  # three problems can show nothing
    for n in (7, 30, 500):
        for share in (0.02, 0.1, 0.5, 1.0):
            found = minimum_detectable_difference(n, share)
            assert found == math.inf or 0 < found <= share
    for bad in ((0, 0.1), (10, -0.1), (10, 1.1), (10, 0.1, 0.3), (10, 0.1, 1.0)):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            minimum_detectable_difference(*bad)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 3), (10, 10, 4), (10, 0, 10), (64, 1, 64), (200, 7, 100), (7, 5, 3)]
)
def test_pass_at_k_is_the_published_product(n, c, k):
    product = 1.0 if n - c < k else 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)


def test_pass_at_k_is_exact_where_the_product_underflows_and_comb_overflows_floats():
    assert pass_at_k(3000, 1, 1500) == 0.5
    assert pass_at_k(3000, 3, 1) == 0.001
    assert pass_at_k(64, 63, 2) == 1.0


def test_pass_at_k_is_the_mean_over_all_draws_of_k():
    from itertools import combinations

    right = [True, False, False, True, False, False]
    for k in range(1, 7):
        draws = [any(draw) for draw in combinations(right, k)]
        assert pass_at_k(6, 2, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (0, 0, 1), (4, -1, 1), (4, 1, 1.0)])
def test_pass_at_k_refuses_what_cannot_be_estimated(n, c, k):
    with pytest.raises(ValueError, match=r"pass@|both must be integers"):
        pass_at_k(n, c, k)
