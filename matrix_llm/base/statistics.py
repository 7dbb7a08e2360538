"""How sure a proportion or a mean is. SciPy does the arithmetic, and is imported on the first call."""

import math


def _check_count(correct: int, total: int) -> None:
    for value in (correct, total):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{correct!r} of {total!r} is no count of successes: both must be integers.")
    if not 0 <= correct <= total or total == 0:
        raise ValueError(
            f"{correct!r} of {total!r} is no count of successes: they must lie in [0, total], and total must be at least 1."
        )


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
    if not 0 < confidence < 1 or math.isnan(confidence):
        raise ValueError(f"confidence={confidence!r} must lie strictly between 0 and 1, such as 0.95.")
    interval = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
