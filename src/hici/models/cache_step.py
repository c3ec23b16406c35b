"""How the tokens of one call continue the segments that a HiCICache holds: the same for every layer.

A row's new tokens are, in order: its *head*, which goes on with the unfinished segment; its *rest*, which begins at a
segment's border. Of the rest the last, unfinished segment is the *tail*. Rows of a batch with padding stand at
different places in their segments, so each has its own numbers. Everything is decided on the host, once a call.

Shapes: B batch, T new tokens with padding, n tokens of a part, S tokens in a segment.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hici.core.segments import real_first, take_tokens


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of each row's tokens: a slice of the call's, or (rows differ) an index.

    Attributes:
        counts: tokens of every row.
        start: where the slice begins, when `index_Bn` is None.
        index_Bn: places among the call's T tokens, n = max(counts); behind a row's own end, any.
    """

    counts: tuple[int, ...]
    start: int = 0
    index_Bn: Tensor | None = None

    @property
    def length(self) -> int:
        """n."""
        return max(self.counts)

    def take(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [B, n, ...]."""
        if self.index_Bn is None:
            return x_BT[:, self.start : self.start + self.length]
        return take_tokens(x_BT, self.index_Bn.to(x_BT.device))

    def real(self, device: torch.device) -> Tensor | None:
        """[B, n]: which of them are the row's own; None: all."""
        if min(self.counts) == self.length:
            return None
        return torch.arange(self.length, device=device) < torch.tensor(self.counts, device=device)[:, None]


@dataclasses.dataclass(frozen=True)
class Step:
    """The plan of a call.

    Attributes:
        segment_size: S.
        length: T.
        before: real tokens of every row before the call.
        new: real tokens of every row in it.
        uniform: all rows are alike and without padding, so that slices do.
        head, rest, tail: the parts.
        closes: rows whose unfinished segment ends with their head.
        place_BT: for each of the T tokens its place in [head, rest]; None: they stand so.
    """

    segment_size: int
    length: int
    before: tuple[int, ...]
    new: tuple[int, ...]
    uniform: bool
    head: Part
    rest: Part
    tail: Part
    closes: tuple[bool, ...]
    place_BT: Tensor | None

    @property
    def phases(self) -> list[int]:
        """Tokens of every row's unfinished segment before the call."""
        return [tokens % self.segment_size for tokens in self.before]

    @property
    def head_end(self) -> int:
        """Tokens of the longest unfinished segment, with its head."""
        return max(phase + head for phase, head in zip(self.phases, self.head.counts, strict=True))

    @property
    def have_slots(self) -> list[bool]:
        """Whether a segment was finished before the call, by row."""
        return [tokens >= self.segment_size for tokens in self.before]

    @property
    def full(self) -> list[int]:
        """Segments of every row's rest that end in the call."""
        return [count // self.segment_size for count in self.rest.counts]

    @property
    def finished(self) -> list[int]:
        """All segments that end in the call, by row."""
        return [int(closes) + full for closes, full in zip(self.closes, self.full, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Outputs of head and rest [B, n, ...] -> [B, T, ...]; at padding: any finite value."""
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return joined if self.place_BT is None else take_tokens(joined, self.place_BT.to(joined.device))


def make_step(before: list[int], length: int, segment_size: int, real_BT: Tensor | None) -> Step:
    """The plan for `length` more tokens in rows that hold `before` real tokens.

    `real_BT` (bool) marks the real ones of the new tokens; None: all are.
    """
    new = [length] * len(before) if real_BT is None else [int(n) for n in real_BT.sum(1).tolist()]
    phases = [tokens % segment_size for tokens in before]
    have_slots = {tokens >= segment_size for tokens in before}
    # all rows begin a segment: no head is needed, and the rest is what a call without a cache would do
    aligned = not any(phases) and len(have_slots) == 1
    heads = [0 if aligned else min(n, segment_size - p) for n, p in zip(new, phases, strict=True)]
    rests = [n - h for n, h in zip(new, heads, strict=True)]
    tails = [rest % segment_size for rest in rests]
    tail_starts = [n - tail for n, tail in zip(new, tails, strict=True)]
    closes = tuple(not aligned and p + h == segment_size for p, h in zip(phases, heads, strict=True))
    uniform = real_BT is None and len(set(phases)) == 1 and len(have_slots) == 1
    pieces = (([0] * len(new), heads), (heads, rests), (tail_starts, tails))
    place_BT = None
    if uniform:
        parts = [Part(tuple(counts), starts[0]) for starts, counts in pieces]
    else:
        order_BT = torch.arange(length).expand(len(new), -1) if real_BT is None else real_first(real_BT)
        parts = [Part(tuple(counts), index_Bn=_index(order_BT, starts, max(counts))) for starts, counts in pieces]
        place_BT = _places(order_BT, heads, parts[0].length, parts[1].length)
    head, rest, tail = parts
    return Step(segment_size, length, tuple(before), tuple(new), uniform, head, rest, tail, closes, place_BT)


def _index(order_BT: Tensor, starts: list[int], length: int) -> Tensor:
    """Places of the tokens `starts[b]` and on, counted over the row's real ones: [B, n]."""
    column_n = torch.arange(length, device=order_BT.device)
    start_B1 = torch.tensor(starts, device=order_BT.device)[:, None]
    return order_BT.gather(1, (start_B1 + column_n).clamp(max=order_BT.shape[1] - 1))


def _places(order_BT: Tensor, heads: list[int], head_length: int, rest_length: int) -> Tensor:
    """Token order[b, c] is the c-th of its row: at c of the head, or behind the head's n columns."""
    column_T = torch.arange(order_BT.shape[1], device=order_BT.device)
    heads_B1 = torch.tensor(heads, device=order_BT.device)[:, None]
    place_BT = torch.where(column_T < heads_B1, column_T, column_T - heads_B1 + head_length)
    last = max(head_length + rest_length - 1, 0)
    return torch.empty_like(place_BT).scatter(1, order_BT, place_BT.clamp(max=last))
