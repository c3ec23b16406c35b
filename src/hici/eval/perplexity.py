"""Perplexity over windows of a token stream, with its uncertainty, and paired differences between two runs.

Shapes: X tokens of the stream, C tokens of a window.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hici.core.segments import count_segments
from hici.eval.statistics import CONFIDENCE, Estimate, weighted_estimate
from hici.models.lookup import FULL, attention_mode, get_causal_lm, get_decoder, hici_config
from hici.models.loss import next_token_losses
from hici.models.modes import leaks_future, visibility_in_use
from hici.rope import check_context

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclass(frozen=True)
class Windows:
    """Which windows of a stream are scored.

    Attributes:
        context, stride: C, and the distance of two windows' starts; at most C.
        starts: first token of every window used, ascending.
        available: whole windows in the stream (`starts` may be a choice of them).
        unused_tokens: tokens behind the last whole window, in no window.
    """

    context: int
    stride: int
    starts: list[int]
    available: int
    unused_tokens: int

    def scored(self, start: int) -> int:
        """Tokens that the window at `start` scores: its last `stride`, the stream's first window all but token 0.

        A token is predicted from the ones before it, so a window's own first token can never be scored.
        """
        return min(self.stride if start else self.context, self.context - 1)


@dataclass(frozen=True)
class Perplexity:
    """A perplexity run: losses in nats.

    Attributes:
        attention, visibility, leaks_future: how tokens saw each other; visibility None: no slots in use.
        segment_size, segments: S and N of this context; None in full attention.
        windows: which windows; `losses` and `counts` are their mean loss and scored tokens, in that order.
        stream_tokens, stream_sha256: of the token stream (int64, little endian).
        seconds, tokens_per_second: wall time of the forward passes; tokens read a second (not only scored ones).
    """

    attention: str
    visibility: str | None
    leaks_future: bool
    segment_size: int | None
    segments: int | None
    windows: Windows
    losses: list[float]
    counts: list[int]
    stream_tokens: int
    stream_sha256: str
    seconds: float
    tokens_per_second: float

    @property
    def loss(self) -> Estimate:
        """Mean loss, token weighted, with standard error over windows and 95 % t interval."""
        return weighted_estimate(self.losses, self.counts)

    @property
    def ppl(self) -> float:
        """exp(mean loss)."""
        return math.exp(self.loss.mean)

    @property
    def ppl_interval(self) -> tuple[float, float] | None:
        """exp of the loss's interval; None with one window."""
        interval = self.loss.interval
        return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, everything in it."""
        loss = self.loss
        return {
            "mean_loss": loss.mean,
            "standard_error": loss.standard_error,
            "loss_interval": loss.interval,
            "ppl": self.ppl,
            "ppl_interval": self.ppl_interval,
            "confidence": CONFIDENCE,
            "tokens_scored": sum(self.counts),
            **asdict(self),
        }


def choose_windows(tokens: int, context: int, stride: int | None = None, max_windows: int | None = None) -> Windows:
    """Windows of `context` tokens every `stride` (None: the window itself) over a stream of `tokens`.

    `max_windows`: the middles of that many equal parts of all windows, so that they are spaced evenly.

    Raises:
        ValueError: a context below 2, a stride outside of 1..context, max_windows below 1, a stream shorter than one
            window.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise ValueError(f"context={context} is below 2, but a window must predict one token from another; give more")
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride={stride} is not in 1..{context} (the window): a larger one would leave tokens out between "
            "windows; give a smaller stride, or max_windows to sample"
        )
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows} is below 1; give at least 1, or nothing for all windows")
    if tokens < context:
        raise ValueError(
            f"the data has {tokens} tokens, fewer than one window of {context}; give more text or a shorter context"
        )
    available = (tokens - context) // stride + 1
    count = available if max_windows is None else min(max_windows, available)
    starts = [(2 * i + 1) * available // (2 * count) * stride for i in range(count)]
    return Windows(context, stride, starts, available, tokens - ((available - 1) * stride + context))


def perplexity(
    model: Any,
    stream: np.ndarray,
    context: int,
    *,
    stride: int | None = None,
    max_windows: int | None = None,
    allow_beyond_rope: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `model`, in the attention mode that it is in, over windows of a token stream.

    Args:
        model: a causal LM, plain, attached, or inside PEFT.
        stream: token ids, int64 [X]; see `hici.data.packing.load_stream`.
        context: tokens of a window, C.
        stride, max_windows: see `choose_windows`.
        allow_beyond_rope: permit more tokens than the model's rope represents.
        progress: called after each window with (done, all).

    Raises:
        ValueError: see `choose_windows`; a context beyond the rope settings; a token outside of the vocabulary; a
            loss that is not finite.
    """
    windows = choose_windows(len(stream), context, stride, max_windows)
    lm = get_causal_lm(model)
    if not allow_beyond_rope:
        check_context(lm.config, context)
    _check_stream(stream, lm.config.vocab_size)
    if leaks_future(model):
        logger.warning(
            "visibility %r in attention mode 'hici' lets a token see a summary of its own future: this is no "
            "language-model perplexity (use visibility 'past', or attention 'full')",
            visibility_in_use(model),
        )
    was_training = model.training
    model.eval()
    begin = time.perf_counter()
    try:
        losses = _window_losses(model, stream, windows, progress)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - begin
    size = None if attention_mode(model) == FULL else min(hici_config(model).resolve_segment_size(context), context)
    return Perplexity(
        attention=attention_mode(model),
        visibility=visibility_in_use(model),
        leaks_future=leaks_future(model),
        segment_size=size,
        segments=None if size is None else count_segments(context, size),
        windows=windows,
        losses=losses,
        counts=[windows.scored(start) for start in windows.starts],
        stream_tokens=len(stream),
        stream_sha256=hashlib.sha256(np.ascontiguousarray(stream, dtype="<i8").tobytes()).hexdigest(),
        seconds=seconds,
        tokens_per_second=len(windows.starts) * context / seconds,
    )


@torch.inference_mode()
def _window_losses(model: Any, stream: np.ndarray, windows: Windows, progress: Progress | None) -> list[float]:
    """Mean loss of every window in nats, summed in float64."""
    device = get_decoder(model).device
    losses: list[float] = []
    for start in windows.starts:
        ids = torch.from_numpy(np.ascontiguousarray(stream[start : start + windows.context], dtype=np.int64))
        token_losses_C = next_token_losses(model, ids[None].to(device))[0]
        # to the CPU first: not every device has float64
        losses.append(token_losses_C[-windows.scored(start) :].cpu().double().mean().item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss of the window at token {start} is {losses[-1]}; a model with sound weights gives finite "
                "ones: check the weights, or compute in float32 (--dtype float32)"
            )
        if progress is not None:
            progress(len(losses), len(windows.starts))
    return losses


def paired_difference(a: Perplexity, b: Perplexity) -> Estimate:
    """Mean loss of `a` minus that of `b` over the same windows, with standard error and 95 % t interval.

    Raises:
        ValueError: the two did not score the same tokens.
    """
    for what, left, right in (
        ("data", (a.stream_tokens, a.stream_sha256), (b.stream_tokens, b.stream_sha256)),
        ("context and stride", (a.windows.context, a.windows.stride), (b.windows.context, b.windows.stride)),
        ("windows", a.windows.starts, b.windows.starts),
    ):
        if left != right:
            raise ValueError(
                f"a paired difference needs the same {what} on both sides, but they are {left} and {right}; "
                "evaluate both with the same data, context, stride and max_windows"
            )
    return weighted_estimate([x - y for x, y in zip(a.losses, b.losses, strict=True)], a.counts)


def _check_stream(stream: np.ndarray, vocab_size: int) -> None:
    if stream.ndim != 1 or not np.issubdtype(stream.dtype, np.integer):
        raise ValueError(
            f"the stream has shape {stream.shape} and dtype {stream.dtype}; give token ids, integers in one row"
        )
    low, high = int(stream.min()), int(stream.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"the stream holds token {high if high >= vocab_size else low}, but the model's vocabulary has "
            f"{vocab_size} entries (0..{vocab_size - 1}); tokenise with the model's own tokenizer"
        )
