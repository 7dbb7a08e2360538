"""The statistics of the study; SciPy does the arithmetic.

| question                                                   | function                             |
|------------------------------------------------------------|--------------------------------------|
| does the mean difference over seeds differ from 0?         | paired_t, sign_flip                  |
| how far can seeds and problems, both redrawn, move it?     | hierarchical_bootstrap               |
| what true difference would have been found?                | minimum_detectable_effect            |
| several contrasts at once                                  | holm                                 |
| do two runs of one seed differ on the same problems?       | eval.statistics.mcnemar_exact        |

Legend: S seeds, P problems, R bootstrap draws. Differences are always "arm minus its reference".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import nct, ttest_1samp
from scipy.stats import t as student

Floats = NDArray[Any]


@dataclass(frozen=True)
class PairedTest:
    """A mean of paired differences over seeds. All but `mean` and `seeds` are NaN with fewer than two seeds."""

    mean: float
    """Mean difference."""
    sd: float
    """Standard deviation over seeds."""
    low: float
    """Lower end of the t interval of the mean."""
    high: float
    """Upper end of the t interval."""
    p: float
    """Two-sided p value of the t test."""
    seeds: int
    """Number of seeds."""


def paired_t(differences: Sequence[float], confidence: float = 0.95) -> PairedTest:
    """Two-sided t test of mean(differences) = 0. Without any spread p is 1 if all are 0, and 0 otherwise.

    >>> round(paired_t([1.0, 2.0, 3.0]).p, 4)
    0.0742
    """
    d = np.asarray(differences, dtype=float)
    mean = float(np.mean(d)) if len(d) else math.nan
    if len(d) < 2:
        return PairedTest(mean, math.nan, math.nan, math.nan, math.nan, len(d))
    sd = float(np.std(d, ddof=1))
    if sd == 0:  # the statistic would be 0 / 0 or infinite
        return PairedTest(mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0, len(d))
    test = ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(confidence)
    return PairedTest(mean, sd, float(low), float(high), float(test.pvalue), len(d))


def sign_flip(differences: Sequence[float], repeats: int = 100_000, seed: int = 0) -> float:
    """Two-sided permutation p: without an effect each seed's difference could as well have the other sign.

    All 2^S sign patterns up to S = 16, otherwise the observed one and `repeats` random ones. With all of them p
    cannot be below 2 / 2^S: 0.0625 at S = 5.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    d = np.asarray(differences, dtype=float)
    if len(d) <= 16:
        signs = 1 - 2 * (
            (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        )  # (2^S, S), the observed pattern first
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (repeats, len(d)))
        signs = np.vstack([np.ones(len(d)), 1 - 2 * drawn])
    sums = np.abs(signs @ d)
    # Accuracies tie up to rounding, and rounding is as large as the accuracies, not as their mean difference. SciPy's
    # permutation_test forgives rounding of the mean difference alone, and so counts some ties as smaller.
    return float(np.mean(sums >= sums[0] - 1e-12 * max(1.0, sums[0])))


def minimum_detectable_effect(sd: float, seeds: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean difference that the paired t test over `seeds` finds with probability `power`.

    Under a true difference d the statistic has a noncentral t distribution with S - 1 degrees of freedom and
    noncentrality d sqrt(S) / sd; the noncentrality with the wanted power is found by root finding.

    Args:
        sd: standard deviation of the differences over seeds.

    >>> round(minimum_detectable_effect(1.0, 5), 3)  # with five seeds: 1.68 standard deviations
    1.682
    """
    if seeds < 2 or not math.isfinite(sd):
        return math.nan
    df = seeds - 1
    critical = student.ppf(1 - alpha / 2, df)

    def excess(noncentrality: float) -> float:
        # P(T < -critical) as the upper tail of the mirrored distribution: SciPy's nct.cdf is NaN in its far lower tail
        found = nct.sf(critical, df, noncentrality) + nct.sf(critical, df, -noncentrality)
        return float(found) - power

    high = 1.0
    while excess(high) < 0:
        high *= 2
    return brentq(excess, 0.0, high, xtol=1e-10) * sd / math.sqrt(seeds)


def hierarchical_bootstrap(
    differences: Floats,  # (S, P) score of the arm minus its reference's, one row per seed, the same problems in each
    repeats: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean difference when seeds and problems are both redrawn with replacement.

    The design is crossed (all seeds meet the same problems), so a draw takes S seeds and P problems and uses their
    full product. Draws, as counts, are multinomial, and the mean is counts_S^T D counts_P / (S P). Problems with the
    same S differences are drawn as one kind, of which there are few: 3^S at most.

    With few seeds it is too narrow by about sqrt((S - 1) / S), which is why no verdict rests on it alone.
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim != 2 or not d.size:
        raise ValueError(f"differences has shape {d.shape}: give one row per seed and one column per problem.")
    rng, (S, P) = np.random.default_rng(seed), d.shape
    kinds, counts = np.unique(d, axis=1, return_counts=True)  # (S, kinds)
    problems = rng.multinomial(P, counts / P, size=repeats)  # (R, kinds)
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=repeats)  # (R, S)
    means = ((problems @ kinds.T) * seeds).sum(1) / (S * P)  # (R,)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (Holm 1979), in the order given; NaN stays NaN and does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
