"""How sure a score is: intervals of one score, and tests between two runs. SciPy does the arithmetic, imported on the
first call.

| question                                   | function                                      |
|--------------------------------------------|-----------------------------------------------|
| how far can chance move this accuracy?     | wilson_interval; clustered_interval for       |
|                                            | several samples of each problem               |
| do two runs on the same problems differ?   | bootstrap_difference; mcnemar_exact, or       |
|                                            | sign_flip_test for several samples            |
| what difference could this test have seen? | minimum_detectable_difference                 |
| do two published scores differ?            | two_proportion (unpaired: needs far more)     |
| does one of several samples get it right?  | pass_at_k                                     |
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion p = correct / total (Wilson 1927), z the normal quantile of `confidence`:

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    The low end is exactly 0 at `correct` = 0, the high end exactly 1 at `correct` = `total`.

    Raises:
        ValueError: not 0 <= correct <= total with total >= 1, or `confidence` outside (0, 1).

    >>> [round(bound, 4) for bound in wilson_interval(913, 1319)]
    [0.6668, 0.7165]
    """
    from scipy.stats import binomtest

    _check_count(correct, total)
    _check_confidence(confidence)
    interval = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_interval(
    shares: Sequence[float], draws: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean share over problems, where the samples of one problem resemble each other.

    Wilson's interval at p = mean(shares) and at m / D problems, m being their number and D Kish's design effect (Dean
    & Pagano 2015): the variance of the shares over p(1-p), the variance of answers that are right or wrong as a whole.

        mean(1 / draws) <= D <= 1

    D is 1 where the samples of a problem are all right or all wrong, so that with one sample each this is
    `wilson_interval`; it is 1 / n where n samples are as good as n problems. It is estimated with two more problems,
    one always solved and one never: near 0 % and 100 %, where few problems show any variance, D stays near 1.

    Args:
        shares: of each problem, the share of its samples that are right, or another mean over them in [0, 1].
        draws: how many independent samples each share stands for, 1 or more: n, or n / k for pass@k.

    Raises:
        ValueError: no shares, a share outside [0, 1], or another number of draws.

    >>> [round(bound, 4) for bound in clustered_interval([0.75, 0.5, 1.0, 0.0, 0.25, 1.0], [4] * 6)]
    [0.2849, 0.831]
    """
    total = len(shares)
    if not total or len(draws) != total or not all(0 <= x <= 1 for x in shares) or not all(x >= 1 for x in draws):
        raise ValueError(
            f"{total} shares and {len(draws)} draws: there must be as many of both, at least one, the shares in [0, 1] "
            "and the draws 1 or more."
        )
    if all(share in (0, 1) for share in shares):  # D = 1
        return wilson_interval(int(sum(shares)), total, confidence)
    padded = [*shares, 0.0, 1.0]
    center = math.fsum(padded) / len(padded)
    variance = math.fsum((share - center) ** 2 for share in padded) / len(padded)
    least = math.fsum(1 / count for count in draws) / total
    effect = max(least, variance / (center * (1 - center)))  # both are 1 at most
    return _wilson(math.fsum(shares) / total, total / effect, confidence)


def _wilson(p: float, n: float, confidence: float) -> tuple[float, float]:
    """`wilson_interval` of p strictly between 0 and 1, where n is no integer."""
    from scipy.stats import norm

    _check_confidence(confidence)
    z = float(norm.ppf((1 + confidence) / 2))
    middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - width) / (1 + z * z / n)), min(1.0, (middle + width) / (1 + z * z / n))  # rounding


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p value of McNemar's test: of the n problems that only one run solves, does either run have too many?

    p = min(1, 2 P[Binomial(n, 1/2) <= min(only_a, only_b)]). With no such problem, p = 1. It is for one sample of each
    problem; `sign_flip_test` asks the same of several.

    Raises:
        ValueError: a count that is not an integer of 0 or more.

    >>> round(mcnemar_exact(1, 9), 6)
    0.021484
    """
    from scipy.stats import binomtest

    for name, value in (("only_a", only_a), ("only_b", only_b)):
        if not _is_count(value):
            raise ValueError(f"{name}={value!r} is a number of problems, so it must be an integer of 0 or more.")
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(min(only_a, only_b), only_a + only_b).pvalue)  # min: the same bits either way round


def two_proportion(correct_a: int, total_a: int, correct_b: int, total_b: int) -> float:
    """Two-sided p value of the pooled z test between two scores on unpaired problems.

    This is all that two published numbers allow. It is the same as Pearson's chi-square test of the table, without
    continuity correction.

    >>> round(two_proportion(913, 1319, 954, 1319), 2)  # 69.2 and 72.3 on GSM8K
    0.08
    """
    from scipy.stats import chi2_contingency

    _check_count(correct_a, total_a)
    _check_count(correct_b, total_b)
    if correct_a + correct_b in (0, total_a + total_b):  # all wrong, or all right: the table has an empty row
        return 1.0
    table = [[correct_a, total_a - correct_a], [correct_b, total_b - correct_b]]
    return float(chi2_contingency(table, correction=False).pvalue)


