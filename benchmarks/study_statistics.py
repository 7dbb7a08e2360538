"""The statistics of the controlled study, numpy and eval/statistics.py alone.

| question                                                   | function                             |
|------------------------------------------------------------|--------------------------------------|
| does the mean difference over seeds differ from 0?         | paired_t, sign_flip                  |
| how far may seeds and problems, both redrawn, move it?     | hierarchical_bootstrap               |
| what true difference would have been found?                | minimum_detectable_effect            |
| several contrasts at once                                  | holm                                 |
| do two runs of one seed differ on the same problems?       | eval.statistics.mcnemar_exact        |
| pass@k of one problem's samples                            | eval.statistics.pass_at_k            |
| is a confidence of 0.8 right 8 times in 10?                | expected_calibration_error           |
| do samples of one problem differ?                          | distinct_n, distinct_answers         |

Legend: S seeds, P problems, R bootstrap draws. Differences are always "arm minus its reference".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)
BINS = 15
SAMPLES, TEMPERATURE = 8, 0.7  # of a problem, for pass@k and distinct-n


def _integral(f: Any, low: float, high: float) -> float:
    """Gauss-Legendre with 400 nodes: to rounding for the smooth densities here."""
    half = (high - low) / 2
    return float(half * np.dot(WEIGHTS, f(half * NODES + (high + low) / 2)))


# --- Student's t ---------------------------------------------------------------------------------------------------------


def t_two_sided(t: float, df: int) -> float:
    """P(|T| > |t|), T Student with `df` degrees of freedom. With t = sqrt(df) tan(a) the density becomes cos(a)^(df - 1).

    >>> round(t_two_sided(2.7764451, 4), 6)
    0.05
    """
    if df < 1:
        raise ValueError(f"df={df}: a t test needs two seeds or more.")
    if math.isinf(t):
        return 0.0
    angle = math.atan(abs(t) / math.sqrt(df))
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return min(1.0, 2 * scale * _integral(lambda a: np.cos(a) ** (df - 1), angle, math.pi / 2))


def t_quantile(confidence: float, df: int) -> float:
    """The t with P(|T| <= t) = `confidence`, by bisection."""
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 1 - confidence else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Paired:
    """A mean of paired differences over seeds, with its 95 % t interval. p, low and high are NaN with fewer than two seeds."""

    mean: float
    sd: float
    low: float
    high: float
    p: float
    seeds: int


def paired_t(differences: Sequence[float], alpha: float = 0.05) -> Paired:
    """Two-sided t test of mean(differences) = 0. Without any spread p is 1 where all are 0, else 0.

    >>> paired_t([1.0, 2.0, 3.0]).p.__round__(4)
    0.0742
    """
    d = np.asarray(differences, dtype=float)
    n, mean = len(d), float(np.mean(d)) if len(d) else math.nan
    if n < 2:
        return Paired(mean, math.nan, math.nan, math.nan, math.nan, n)
    sd = float(np.std(d, ddof=1))
    error = sd / math.sqrt(n)
    if error == 0:
        return Paired(mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0, n)
    radius = t_quantile(1 - alpha, n - 1) * error
    return Paired(mean, sd, mean - radius, mean + radius, t_two_sided(mean / error, n - 1), n)


def sign_flip(differences: Sequence[float], repeats: int = 100_000, seed: int = 0) -> float:
    """Two-sided permutation p: under no effect each seed's difference is as likely to have the other sign.

    All 2^S sign patterns up to S = 16, else `repeats` random ones and the observed one. It cannot be below 2 / 2^S: 0.0625 at S = 5.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    d = np.asarray(differences, dtype=float)
    if len(d) <= 16:
        signs = 1 - 2 * (
            (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        )  # (2^S, S); the first row is the observed one
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (repeats, len(d)))
        signs = np.vstack([np.ones(len(d)), 1 - 2 * drawn])
    sums = np.abs(signs @ d)
    return float(np.mean(sums >= sums[0] - 1e-12 * max(1.0, sums[0])))


