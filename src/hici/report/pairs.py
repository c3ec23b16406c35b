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
    f"Of more than {ALL_PAIRS_UP_TO} series, each run is compared with the first one in the same attention, and the "
    "attentions of a run with its own first one."
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
    """Each run with the first, in the same attention where both have it; of a single run, its attentions."""
    return _across(keys) if len({label for label, _ in keys}) > 1 else _within(keys)


def _across(keys: Sequence[Key]) -> list[tuple[Key, Key]]:
    first = [key for key in keys if key[0] == keys[0][0]]
    pairs: list[tuple[Key, Key]] = []
    for label in dict.fromkeys(label for label, _ in keys if label != first[0][0]):
        own = [key for key in keys if key[0] == label]
        same = [(key, other) for key in own for other in first if key[1] == other[1]]
        pairs += same or [(key, first[0]) for key in own]
    return pairs


def _within(keys: Sequence[Key]) -> list[tuple[Key, Key]]:
    pairs = []
    for label in dict.fromkeys(label for label, _ in keys):
        first, *others = [key for key in keys if key[0] == label]
        pairs += [(key, first) for key in others]
    return pairs