def bootstrap_difference(
    a: Sequence[float], b: Sequence[float], repeats: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(b) - mean(a) when problems are resampled, with the same draw for both runs.

    Args:
        a, b: one score per problem (0 or 1, or a mean over samples), in the same order.

    Redrawing n pairs is a multinomial draw over the distinct differences, so 10,000 repeats take milliseconds where
    scipy.stats.bootstrap would hold all draws.
    """
    import numpy as np

    _check_pairs(a, b, repeats)
    _check_confidence(confidence)
    values, counts = np.unique(np.asarray(b, dtype=float) - np.asarray(a, dtype=float), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=repeats)  # (repeats, distinct values)
    low, high = np.quantile(draws @ values / len(a), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_flip_test(a: Sequence[float], b: Sequence[float], repeats: int = 100_000, seed: int = 0) -> float:
    """Two-sided p value of mean(b) - mean(a) on the same problems: were it chance which run is which, how often would
    the difference be at least as large?

    The sign of each problem's difference is drawn `repeats` times; p = (1 + draws at least as large) / (1 + repeats).
    Differences of 0 and 1 alone are what `mcnemar_exact` counts without drawing.

    Args:
        a, b: one score per problem (0 or 1, or a mean over samples), in the same order.

    >>> 0.018 < sign_flip_test([1] + [0] * 9, [0] + [1] * 9) < 0.025  # mcnemar_exact(1, 9) is 0.0215
    True
    """
    import numpy as np

    _check_pairs(a, b, repeats)
    differences = (np.asarray(b, dtype=float) - np.asarray(a, dtype=float)).round(9)  # 1/3 and 2/3 - 1/3 are one value
    values, counts = np.unique(np.abs(differences), return_counts=True)
    random = np.random.default_rng(seed)
    sums = np.zeros(repeats)
    for value, count in zip(values[values > 0], counts[values > 0], strict=True):  # a binomial draw each, as above
        sums += value * (2 * random.binomial(count, 0.5, size=repeats) - count)
    at_least = np.abs(sums) >= abs(differences.sum()) - 1e-6
    return float((1 + at_least.sum()) / (1 + repeats))


def minimum_detectable_difference(
    total: int, discordant_share: float, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Smallest true accuracy difference d that McNemar's test on `total` problems finds with probability `power`.

    Solves d sqrt(n) = z_a sqrt(s) + z_b sqrt(s - d^2), where s = `discordant_share` is the share of problems that one
    run alone solves (Connor 1987). A difference cannot exceed s: `inf` means that no difference at this s would be
    found.

    >>> round(minimum_detectable_difference(1319, 0.2), 4)  # 3.4 points on GSM8K
    0.0345
    """
    from scipy.stats import norm

    _check_count(0, total)
    _check_confidence(confidence)
    if not 0 <= discordant_share <= 1:
        raise ValueError(f"discordant_share={discordant_share!r} is a share of the problems: it must lie in [0, 1].")
    if not 0.5 <= power < 1:
        raise ValueError(f"power={power!r} must lie in [0.5, 1): below one half the test misses more than it finds.")
    z_a, z_b = float(norm.ppf((1 + confidence) / 2)), float(norm.ppf(power))
    root = math.sqrt(discordant_share)
    largest = z_a * root + z_b * math.sqrt(discordant_share * (1 - discordant_share))  # the right side at d = s
    if discordant_share * math.sqrt(total) <= largest:
        return math.inf
    # squared, with x = d sqrt(n) and A = z_a sqrt(s): (x - A)^2 = z_b^2 (s - x^2/n); the root at or above A counts
    scale, a = 1 + z_b * z_b / total, z_a * root
    x = (a + math.sqrt(a * a - scale * (a * a - z_b * z_b * discordant_share))) / scale
    return x / math.sqrt(total)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples of which c are (Chen et al.
    2021, eq. 1).

    1 - C(n-c, k) / C(n, k), in integers and rounded once: exact where floats would overflow.

    >>> pass_at_k(10, 3, 1), round(pass_at_k(10, 3, 5), 4)
    (0.3, 0.9167)
    """
    _check_count(c, n)
    if not _is_count(k) or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} cannot be estimated from n={n} samples: k must lie between 1 and n. Draw more samples, "
            "or lower k."
        )
    drawn = math.comb(n, k)
    return (drawn - math.comb(n - c, k)) / drawn


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_count(correct: int, total: int) -> None:
    if not (_is_count(correct) and _is_count(total)) or total == 0 or correct > total:
        raise ValueError(
            f"{correct!r} of {total!r}: both must be integers, with 0 <= successes <= total and at least 1 in total."
        )


def _check_pairs(a: Sequence[float], b: Sequence[float], repeats: int) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(
            f"{len(a)} scores against {len(b)}: a paired difference needs the same problems on both sides, "
            "at least one."
        )
    if not _is_count(repeats) or repeats == 0:
        raise ValueError(f"repeats={repeats!r} draws no sample: use a positive integer, such as 10000.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie strictly between 0 and 1, such as 0.95.")