def minimum_detectable_effect(sd: float, seeds: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean difference that the paired t test over `seeds` finds with probability `power`, differences spreading by `sd`.

    Exact: T has a noncentral t distribution. With s = sqrt(chi^2_df / df), power(d) = E_s[Phi(d - t_c s) + Phi(-d - t_c s)], d = effect
    sqrt(S) / sd.

    >>> round(minimum_detectable_effect(1.0, 5), 3)  # with five seeds: 1.68 standard deviations
    1.682
    """
    if seeds < 2 or not math.isfinite(sd):
        return math.nan
    df = seeds - 1
    critical = t_quantile(1 - alpha, df)
    normal = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    log_scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)

    def chance(d: float) -> float:
        def integrand(s: Floats) -> Floats:
            density = np.exp(log_scale + (df - 1) * np.log(s) - df * s * s / 2)
            return density * (normal(d - critical * s) + normal(-d - critical * s))

        return _integral(integrand, 0.0, 1 + 8 / math.sqrt(df))

    low, high = 0.0, 1.0
    while chance(high) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) < power else (low, middle)
    return (low + high) / 2 * sd / math.sqrt(seeds)


# --- over seeds and problems -----------------------------------------------------------------------------------------------


def hierarchical_bootstrap(
    differences: Floats,  # (S, P) score of the arm minus its reference's, one row a seed, the same problems in each
    repeats: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean difference when seeds and problems are both redrawn with replacement.

    The design is crossed (all seeds meet the same problems), so a draw takes S seeds and P problems and uses their whole product:
    draws, as counts, are multinomial, and the mean is counts_S^T D counts_P / (S P). Problems with the same S differences are drawn as
    one kind, of which there are few: 3^S at most.
    With few seeds it is too narrow by about sqrt((S - 1) / S), which is why no verdict rests on it alone.
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim != 2 or not d.size:
        raise ValueError(
            f"differences are {d.shape}: give one row a seed and one column a problem, at least one of each."
        )
    rng, (S, P) = np.random.default_rng(seed), d.shape
    kinds, counts = np.unique(d, axis=1, return_counts=True)  # (S, kinds)
    problems = rng.multinomial(P, counts / P, size=repeats)  # (R, kinds)
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=repeats)  # (R, S)
    means = ((problems @ kinds.T) * seeds).sum(1) / (S * P)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given; NaN stays NaN and does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# --- calibration and diversity -----------------------------------------------------------------------------------------------


def expected_calibration_error(
    confidences: Sequence[float] | Floats, correct: Sequence[bool] | Floats, bins: int = BINS
) -> float:
    """ECE = sum_b n_b / n |accuracy_b - confidence_b| over equal-width bins ((b - 1) / bins, b / bins]; NaN without predictions.

    >>> expected_calibration_error([0.75, 0.75, 0.75, 0.75], [True, True, True, False])
    0.0
    """
    c, right = np.asarray(confidences, dtype=float), np.asarray(correct, dtype=float)
    if len(c) != len(right):
        raise ValueError(f"{len(c)} confidences against {len(right)} verdicts: one of each is needed for a prediction.")
    if not len(c):
        return math.nan
    place = np.clip(np.ceil(c * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - c, minlength=bins)
    return float(np.abs(gaps).sum() / len(c))


def distinct_n(responses: Sequence[str], n: int) -> float:
    """Share of different ones among all n-grams of words of one problem's responses; NaN where all are shorter than n words.

    >>> distinct_n(["a b c", "a b d"], 2)
    0.75
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, responses) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def distinct_answers(answers: Sequence[str | None]) -> float:
    """Different final answers among one problem's samples, as a share of the samples; no answer counts as one.

    >>> distinct_answers(["7", "7", None, "8"])
    0.75
    """
    return len(set(answers)) / len(answers)
