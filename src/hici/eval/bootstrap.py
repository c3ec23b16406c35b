"""What the difference between two methods is, and whether it is one: over windows, and over windows and seeds.

Shapes: R runs (seeds), W windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from hici.eval.statistics import CONFIDENCE, t_quantile, weighted_estimate

RESAMPLES = 20_000
_BLOCK_ELEMENTS = 2**22  # drawn indices held at a time


class PairedDifference(NamedTuple):
    """A mean difference and its intervals; None where nothing is known of the spread.

    Attributes:
        mean: of the differences, over all windows and runs.
        interval: (low, high) over windows, for these very runs. None with one window.
        interval_with_runs: (low, high) over windows and runs. None with one window or one run.
        by_run: the mean difference of every run.
        windows, resamples, confidence: what the intervals rest on.
    """

    mean: float
    interval: tuple[float, float] | None
    interval_with_runs: tuple[float, float] | None
    by_run: list[float]
    windows: int
    resamples: int
    confidence: float

    @property
    def distinguishable(self) -> bool:
        """Whether zero lies outside of every interval: with one run, of the one over windows alone."""
        known = [each for each in (self.interval, self.interval_with_runs) if each is not None]
        return bool(known) and not any(low <= 0 <= high for low, high in known)


def paired_difference(
    losses_a: np.ndarray,
    losses_b: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Loss of `a` minus loss of `b`, both [R, W] on the same windows, run r of both from the same seed.

    `interval` is a paired bootstrap over windows: each resample draws W of them with replacement (see
    `bootstrap_interval`). It says what other windows would change, and nothing of other seeds.

    `interval_with_runs` says what other windows and other seeds would change. Its half-length is
    sqrt(half_R^2 + half_W^2): that of Student's t over the means of the runs (R - 1 degrees of freedom), and over the
    means of the windows (W - 1). The noise of a single window in a single run counts in both, so it is rather too wide
    than too narrow. Runs are not drawn with replacement: two of them have no spread worth drawing from.

    Windows are taken as independent and of equal length.

    Raises:
        ValueError: other shapes, no run or window, a loss that is not finite; confidence or resamples that make no
            interval.
    """
    a, b = (np.asarray(losses, dtype=np.float64) for losses in (losses_a, losses_b))
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(
            f"the losses have shapes {a.shape} and {b.shape}, but a paired difference needs the same [runs, windows] "
            "of both; evaluate both on the same windows from the same seeds"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a loss is NaN or infinite, and no mean can be taken of it; leave that run out")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples={resamples}, confidence={confidence}; give >= 1, and a number in (0, 1)")
    difference_RW = a - b
    by_run, by_window = difference_RW.mean(axis=1), difference_RW.mean(axis=0)
    mean, windows = float(difference_RW.mean()), len(by_window)
    interval = bootstrap_interval(
        by_window.tolist(), [1.0] * windows, confidence=confidence, resamples=resamples, seed=seed
    )
    with_runs = None
    if windows > 1 and len(by_run) > 1:
        half = math.hypot(_t_half(by_run, confidence), _t_half(by_window, confidence))
        with_runs = (mean - half, mean + half)
    return PairedDifference(mean, interval, with_runs, by_run.tolist(), windows, resamples, confidence)


def _t_half(means: np.ndarray, confidence: float) -> float:
    """Half the length of Student's t interval of their mean. At least two."""
    error = weighted_estimate(means.tolist(), [1] * len(means)).standard_error
    assert error is not None
    return t_quantile(confidence, len(means) - 1) * error


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Of a weighted mean, over values that are drawn with replacement, each with its weight; None for one value.

    Expanded percentiles: their quantiles lie further out than confidence says, by as much as Student's t with n - 1
    degrees of freedom lies outside of the normal distribution (Hesterberg 2015): plain ones are too narrow for few
    values.
    """
    values_W, weights_W = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    count = len(values_W)
    if count == 1:
        return None
    generator, block = np.random.default_rng(seed), max(1, _BLOCK_ELEMENTS // count)
    means = []
    for begin in range(0, resamples, block):
        drawn = generator.integers(count, size=(min(block, resamples - begin), count))
        means.append((values_W * weights_W)[drawn].sum(axis=1) / weights_W[drawn].sum(axis=1))
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * t_quantile(confidence, count - 1))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
