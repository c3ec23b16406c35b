"""Random draws that are the same on every machine, in every process and with every version of every library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def seed_of(*names: object) -> int:
    """A seed of 48 bits (exact in every JSON reader) from names: their `repr`s, hashed."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:6])


class Draws:
    """A stream of draws: SHA-256 of a seed, a stream's name and a counter. Streams of one seed are independent."""

    def __init__(self, seed: int, stream: str = "") -> None:
        self.seed = seed
        self._stream = stream
        self._count = 0

    def stream(self, name: str) -> Draws:
        """Another stream of the same seed, from its beginning."""
        return Draws(self.seed, f"{self._stream}/{name}")

    def below(self, end: int) -> int:
        """An integer from 0 to end - 1 (256 bits modulo `end`: uniform to 2**-200)."""
        self._count += 1
        digest = hashlib.sha256(f"{self.seed} {self._stream} {self._count}".encode()).digest()
        return int.from_bytes(digest) % end

    def between(self, first: int, last: int) -> int:
        """An integer from `first` to `last`, both among them."""
        return first + self.below(last - first + 1)

    def fraction(self) -> float:
        """A number in [0, 1)."""
        return self.below(2**53) / 2**53

    def choose(self, items: Sequence[T]) -> T:
        """One of them."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different ones of them, in drawn order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def uuid(self) -> str:
        """32 hexadecimal digits in the form of a UUID."""
        digits = f"{self.below(2**128):032x}"
        return "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
