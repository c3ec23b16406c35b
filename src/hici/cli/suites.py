"""The suites of `hici eval all`."""

from __future__ import annotations

from dataclasses import dataclass

_SHORTEST = 1024


@dataclass(frozen=True)
class Suite:
    """What is measured, and how closely.

    Attributes:
        protocols, max_windows: of perplexity; windows of each length.
        tasks, depths, samples: of retrieval; how many depths, and prompts of each.
        longest, lengths: of the lengths that are taken without --lengths: at most so long, and so many. None: all.
    """

    name: str
    about: str
    protocols: tuple[str, ...]
    max_windows: int
    tasks: tuple[str, ...]
    depths: int
    samples: int
    longest: int | None = None
    lengths: int | None = None


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            "strict perplexity and loss by position (4 windows a length), passkeys (5 depths, 1 sample)",
            protocols=("strict", "position"),
            max_windows=4,
            tasks=("passkey",),
            depths=5,
            samples=1,
            longest=8192,
            lengths=3,
        ),
        Suite(
            "full",
            "all three protocols (16 windows a length), all generated retrieval tasks (10 depths, 3 samples)",
            protocols=("strict", "published", "position"),
            max_windows=16,
            tasks=("passkey", "needle", "variables", "keyvalue", "topics", "lines"),
            depths=10,
            samples=3,
        ),
    )
}


def default_lengths(suite: Suite, positions: int) -> list[int]:
    """Powers of two from 1,024 up to the model's positions, ascending; the positions themselves below that."""
    limit = positions if suite.longest is None else min(positions, suite.longest)
    lengths, length = [], _SHORTEST
    while length <= limit:
        lengths.append(length)
        length *= 2
    found = lengths or [limit]
    return found if suite.lengths is None else found[-suite.lengths :]
