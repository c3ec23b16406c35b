"""Differences between two runs: a number with its interval, or why they cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

from hici.eval.statistics import CONFIDENCE, weighted_estimate

# of a protocol: what may differ between results whose numbers at one place are still of the same thing
_MAY_DIFFER = ("attention", "attentions", "context", "contexts", "depth", "depths", "lengths", "tasks", "datasets",
               "samples", "batch_size")  # fmt: skip


class Measured(NamedTuple):
    """A condition, and the result that it is of."""

    name: str
    condition: dict[str, Any]
    record: dict[str, Any]


class Difference(NamedTuple):
    """First minus second; interval None: nothing is known of the spread."""

    value: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """ "lower", "higher" or "not distinguishable" (zero inside of the interval)."""
        if self.interval is None:
            return "no interval"
        if self.interval[0] <= 0 <= self.interval[1]:
            return "not distinguishable"
        return "lower" if self.value < 0 else "higher"


def loss_difference(a: Measured, b: Measured) -> Difference | str:
    """Mean loss of `a` minus that of `b`, paired over the same windows, t interval; or what differs."""
    reason = differing_protocol(a.record, b.record)
    if reason is None and _data_key(a.record) != _data_key(b.record):
        reason = "data"
    for field, name in (("windows", "windows"), ("counts", "scored tokens")):
        if reason is None and a.condition.get(field) != b.condition.get(field):
            reason = name
    if reason is not None:
        return f"not comparable: {reason} differ"
    losses_a, losses_b, counts = a.condition.get("losses"), b.condition.get("losses"), a.condition.get("counts")
    if not losses_a or not losses_b or not counts or not len(losses_a) == len(losses_b) == len(counts):
        return "not comparable: no losses of the windows"
    found = weighted_estimate([x - y for x, y in zip(losses_a, losses_b, strict=True)], counts)
    return Difference(found.mean, found.interval)


class Pooled(NamedTuple):
    """Right answers of samples, over all depths of a length."""

    right: int
    samples: int

    @property
    def share(self) -> float:
        return self.right / self.samples


def pooled(conditions: Sequence[dict[str, Any]]) -> Pooled:
    """Of conditions of one task and length."""
    samples = sum(condition["samples"] for condition in conditions)
    return Pooled(round(sum(condition["accuracy"] * condition["samples"] for condition in conditions)), samples)


def accuracy_difference(a: Pooled, b: Pooled) -> Difference:
    """Share of `a` minus that of `b`; 95 % interval of Newcombe's (1998) method 10, from two Wilson intervals.

    The samples are taken as independent of each other.
    """
    difference = a.share - b.share
    (low_a, high_a), (low_b, high_b) = wilson_interval(*a), wilson_interval(*b)
    low = difference - math.hypot(a.share - low_a, high_b - b.share)
    high = difference + math.hypot(high_a - a.share, b.share - low_b)
    return Difference(difference, (low, high))


def wilson_interval(right: int, samples: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, extra = right / samples, z * z / samples
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / samples + extra / (4 * samples))
    return max(0.0, middle - half), min(1.0, middle + half)


def value_difference(a: dict[str, Any], b: dict[str, Any]) -> Difference:
    """Of two values with standard errors, as if independent; None: no interval."""
    difference = a["value"] - b["value"]
    error_a, error_b = a.get("standard_error"), b.get("standard_error")
    if error_a is None or error_b is None:
        return Difference(difference, None)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.hypot(error_a, error_b)
    return Difference(difference, (difference - half, difference + half))


def differing_protocol(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first setting of the protocols that differs and matters; None: they agree."""
    left, right = a["protocol"], b["protocol"]
    for name in dict.fromkeys((*left, *right)):
        if name not in _MAY_DIFFER and left.get(name) != right.get(name):
            return f"protocols ({name})"
    return None


def _data_key(record: dict[str, Any]) -> Any:
    """What tells data apart: its hash, not the paths of its files."""
    data = record["data"]
    return data.get("sha256", data) if data else data
