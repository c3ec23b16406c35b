"""How the tokens of one call continue the segments that a HiCICache holds: the same for every layer.

A row's new tokens are, in order: its *head*, which goes on with the unfinished segment; its *rest*, which begins at a
segment's border. Of the rest the last, unfinished segment is the *tail*. Rows of a batch with padding stand at
different places in their segments, so each has its own numbers. Everything is decided on the host, once a call.

Shapes: B batch, T new tokens with padding, n tokens of a part, S tokens in a segment.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

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
        real_Bn: which of them are the row's own; None: all.
    """

    counts: tuple[int, ...]
    start: int = 0
    index_Bn: Tensor | None = None
    real_Bn: Tensor | None = None

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
        """`real_Bn` on a layer's device."""
        return None if self.real_Bn is None else self.real_Bn.to(device)


class Rows(NamedTuple):
    """What differs between the rows, as tensors [B]: made once a call, not once a layer.

    Attributes:
        phase: tokens of the unfinished segment before the call.
        has_slots: a segment was finished before it.
        closes: the unfinished segment ends in it.
        finished: segments that end in it.
        tail: tokens of the tail.
    """

    phase: Tensor
    has_slots: Tensor
    closes: Tensor
    finished: Tensor
    tail: Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """The plan of a call.

    Attributes:
        segment_size: S.
        length: T.
        before: real tokens of every row before the call.
        new: real tokens of every row in it.
        head, rest, tail: the parts.
        closes: rows whose unfinished segment ends with their head.
        rows: None: all rows are alike and without padding, so that slices do.
        place_BT: for each of the T tokens its place in [head, rest]; None: they stand so.
    """

    segment_size: int
    length: int
    before: tuple[int, ...]
    new: tuple[int, ...]
    head: Part
    rest: Part
    tail: Part
    closes: tuple[bool, ...]
    rows: Rows | None = None
    place_BT: Tensor | None = None

    @property
    def phase(self) -> int:
        """Tokens of the unfinished segment before the call, where all rows are alike."""
        return self.before[0] % self.segment_size

    @property
    def has_slots(self) -> bool:
        """Whether a segment was finished before the call, where all rows are alike or begin one."""
        return self.before[0] >= self.segment_size

    @property
    def head_end(self) -> int:
        """Tokens of the longest unfinished segment, with its head."""
        return max(old % self.segment_size + head for old, head in zip(self.before, self.head.counts, strict=True))

    @property
    def farthest(self) -> int:
        """Real tokens of the longest row after the call."""
        return max(old + new for old, new in zip(self.before, self.new, strict=True))

    @property
    def full(self) -> int:
        """Segments of the rest that end in the call, of the row with most."""
        return self.rest.length // self.segment_size

    def rows_on(self, device: torch.device) -> Rows:
        """`rows` on a layer's device."""
        assert self.rows is not None
        return Rows(*(x.to(device) for x in self.rows))

    def join(self, parts: list[Tensor]) -> Tensor:
        """Outputs of head and rest [B, n, ...] -> [B, T, ...]; at padding: any finite value."""
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return joined if self.place_BT is None else take_tokens(joined, self.place_BT.to(joined.device))


def make_step(
    before: list[int], new: list[int], length: int, segment_size: int, real_BT: Tensor | None, device: torch.device
) -> Step:
    """The plan for `length` more tokens, `new` of them real, in rows that hold `before` real tokens.

    `real_BT` (bool) marks the real ones of the new tokens; None: all are. Tensors are made on `device`.
    """
    phases = [tokens % segment_size for tokens in before]
    have_slots = [tokens >= segment_size for tokens in before]
    # all rows begin a segment: no head is needed, and the rest is what a call without a cache would do
    aligned = not any(phases) and len(set(have_slots)) == 1
    heads = [0 if aligned else min(n, segment_size - p) for n, p in zip(new, phases, strict=True)]
    rests = [n - h for n, h in zip(new, heads, strict=True)]
    tails = [rest % segment_size for rest in rests]
    closes = [not aligned and p + h == segment_size for p, h in zip(phases, heads, strict=True)]
    counts = (heads, rests, tails)
    starts = ([0] * len(new), heads, [n - tail for n, tail in zip(new, tails, strict=True)])
    common = (segment_size, length, tuple(before), tuple(new))
    if real_BT is None and len(set(phases)) == 1 and len(set(have_slots)) == 1:
        head, rest, tail = (Part(tuple(n), start[0]) for n, start in zip(counts, starts, strict=True))
        return Step(*common, head, rest, tail, tuple(closes))
    finished = [int(closed) + rest // segment_size for closed, rest in zip(closes, rests, strict=True)]
    rows = Rows(*(torch.tensor(x, device=device) for x in (phases, have_slots, closes, finished, tails)))
    if real_BT is None:
        order_BT = torch.arange(length, device=device).expand(len(new), -1)
    else:
        order_BT = real_first(real_BT.to(device))
    head, rest, tail = (_part(order_BT, n, start) for n, start in zip(counts, starts, strict=True))
    place_BT = _places(order_BT, heads, head.length, rest.length)
    return Step(*common, head, rest, tail, tuple(closes), rows, place_BT)


def _part(order_BT: Tensor, counts: list[int], starts: list[int]) -> Part:
    """The tokens `starts[b]` and on, counted over the row's real ones."""
    length, device = max(counts), order_BT.device
    column_n = torch.arange(length, device=device)
    start_B1 = torch.tensor(starts, device=device)[:, None]
    index_Bn = order_BT.gather(1, (start_B1 + column_n).clamp(max=order_BT.shape[1] - 1))
    alike = min(counts) == length
    return Part(tuple(counts), 0, index_Bn, None if alike else column_n < torch.tensor(counts, device=device)[:, None])


def _places(order_BT: Tensor, heads: list[int], head_length: int, rest_length: int) -> Tensor:
    """Token order[b, c] is the c-th of its row: at c of the head, or behind the head's n columns."""
    column_T = torch.arange(order_BT.shape[1], device=order_BT.device)
    heads_B1 = torch.tensor(heads, device=order_BT.device)[:, None]
    place_BT = torch.where(column_T < heads_B1, column_T, column_T - heads_B1 + head_length)
    last = max(head_length + rest_length - 1, 0)
    return torch.empty_like(place_BT).scatter(1, order_BT, place_BT.clamp(max=last))
