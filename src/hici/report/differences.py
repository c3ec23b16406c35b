"""Differences between two runs: a number with its interval, or why they cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from hici.eval.statistics import CONFIDENCE, group_means, weighted_estimate, wilson_interval
from hici.eval.windows import OVERLAPPING

# of a protocol: what may differ between results whose numbers at one place are still of the same thing
_MAY_DIFFER = ("attention", "attentions", "contexts", "lengths", "depths", "tasks", "samples", "max_samples",
               "max_windows", "max_length", "batch_size", "asked", "prefix_token")  # fmt: skip
# of a task of lm-evaluation-harness: where its files lie
_PLACES = ("dataset_path", "dataset_kwargs")


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
    """Mean loss of `a` minus that of `b` over the same windows, t interval over their groups; or what differs."""
    reason = differing(a, b)
    for field, name in (("windows", "windows"), ("counts", "scored tokens")):
        if reason is None and a.condition.get(field) != b.condition.get(field):
            reason = name
    if reason is not None:
        return f"not comparable: {reason} differ"
    losses_a, losses_b, counts = a.condition.get("losses"), b.condition.get("losses"), a.condition.get("counts")
    if not losses_a or not losses_b or not counts or not len(losses_a) == len(losses_b) == len(counts):
        return "not comparable: no losses of the windows"
    windows = a.condition.get("windows") or {}
    gaps = [x - y for x, y in zip(losses_a, losses_b, strict=True)]
    values, weights = group_means(gaps, counts, windows.get("groups") or range(len(gaps)))
    found = weighted_estimate(values, weights, neighbours_depend=windows.get("unit") == OVERLAPPING)
    return Difference(found.mean, found.interval)


class Pooled(NamedTuple):
    """Right answers of samples, over all depths of a length; a task may score parts of an answer."""

    right: float
    samples: int

    @property
    def share(self) -> float:
        return self.right / self.samples


def pooled(conditions: Sequence[dict[str, Any]]) -> Pooled:
    """Of conditions of one task and length."""
    samples = sum(condition["samples"] for condition in conditions)
    right = sum(condition["accuracy"] * condition["samples"] for condition in conditions)
    return Pooled(min(samples, round(right, 6)), samples)


def accuracy_difference(a: Pooled, b: Pooled) -> Difference:
    """Share of `a` minus that of `b`; 95 % interval of Newcombe's (1998) method 10, from two Wilson intervals.

    The samples are taken as independent of each other.
    """
    difference = a.share - b.share
    (low_a, high_a), (low_b, high_b) = wilson_interval(*a), wilson_interval(*b)
    low = difference - math.hypot(a.share - low_a, high_b - b.share)
    high = difference + math.hypot(high_a - a.share, b.share - low_b)
    return Difference(difference, (low, high))


def value_difference(a: dict[str, Any], b: dict[str, Any]) -> Difference | None:
    """Of two values with standard errors, as if independent; None: one of them is no number."""
    if a["value"] is None or b["value"] is None:
        return None
    difference = a["value"] - b["value"]
    error_a, error_b = a.get("standard_error"), b.get("standard_error")
    if error_a is None or error_b is None:
        return Difference(difference, None)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.hypot(error_a, error_b)
    return Difference(difference, (difference - half, difference + half))


def retrieval_difference(a: Sequence[Measured], b: Sequence[Measured], task: str) -> Difference | str | None:
    """Accuracy of `a` minus that of `b` over the same cells of a task; or what differs. None: one has none."""
    if not a or not b:
        return None
    reason = differing(a[0], b[0], task)
    for field in ("context", "depth"):
        if reason is None and {each.condition.get(field) for each in a} != {each.condition.get(field) for each in b}:
            reason = f"{field}s"
    if reason is not None:
        return f"not comparable: {reason} differ"
    return accuracy_difference(pooled([each.condition for each in a]), pooled([each.condition for each in b]))


def score_differences(a: Sequence[Measured], b: Sequence[Measured]) -> dict[str, float] | str:
    """LongBench score of `a` minus that of `b` by data set that both have; or what differs."""
    left, right = ({each.condition["dataset"]: each for each in own} for own in (a, b))
    common = [name for name in left if name in right]
    reasons = [reason for name in common if (reason := differing(left[name], right[name], name))]
    if reasons:
        return f"not comparable: {min(reasons)} differ"
    return {name: left[name].condition["score"] - right[name].condition["score"] for name in common}


def task_difference(a: Measured, b: Measured) -> Difference | str | None:
    """`value_difference` of a task of lm-evaluation-harness; or what differs."""
    reason = differing(a, b, a.condition["task_name"])
    return f"not comparable: {reason} differ" if reason else value_difference(a.condition, b.condition)


def differing_protocol(a: dict[str, Any], b: dict[str, Any], part: str | None = None) -> str | None:
    """The first setting of the protocols that differs and matters; None: they agree.

    `part`: a task or a data set; of settings that are given for each, only those of this one count.
    """
    left, right = a["protocol"], b["protocol"]
    for name in dict.fromkeys((*left, *right)):
        one, other = left.get(name), right.get(name)
        if part is not None and isinstance(one, dict) and isinstance(other, dict) and part in one and part in other:
            one, other = one[part], other[part]
        if name not in _MAY_DIFFER and one != other:
            return f"protocols ({name}{_within(one, other)})"
    return None


def _within(one: Any, other: Any) -> str:
    """ ": max_length, samples": what differs inside of two objects."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return ""
    return ": " + ", ".join(key for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key))


def differing(a: Measured, b: Measured, part: str | None = None) -> str | None:
    """What of protocol and data differs between two conditions; `part`: as in `differing_protocol`."""
    reason = differing_protocol(a.record, b.record, part)
    if reason is None and a.record["task"] == "lm" and part is not None:
        reason = _differing_task(a, b, part)
    if reason is None and _data_key(a.record, part) != _data_key(b.record, part):
        reason = "data"
    return reason


def _differing_task(a: Measured, b: Measured, task: str) -> str | None:
    """Of lm-evaluation-harness: what differs in a task's own settings, or in those of a group's members."""
    for name in ("num_fewshot", "version", "documents"):
        if a.condition.get(name) != b.condition.get(name):
            return f"protocols ({name})"
    left, right = (each.record["protocol"].get("tasks", {}).get(task, {}).get("config", {}) for each in (a, b))
    for name in dict.fromkeys((*left, *right)):
        if name not in _PLACES and left.get(name) != right.get(name):
            return f"protocols ({name} of {task})"
    return None


def case_name(task: str, path: str) -> str:
    """Of a file's cases, as a task of the report: "topics of 10_topics.jsonl"."""
    return f"{task} of {Path(path).name}"


def _data_key(record: dict[str, Any], part: str | None = None) -> Any:
    """What tells data apart: hashes, not the paths of files; of `part` alone where they are recorded for each."""
    data = record["data"]
    if not data:
        return None
    if part is not None and part in data.get("tasks", {}):
        return data["tasks"][part].get("sha256")
    if "haystack" in data or "cases" in data:
        haystack, cases = data.get("haystack") or {}, data.get("cases") or []
        files = [file.get("sha256") for file in haystack.get("files", [])]
        return files, [file["sha256"] for file in cases if part in (None, case_name(file["task"], file["path"]))]
    found = data.get("sha256", data)
    return found.get(part) if isinstance(found, dict) and part in found else found
