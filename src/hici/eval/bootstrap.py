"""What the difference between two methods is, and whether it is one: over windows, and over windows and seeds.

Shapes: R runs (seeds), W windows.
"""

from __future__ import annotations

import math
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

    `interval` is a paired bootstrap over windows: each resample draws W of them with replacement. It says what other
    windows would change, and nothing of other seeds. Its quantiles lie further out than confidence says, by as much as
    Student's t with W - 1 degrees of freedom lies outside of the normal distribution (the expanded percentile interval
    of Hesterberg 2015): plain ones are too narrow for few windows.

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
    interval = with_runs = None
    if windows > 1:
        interval = _bootstrap_interval(by_window, confidence, resamples, np.random.default_rng(seed))
        if len(by_run) > 1:
            half = math.hypot(_t_half(by_run, confidence), _t_half(by_window, confidence))
            with_runs = (mean - half, mean + half)
    return PairedDifference(mean, interval, with_runs, by_run.tolist(), windows, resamples, confidence)


def _t_half(means: np.ndarray, confidence: float) -> float:
    """Half the length of Student's t interval of their mean. At least two."""
    error = weighted_estimate(means.tolist(), [1] * len(means)).standard_error
    assert error is not None
    return t_quantile(confidence, len(means) - 1) * error


def _bootstrap_interval(
    by_window: np.ndarray, confidence: float, resamples: int, generator: np.random.Generator
) -> tuple[float, float]:
    """Expanded percentiles of the mean over windows, which are drawn in blocks. At least two."""
    windows = len(by_window)
    block = max(1, _BLOCK_ELEMENTS // windows)
    means = np.concatenate([
        by_window[generator.integers(windows, size=(min(block, resamples - begin), windows))].mean(axis=1)
        for begin in range(0, resamples, block)
    ])  # fmt: skip
    tail = NormalDist().cdf(-math.sqrt(windows / (windows - 1)) * t_quantile(confidence, windows - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
