"""Series: what is drawn as one line, the numbers of one run under one attention, each with a look of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hici.eval.labels import attention_label

# Okabe and Ito's colours, which stay apart without full colour vision; every line has a dash and a marker as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Labelled = tuple[str, dict[str, Any]]  # a run's label, a result


class Look(NamedTuple):
    """Colour, dash and marker of a line; hollow: its numbers are not causal."""

    colour: str
    dash: Any
    marker: str
    hollow: bool

    @property
    def face(self) -> str:
        """Colour inside of the marker."""
        return "white" if self.hollow else self.colour


class Series(NamedTuple):
    """A run under an attention.

    Attributes:
        label: the run's. attention: `attention_label`, with "(not causal)" where it is so.
        name: both, as in legends and tables.
        entries: conditions, in the order of the results.
    """

    label: str
    attention: str
    name: str
    look: Look
    entries: list[dict[str, Any]]


Key = tuple[str, str]  # label, attention


def looks_of(labelled: Iterable[Labelled]) -> dict[Key, Look]:
    """A look for every run and attention, in their order: no two alike among the first 280."""
    looks: dict[Key, Look] = {}
    for label, record in labelled:
        for condition in record["conditions"] or [None]:
            key = (label, "" if condition is None else attention_label(condition))
            if key not in looks:
                i = len(looks)
                looks[key] = Look(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)],
                                  condition is not None and not condition["causal"])  # fmt: skip
    return looks


def series_of(
    labelled: Sequence[Labelled],
    looks: dict[Key, Look] | None = None,
    keep: Callable[[dict[str, Any]], bool] = lambda condition: True,
) -> list[Series]:
    """The conditions of results by run and attention.

    Args:
        labelled: (label, result); a label "" is not shown (a single run).
        looks: of the whole report, so that a run looks the same in all figures; None: of these results alone.
        keep: which conditions.
    """
    looks = looks_of(labelled) if looks is None else looks
    found: dict[Key, list[dict[str, Any]]] = {}
    for label, record in labelled:
        for condition in record["conditions"]:
            if keep(condition):
                found.setdefault((label, attention_label(condition)), []).append(condition)
    return [
        Series(label, attention, ": ".join(part for part in (label, attention) if part), looks[label, attention], own)
        for (label, attention), own in found.items()
    ]


def by_context(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted by context."""
    return sorted(entries, key=lambda entry: entry["context"])
