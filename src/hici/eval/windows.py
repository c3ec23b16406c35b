"""Which windows of a token stream are read, and which of their tokens are scored: the protocols of perplexity.

Shapes: X tokens of the stream, C tokens that a window reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

PUBLISHED_STRIDE = 256  # tokens between two windows of the LongLoRA and HiCI tables
OVERLAPPING = "group of overlapping windows"
_DOCUMENTS_FOR_GROUPS = 10  # fewer are too few to tell the spread from


class Window(NamedTuple):
    """Reads the stream's tokens start..stop-1 and scores first..last-1, each predicted from the tokens before it.

    `group`: windows of one group are not independent (they overlap, or are of one document); errors are over groups.
    """

    start: int
    stop: int
    first: int
    last: int
    group: int


@dataclass(frozen=True)
class Windows:
    """The windows of one length.

    Attributes:
        context, stride: C, and tokens from one window to the next.
        chosen: those that are used, in the stream's order.
        available: how many there are (`chosen` may be some of them).
        unused_tokens: of the stream, in no available window.
        unit: what a group is: "window", "document", or OVERLAPPING.
    """

    context: int
    stride: int
    chosen: list[Window]
    available: int
    unused_tokens: int
    unit: str = "window"

    @property
    def starts(self) -> list[int]:
        return [window.start for window in self.chosen]

    @property
    def counts(self) -> list[int]:
        """Tokens scored by each window."""
        return [window.last - window.first for window in self.chosen]

    @property
    def groups(self) -> list[int]:
        return [window.group for window in self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "context": self.context,
            "stride": self.stride,
            "starts": self.starts,
            "available": self.available,
            "unused_tokens": self.unused_tokens,
            "unit": self.unit,
            "groups": self.groups,
        }


def disjoint_windows(tokens: int, context: int, stride: int | None = None, max_windows: int | None = None) -> Windows:
    """Windows of `context` tokens every `stride` (None: the window itself) that score no token twice.

    The stream's first window scores all but token 0, which nothing predicts; later ones score their last `stride`,
    never their first. The partial window at the end is not used. `max_windows`: see `spaced_evenly`.

    Raises:
        ValueError: a context below 2, a stride outside of 1..context, max_windows below 1, a stream shorter than one
            window.
    """
    stride = _checked_stride(context, stride, context)
    _check_tokens(tokens, context)
    available = (tokens - context) // stride + 1
    windows = []
    for index in spaced_evenly(available, max_windows):
        start = index * stride
        scored = min(stride if start else context, context - 1)
        windows.append(Window(start, start + context, start + context - scored, start + context, index))
    return Windows(context, stride, windows, available, tokens - ((available - 1) * stride + context))


def published_windows(
    tokens: int, context: int, stride: int = PUBLISHED_STRIDE, max_windows: int | None = None
) -> Windows:
    """Windows every `stride` tokens over the whole stream, each scoring all of its tokens but the first.

    That is how the tables of LongLoRA and HiCI were made (their distributed evaluation): starts 0, 256, ... below
    X - C. Most tokens are scored many times, with all lengths of context from none to C - 1. Windows that overlap are
    not independent: those that begin within the same C tokens are one group, which shares tokens with its neighbours.

    Raises:
        ValueError: as `disjoint_windows`; a stream of no more than one window.
    """
    stride = _checked_stride(context, stride, PUBLISHED_STRIDE)
    _check_tokens(tokens, context + 1)
    available = (tokens - context - 1) // stride + 1
    indices = spaced_evenly(available, max_windows)
    starts = [index * stride for index in indices]
    overlap = any(after - before < context for before, after in pairwise(starts))
    windows = [
        Window(start, start + context, start + 1, start + context, start // context if overlap else index)
        for index, start in zip(indices, starts, strict=True)
    ]
    unused = tokens - ((available - 1) * stride + context)
    return Windows(context, stride, windows, available, unused, OVERLAPPING if overlap else "window")


def strict_windows(
    lengths: Sequence[int], context: int, stride: int | None = None, max_windows: int | None = None
) -> Windows:
    """Windows by document that score every token of every document once.

    The stream is every document with one token (BOS, or EOS without one) in front, which predicts the document's first
    token and is not scored. A document's first window reads its first C tokens (that one among them) and scores the C
    tokens that they predict; every later one scores the next `stride` tokens (None: C) and reads the C tokens before
    the last of them, so the last one reaches back. With stride C these are the windows of lm-evaluation-harness's
    rolling log-likelihood.

    Args:
        lengths: tokens of each document, without the one in front.

    Raises:
        ValueError: as `disjoint_windows`; no document as long as a window (data shorter than the window).
    """
    stride = _checked_stride(context, stride, context)
    if not lengths or max(lengths) < context:
        raise ValueError(
            f"the longest document has {max(lengths, default=0)} tokens, fewer than one window of {context}: no token "
            "would be predicted from that many; give longer documents or a shorter context"
        )
    by_document = len(lengths) >= _DOCUMENTS_FOR_GROUPS
    every: list[Window] = []
    begin = 0
    for document, length in enumerate(lengths):
        end = begin + 1 + length
        first = begin + 1
        while first < end:
            last = min(first + (stride if first > begin + 1 else context), end)
            every.append(Window(max(begin, last - 1 - context), last - 1, first, last, document))
            first = last
        begin = end
    chosen = [every[index] for index in spaced_evenly(len(every), max_windows)]
    if not by_document:
        chosen = [window._replace(group=number) for number, window in enumerate(chosen)]
    return Windows(context, stride, chosen, len(every), 0, "document" if by_document else "window")


def spaced_evenly(available: int, at_most: int | None) -> list[int]:
    """Indices of the middles of `at_most` equal parts of `available` things; all of them with None.

    Raises:
        ValueError: at_most below 1.
    """
    if at_most is not None and at_most < 1:
        raise ValueError(f"max_windows={at_most} is below 1; give at least 1, or nothing for all windows")
    count = available if at_most is None else min(at_most, available)
    return [(2 * i + 1) * available // (2 * count) for i in range(count)]


def _checked_stride(context: int, stride: int | None, default: int) -> int:
    if context < 2:
        raise ValueError(f"context={context} is below 2, but a window must predict one token from another; give more")
    stride = min(default, context) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride={stride} is not in 1..{context} (the window): a larger one would leave tokens out between "
            "windows; give a smaller stride, or max_windows to sample"
        )
    return stride


def _check_tokens(tokens: int, needed: int) -> None:
    if tokens < needed:
        raise ValueError(
            f"the data has {tokens} tokens, fewer than one window of {needed}; give more text or a shorter context"
        )
