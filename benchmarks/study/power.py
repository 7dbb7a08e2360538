"""What a study could have found: power, equivalence, and how many seeds or problems a question needs.

| question                                                          | function               |
|-------------------------------------------------------------------|------------------------|
| how probably is a true difference found?                          | power_of_t             |
| how well is the detectable difference itself known?               | detectable_interval    |
| is the difference small enough to be called equal?                | equivalence            |
| how many seeds show that it is?                                   | seeds_for_equivalence  |
| what is the paper's gain at another base accuracy?                | paper_gain             |
| how many problems find a gain between two single runs?            | problems_for_mcnemar   |

Legend: S seeds. Differences are "arm minus its reference"; the standard deviation `sd` is that of one seed's
difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.integrate import quad
from scipy.stats import chi, chi2, nct, norm
from scipy.stats import t as student

from benchmarks.study.design import ALPHA
from benchmarks.study.statistics import minimum_detectable_effect, paired_t

PAPER_CE, PAPER_MCE = 0.692, 0.723  # Llemma-7B's accuracy on GSM8K, Table 7


def power_of_t(effect: float, sd: float, seeds: int, alpha: float = ALPHA) -> float:
    """The probability that the two-sided paired t test over `seeds` finds a true mean difference of `effect`.

    >>> round(power_of_t(1.682, 1.0, 5), 2)  # the inverse of minimum_detectable_effect
    0.8
    """
    if seeds < 2 or not sd > 0:
        return math.nan
    df, noncentrality = seeds - 1, abs(effect) * math.sqrt(seeds) / sd
    critical = student.ppf(1 - alpha / 2, df)
    return float(nct.sf(critical, df, noncentrality) + nct.sf(critical, df, -noncentrality))


def detectable_interval(
    sd: float, seeds: int, power: float = 0.8, alpha: float = ALPHA, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the detectable difference, which is a multiple of a spread estimated from few seeds.

    (S - 1) sd^2 / sigma^2 has a chi-square distribution with S - 1 degrees of freedom, if the differences are normal.

    >>> [round(end, 2) for end in detectable_interval(1.0, 5)]  # 1.68 times the spread, which is this uncertain
    [1.01, 4.83]
    """
    detectable = minimum_detectable_effect(sd, seeds, power, alpha)
    if math.isnan(detectable):
        return math.nan, math.nan
    tails = (1 + confidence) / 2, (1 - confidence) / 2
    low, high = (detectable * math.sqrt((seeds - 1) / chi2.ppf(tail, seeds - 1)) for tail in tails)
    return float(low), float(high)


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided t tests (TOST, Schuirmann 1987): is the true mean difference within +-margin?"""

    margin: float
    """The largest difference that counts as equal; stated before the data are seen."""
    low: float
    """Lower end of the interval with confidence 1 - 2 alpha."""
    high: float
    """Its upper end."""
    p: float
    """The larger of the two one-sided p values. NaN with fewer than two seeds."""

    @property
    def equal(self) -> bool:
        """p < alpha, which is the same as: the interval lies within the margin."""
        return -self.margin < self.low and self.high < self.margin


def equivalence(differences: Sequence[float], margin: float, alpha: float = ALPHA) -> Equivalence:
    """TOST of |mean(differences)| < margin.

    >>> equivalence([0.1, -0.1, 0.0, 0.05], margin=0.5).equal
    True
    """
    test = paired_t(differences, 1 - 2 * alpha)
    if test.seeds < 2:
        return Equivalence(margin, math.nan, math.nan, math.nan)
    error = test.sd / math.sqrt(test.seeds)
    if error == 0:
        return Equivalence(margin, test.low, test.high, 0.0 if abs(test.mean) < margin else 1.0)
    p = float(student.sf((margin - abs(test.mean)) / error, test.seeds - 1))
    return Equivalence(margin, test.low, test.high, p)


def equivalence_power(sd: float, seeds: int, margin: float, alpha: float = ALPHA) -> float:
    """The probability that TOST calls two losses equal that are: the true difference is 0.

    The mean's distance from 0 has to stay below margin - t s / sqrt(S); its normal probability is averaged over the
    chi distribution of s.

    >>> round(equivalence_power(1.0, 10, 1.0), 2)
    0.8
    """
    df, root = seeds - 1, math.sqrt(seeds)
    critical = student.ppf(1 - alpha, df)

    def within(ratio: float) -> float:  # given s sqrt(df) / sd = ratio
        room = (margin - critical * ratio * sd / math.sqrt(df) / root) * root / sd
        return float((2 * norm.cdf(room) - 1) * chi.pdf(ratio, df)) if room > 0 else 0.0

    widest = margin * root * math.sqrt(df) / (critical * sd)
    return float(quad(within, 0.0, min(widest, math.sqrt(df) + 12), limit=200)[0])


def seeds_for_equivalence(sd: float, margin: float, power: float = 0.8, alpha: float = ALPHA, most: int = 1000) -> int:
    """The fewest seeds with which TOST finds two equal losses equal with probability `power`; `most` if none does.

    >>> seeds_for_equivalence(1.0, 1.0)
    11
    """
    return next((s for s in range(2, most) if equivalence_power(sd, s, margin, alpha) >= power), most)


def paper_gain(accuracy: float) -> dict[str, float]:
    """The paper's gain on GSM8K, 69.2 to 72.3 %, carried to another accuracy in three ways.

    >>> {reading: round(100 * gain, 2) for reading, gain in paper_gain(0.1473).items()}
    {'points': 3.1, 'odds': 1.98, 'relative': 0.66}
    """
    odds = accuracy / (1 - accuracy) * (PAPER_MCE / (1 - PAPER_MCE)) / (PAPER_CE / (1 - PAPER_CE))
    return {
        "points": PAPER_MCE - PAPER_CE,
        "odds": odds / (1 + odds) - accuracy,
        "relative": accuracy * (PAPER_MCE / PAPER_CE - 1),
    }


def problems_for_mcnemar(gain: float, discordant: float, power: float = 0.8, alpha: float = ALPHA) -> int:
    """Problems with which McNemar's test between two runs finds a true gain, by the normal formula (Connor 1987).

        n = (z_{1 - alpha / 2} sqrt(psi) + z_power sqrt(psi - gain^2))^2 / gain^2

    Args:
        gain: share of problems that the first run alone solves minus the share that the second alone solves.
        discordant: psi, the share of problems that exactly one of the two solves. It is an assumption: two runs that
            solve nearly the same problems need few, two that differ much by chance need many.

    Raises:
        ValueError: `discordant` is below `|gain|`, or not a share.

    >>> problems_for_mcnemar(0.031, 0.18)
    1468
    """
    if not abs(gain) <= discordant <= 1 or gain == 0:
        raise ValueError(
            f"discordant={discordant} and gain={gain}: at least |gain| of the problems are solved by one run alone. "
            "Give a discordant share between |gain| and 1, and a gain other than 0."
        )
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - gain**2)
    return math.ceil(root**2 / gain**2)


def seeds_for_gain(
    gain: float, problems: int, discordant: float, between: float, power: float = 0.8, alpha: float = ALPHA
) -> int:
    """Seeds with which the paired t test finds a true gain in accuracy.

    One seed's difference has the variance between^2 + (discordant - gain^2) / problems: of the seeds, and of which
    problems happen to be asked. (As if a problem's luck were drawn again for each seed, which the same test set in all
    seeds makes a little better.)

    Args:
        between: standard deviation over seeds of the true difference in accuracy; an assumption until it is measured.

    >>> seeds_for_gain(0.031, 1319, 0.18, 0.01)
    5
    """
    sd = math.sqrt(between**2 + (discordant - gain**2) / problems)
    return next((s for s in range(2, 1000) if power_of_t(gain, sd, s, alpha) >= power), 1000)
