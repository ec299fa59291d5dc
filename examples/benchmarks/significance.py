"""Are two recipes different, given the same seeds for both? The paired t test, the exact test of signs, and their power.

Only the standard library is needed: with n seeds the t distribution has n - 1 degrees of freedom, a whole number, for which
its integral is a finite sum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from itertools import product
from typing import NamedTuple

MOST_SEEDS = 16  # of the exact test, which goes through every pattern of signs


class Comparison(NamedTuple):
    """One row against another, over the seeds that both have."""

    seeds: int
    difference: float  # mean of row minus other
    low: float  # of the 95 % confidence interval of the paired t test
    high: float
    p: float  # two-sided, of the paired t test
    p_exact: float | None  # two-sided, of the exact test of signs; None with too many seeds


def compare(row: Mapping[int, float], other: Mapping[int, float]) -> Comparison | None:
    """Compare the scores of two rows, given by seed.

    Args:
        row: Score of each seed.
        other: Score of each seed; only those seeds count that both have.

    Returns:
        The comparison; None with less than two seeds in common, or a score that is not finite.
    """
    differences = [row[seed] - other[seed] for seed in sorted(row.keys() & other.keys())]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    p = two_sided(mean / error, n - 1) if error else float(not mean)  # the same difference on every seed: no doubt is left
    half = critical(n - 1) * error
    exact = signs(differences) if n <= MOST_SEEDS else None
    return Comparison(n, mean, mean - half, mean + half, p, exact)


def two_sided(t: float, df: int) -> float:
    r"""The probability of a value at least as far from zero as ``t`` under Student's distribution.

    With :math:`\theta = \arctan(t/\sqrt{\nu})`, what is inside is a sum of powers of :math:`\cos\theta`.

    Args:
        t: The statistic.
        df: Degrees of freedom, a whole number of at least 1.

    Returns:
        The p value.

    References:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def critical(df: int, alpha: float = 0.05) -> float:
    """How far from zero the statistic has to be for a p value of ``alpha``."""
    return bisect(lambda t: two_sided(t, df) < alpha, 0.0, 1e4)


def signs(differences: list[float]) -> float:
    """The share of all patterns of signs under which the sum is at least as far from zero: Fisher's exact paired test."""
    seen = abs(math.fsum(differences)) * (1 - 1e-12)  # the same sum in another order counts as the same
    sizes = [abs(difference) for difference in differences]
    sums = [
        abs(math.fsum(map(math.prod, zip(sizes, pattern, strict=True)))) for pattern in product((-1, 1), repeat=len(sizes))
    ]
    return sum(value >= seen for value in sums) / len(sums)


def power(effect: float, seeds: int, alpha: float = 0.05) -> float:
    """The probability that the paired t test finds a true difference.

    Args:
        effect: The true difference, in standard deviations of the differences of single seeds.
        seeds: How many.
        alpha: The p value to fall below.

    Returns:
        The probability, by integrating over the standard deviation that is measured.
    """
    df, shift, far = seeds - 1, effect * math.sqrt(seeds), critical(seeds - 1, alpha)
    normal = statistics.NormalDist()
    norm = math.log(2.0) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    points, width = 2000, 6.0 / 2000  # s = measured over true deviation; beyond 6 nothing is left
    total = 0.0
    for i in range(points):
        s = (i + 0.5) * width
        density = math.exp(norm + (df - 1) * math.log(s) - df * s * s / 2)
        total += density * (normal.cdf(shift - far * s) + normal.cdf(-shift - far * s)) * width
    return total


def detectable(seeds: int, chance: float = 0.8) -> float:
    """The difference that is found with that chance, in standard deviations of the differences of single seeds."""
    return bisect(lambda effect: power(effect, seeds) > chance, 0.0, 100.0)


def bisect(above: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition begins to hold."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high
