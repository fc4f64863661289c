"""Intervals of shares, and the comparison of two runs on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054
"""The normal distribution has 95 % between -Z and Z."""


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, for `right` of `count` independent answers. (0, 1) without any."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # At 0 and 1 the formula's ends are the share itself, but for rounding.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The normal 95 % interval of a mean."""
    mean, error = sum(values) / len(values), standard_error(values) or 0.0
    return mean - Z * error, mean + Z * error


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation over the square root of the count; None with fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) / math.sqrt(n)


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float | None:
    """The standard error of a mean where values of one cluster depend on each other, as lmms-eval computes it.

    None where all values are of one cluster.
    """
    error, n = standard_error(values), len(values)
    if error is None or len(set(clusters)) < 2:
        return None
    mean = sum(values) / n
    sums: dict[str, float] = {}
    squares = 0.0
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
        squares += (value - mean) ** 2
    between = sum(s * s for s in sums.values()) - squares
    return math.sqrt(max(error * error + between / n**2, 0.0))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test: how likely so uneven a split of the changed answers is by chance."""
    changed = only_first + only_second
    tail = sum(math.comb(changed, k) for k in range(min(only_first, only_second) + 1))
    return min(2 * tail / 2**changed, 1.0)
