"""Paired bootstrap over windows and seeds: what the difference between two methods is, and whether it is one.

Shapes: R runs (seeds), W windows.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from hici.eval.statistics import CONFIDENCE, t_quantile

RESAMPLES = 20_000
_BLOCK_ELEMENTS = 2**22  # drawn indices held at a time


class PairedBootstrap(NamedTuple):
    """A mean difference and its interval; None with one window, where nothing is known of the spread.

    Attributes:
        mean: of the differences, over all windows and runs.
        interval: (low, high).
        by_run: the mean difference of every run.
        windows, resamples, confidence: what the interval rests on.
    """

    mean: float
    interval: tuple[float, float] | None
    by_run: list[float]
    windows: int
    resamples: int
    confidence: float

    @property
    def distinguishable(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_bootstrap(
    losses_a: np.ndarray,
    losses_b: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedBootstrap:
    """Loss of `a` minus loss of `b`, both [R, W] on the same windows, run r of both from the same seed.

    Each resample draws W windows and R runs with replacement and takes the mean of their differences; the interval is
    that of its quantiles. They lie further out than confidence says, by as much as Student's t with W - 1 degrees of
    freedom lies outside of the normal distribution (the expanded percentile interval of Hesterberg 2015): the plain
    one is too narrow for few windows. Windows are taken as independent and of equal length.

    Raises:
        ValueError: other shapes, no run or window, a loss that is not finite; confidence or resamples that make no
            interval.
    """
    a, b = (np.asarray(losses, dtype=np.float64) for losses in (losses_a, losses_b))
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(
            f"the losses have shapes {a.shape} and {b.shape}, but a paired bootstrap needs the same [runs, windows] of "
            "both; evaluate both on the same windows from the same seeds"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a loss is NaN or infinite, and no mean can be taken of it; leave that run out")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples={resamples}, confidence={confidence}; give >= 1, and a number in (0, 1)")
    difference_RW = a - b
    windows = difference_RW.shape[1]
    interval = None
    if windows > 1:
        tail = NormalDist().cdf(-math.sqrt(windows / (windows - 1)) * t_quantile(confidence, windows - 1))
        means = _resampled_means(difference_RW, resamples, np.random.default_rng(seed))
        low, high = np.quantile(means, [tail, 1 - tail])
        interval = (float(low), float(high))
    by_run = [float(mean) for mean in difference_RW.mean(axis=1)]
    return PairedBootstrap(float(difference_RW.mean()), interval, by_run, windows, resamples, confidence)


def _resampled_means(difference_RW: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """[resamples]: every run of a resample is seen on the same drawn windows, since windows are shared."""
    runs, windows = difference_RW.shape
    block = max(1, _BLOCK_ELEMENTS // (runs * windows))
    means = []
    for begin in range(0, resamples, block):
        count = min(block, resamples - begin)
        chosen_runs = generator.integers(runs, size=(count, runs, 1))
        chosen_windows = generator.integers(windows, size=(count, 1, windows))
        means.append(difference_RW[chosen_runs, chosen_windows].mean(axis=(1, 2)))
    return np.concatenate(means)
