"""Which series of a report are compared with each other: a run under an attention with another."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from hici.eval.labels import attention_label
from hici.report.differences import Measured
from hici.report.gather import Result
from hici.report.series import Key

ALL_PAIRS_UP_TO = 4
CHOSEN = (
    f"Of more than {ALL_PAIRS_UP_TO} series, each run is compared with the first one that has the same attention, and "
    "the attentions of a run with its own first one."
)


def measured_by_series(results: Iterable[Result]) -> dict[Key, list[Measured]]:
    """Conditions of all results by (run's label, attention)."""
    found: dict[Key, list[Measured]] = {}
    for result in results:
        for condition in result.record["conditions"]:
            key = (result.label, attention_label(condition))
            found.setdefault(key, []).append(Measured(name_of(key), condition, result.record))
    return found


def name_of(key: Key) -> str:
    """ "base: full"."""
    return ": ".join(part for part in key if part)


def all_pairs(keys: Sequence[Key]) -> list[tuple[Key, Key]]:
    """(later, earlier): all of them, or of more than `ALL_PAIRS_UP_TO` series the ones that `CHOSEN` names."""
    if len(keys) <= ALL_PAIRS_UP_TO:
        return [(later, earlier) for earlier, later in itertools.combinations(keys, 2)]
    return list(dict.fromkeys([*_across(keys), *_within(keys)]))


def main_pairs(keys: Sequence[Key]) -> list[tuple[Key, Key]]:
    """Each run with the first one of the same attention (where there is none, of any); a single run's attentions."""
    return _across(keys) if len({label for label, _ in keys}) > 1 else _within(keys)


def _across(keys: Sequence[Key]) -> list[tuple[Key, Key]]:
    first: dict[str, Key] = {}  # of an attention
    pairs = [(key, first[key[1]]) for key in keys if first.setdefault(key[1], key) != key]
    compared = {label for (label, _), _ in pairs} | {keys[0][0]}
    return pairs + [(key, keys[0]) for key in keys if key[0] not in compared]


def _within(keys: Sequence[Key]) -> list[tuple[Key, Key]]:
    pairs = []
    for label in dict.fromkeys(label for label, _ in keys):
        first, *others = [key for key in keys if key[0] == label]
        pairs += [(key, first) for key in others]
    return pairs
