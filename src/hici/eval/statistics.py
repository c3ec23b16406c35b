"""Weighted means with standard errors and Student-t intervals, and shares with theirs, without scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95
_EXACT_UP_TO = 1000  # above, the expansion around the normal quantile is exact to 1e-9


class Estimate(NamedTuple):
    """A mean over windows. Error and interval are None with one window, where nothing is known of the spread."""

    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None


def weighted_estimate(
    values: Sequence[float],
    weights: Sequence[float],
    confidence: float = CONFIDENCE,
    *,
    neighbours_depend: bool = False,
) -> Estimate:
    """Weighted mean, its standard error over the values, and the t interval with n - 1 degrees of freedom.

    The error is that of a ratio estimator, sqrt(n / (n - 1) sum w_i^2 (x_i - mean)^2) with weights that sum to 1;
    equal weights give the usual s / sqrt(n). Values are taken as independent: windows of one text are roughly so.

    `neighbours_depend`: each value depends on the one before and the one behind (they share tokens). Their products
    count too (Hansen and Hodrick 1980), and half of the values for the degrees of freedom.

    Raises:
        ValueError: no values, another number of weights, or a weight that is not positive.
    """
    if not values or len(values) != len(weights) or min(weights) <= 0:
        raise ValueError(
            f"{len(values)} values with {len(weights)} weights; give at least one value and a positive weight for each"
        )
    total, n = math.fsum(weights), len(values)
    mean = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
    if n == 1:
        return Estimate(mean, None, None)
    parts = [w / total * (x - mean) for w, x in zip(weights, values, strict=True)]
    squares, degrees = math.fsum(part**2 for part in parts), n - 1
    if neighbours_depend:
        squares += max(0.0, 2 * math.fsum(a * b for a, b in pairwise(parts)))  # less than independence is chance
        degrees = max(1, n // 2 - 1)
    error = math.sqrt(squares * n / (n - 1))
    half = t_quantile(confidence, degrees) * error
    return Estimate(mean, error, (mean - half, mean + half))


def wilson_interval(successes: float, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval of Wilson (1927) for a share of successes: it stays in [0, 1], also with all or none.

    Scores between 0 and 1 may be summed as successes: they spread less than zeros and ones of the same mean, so the
    interval is rather too wide than too narrow.

    Raises:
        ValueError: no trials, successes outside of 0..trials, confidence outside of (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(f"{successes} successes of {trials} trials at confidence {confidence}; give at least one "
                         "trial, no more successes than trials, and a confidence in (0, 1)")  # fmt: skip
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def t_quantile(confidence: float, degrees: int) -> float:
    """The two-sided quantile: t with P(|T| <= t) = confidence for Student's t with that many degrees of freedom.

    Raises:
        ValueError: confidence outside of (0, 1), or degrees below 1.
    """
    if not 0 < confidence < 1 or degrees < 1:
        raise ValueError(f"confidence={confidence}, degrees={degrees}; the first is in (0, 1), the second >= 1")
    if degrees > _EXACT_UP_TO:
        return _t_quantile_of_many(NormalDist().inv_cdf((1 + confidence) / 2), degrees)
    low, high = 0.0, 1.0
    while _t_probability(high, degrees) < confidence:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):  # neighbouring floats
            break
        if _t_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t): the finite sums in sine and cosine of atan(t / sqrt(degrees)), one for odd, one for even."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(2 + odd, degrees, 2):
        term *= cosine_squared * (i - 1) / i
        total += term
    if odd:
        return (angle + math.sin(angle) * total) * 2 / math.pi
    return math.sin(angle) * total


def _t_quantile_of_many(z: float, degrees: int) -> float:
    """Cornish-Fisher expansion of the t quantile around the normal quantile z."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def group_means(
    losses: Sequence[float], counts: Sequence[int], groups: Sequence[int]
) -> tuple[list[float], list[float]]:
    """(token-weighted mean, tokens) of every group of windows, which stand side by side."""
    values, weights = [], []
    for _, members in groupby(zip(groups, losses, counts, strict=True), key=lambda member: member[0]):
        found = [(loss, count) for _, loss, count in members]
        tokens = sum(count for _, count in found)
        values.append(math.fsum(loss * count for loss, count in found) / tokens)
        weights.append(float(tokens))
    return values, weights
