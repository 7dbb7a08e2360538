"""How sure a score is: intervals of one score, and paired tests between two runs on the same problems. Standard library.

| question                                   | function                                      |
|--------------------------------------------|-----------------------------------------------|
| how far may chance move this accuracy?     | wilson_interval                               |
| do two runs on the same problems differ?   | mcnemar_exact, bootstrap_difference           |
| what difference could this test have seen? | minimum_detectable_difference                 |
| do two published scores differ?            | two_proportion (unpaired: needs far more)     |
| several samples a problem                  | pass_at_k, majority_vote                      |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist

from matrix_llm.base.statistics import wilson_interval

__all__ = [
    "bootstrap_difference",
    "majority_vote",
    "mcnemar_exact",
    "minimum_detectable_difference",
    "pass_at_k",
    "two_proportion",
    "wilson_interval",
]


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p value of McNemar's test: of the n problems that one run alone solves, does either run have too many?

    p = min(1, 2 P[Binomial(n, 1/2) <= min(only_a, only_b)]), summed in integers. No discordant problem gives 1.

    >>> mcnemar_exact(1, 9)
    0.021484375
    """
    for name, value in (("only_a", only_a), ("only_b", only_b)):
        if not _is_count(value):
            raise ValueError(f"{name}={value!r} is a number of problems: it must be an integer of 0 or more.")
    n = only_a + only_b
    term = tail = 1  # C(n, 0)
    for i in range(min(only_a, only_b)):
        term = term * (n - i) // (i + 1)  # C(n, i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def two_proportion(correct_a: int, total_a: int, correct_b: int, total_b: int) -> float:
    """Two-sided p value of the pooled z test between two scores on unpaired problems, as one can ask of two published numbers.

    >>> round(two_proportion(913, 1319, 954, 1319), 2)  # 69.2 and 72.3 on GSM8K
    0.08
    """
    _check_count(correct_a, total_a)
    _check_count(correct_b, total_b)
    pooled = (correct_a + correct_b) / (total_a + total_b)
    variance = pooled * (1 - pooled) * (1 / total_a + 1 / total_b)
    if variance == 0:  # both at 0, or both at 1
        return 1.0
    z = abs(correct_b / total_b - correct_a / total_a) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def bootstrap_difference(
    a: Sequence[float], b: Sequence[float], repeats: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(b) - mean(a) when problems are redrawn with replacement, both runs on the same draw.

    Args:
        a, b: one score a problem (0 or 1, or a mean over samples), in the same order.

    Redrawing n pairs is a multinomial draw over the distinct differences, so 10,000 repeats take milliseconds.
    """
    import numpy as np

    if len(a) != len(b) or not len(a):
        raise ValueError(
            f"{len(a)} scores against {len(b)}: a paired difference needs the same problems on both sides, at least one."
        )
    if not _is_count(repeats) or repeats == 0:
        raise ValueError(f"repeats={repeats!r} draws no sample: use a positive integer, such as 10000.")
    _two_sided_z(confidence)
    values, counts = np.unique(np.asarray(b, dtype=float) - np.asarray(a, dtype=float), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=repeats)  # (repeats, distinct values)
    low, high = np.quantile(draws @ values / len(a), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def minimum_detectable_difference(
    total: int, discordant_share: float, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Smallest true accuracy difference d that McNemar's test on `total` problems finds with probability `power`.

    Solves d sqrt(n) = z_a sqrt(s) + z_b sqrt(s - d^2), s = `discordant_share` the share of problems that one run alone solves
    (Connor 1987). A difference cannot exceed s: `inf` says that no difference at this s would be found.

    >>> round(minimum_detectable_difference(1319, 0.2), 4)  # 3.4 points on GSM8K
    0.0345
    """
    _check_count(0, total)
    if not 0 <= discordant_share <= 1:
        raise ValueError(f"discordant_share={discordant_share!r} is a share of the problems: it must lie in [0, 1].")
    if not 0.5 <= power < 1:
        raise ValueError(f"power={power!r} must lie in [0.5, 1): below one half the test misses more than it finds.")
    root = math.sqrt(discordant_share)
    z_a, z_b = _two_sided_z(confidence), NormalDist().inv_cdf(power)
    if discordant_share * math.sqrt(total) <= z_a * root + z_b * math.sqrt(discordant_share * (1 - discordant_share)):
        return math.inf
    # (x - A)^2 = z_b^2 (s - x^2/n) with x = d sqrt(n), A = z_a sqrt(s): the root at or above A
    scale, a = 1 + z_b * z_b / total, z_a * root
    x = (a + math.sqrt(a * a - scale * (a * a - z_b * z_b * discordant_share))) / scale
    return x / math.sqrt(total)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n samples of which c are (Chen et al. 2021, eq. 1).

    1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1}^{n} (1 - k/i); in integers, rounded once.

    >>> pass_at_k(10, 3, 1), round(pass_at_k(10, 3, 5), 4)
    (0.3, 0.9167)
    """
    _check_count(c, n)
    if not _is_count(k) or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} cannot be estimated from n={n} samples: k must lie between 1 and n. Draw more samples, or lower k."
        )
    drawn = math.comb(n, k)
    return (drawn - math.comb(n - c, k)) / drawn


def majority_vote(answers: Iterable[str | None], equal: Callable[[str, str], bool] | None = None) -> str | None:
    """The first spelling of the answer that most samples give; None entries do not vote, and without votes it is None.

    Equal strings are counted together first; then each distinct string joins the first cluster whose first spelling it is
    `equal` to. Ties go to the answer that appears first.

    >>> majority_vote(["1/2", "3", None, "0.5", "3", "1/2"], equal=lambda a, b: {a, b} == {"1/2", "0.5"})
    '1/2'
    """
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    clusters: dict[str, int] = {}
    for answer, count in votes.items():
        first = next((known for known in clusters if equal(known, answer)), answer) if equal else answer
        clusters[first] = clusters.get(first, 0) + count
    return max(clusters, key=lambda answer: clusters[answer], default=None)  # max keeps the first of equals


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_count(correct: int, total: int) -> None:
    if not (_is_count(correct) and _is_count(total)) or total == 0 or correct > total:
        raise ValueError(
            f"{correct!r} of {total!r} is no count of successes: both must be integers with 0 <= successes <= total, total >= 1."
        )


def _two_sided_z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie strictly between 0 and 1, such as 0.95.")
    return NormalDist().inv_cdf((1 + confidence) / 2)
