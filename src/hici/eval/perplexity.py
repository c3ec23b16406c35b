"""Perplexity over windows of a token stream, with its uncertainty, and paired differences between two runs.

Shapes: X tokens of the stream, C tokens that a window reads.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hici.core.segments import count_segments
from hici.eval.statistics import CONFIDENCE, Estimate, weighted_estimate
from hici.eval.windows import Window, Windows, disjoint_windows
from hici.models.lookup import FULL, attention_mode, get_causal_lm, get_decoder, hici_config
from hici.models.loss import IGNORE, target_losses
from hici.models.modes import leaks_future, visibility_in_use
from hici.rope import check_context

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (windows done, windows in all)


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
        return exp_interval(self.loss.interval)

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
            "windows": self.windows.to_dict(),
        }


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
    """Perplexity of `model`, in the attention mode that it is in, over windows of a stream that score no token twice.

    `hici eval ppl` has the protocols of published tables and of lm-evaluation-harness (`hici.eval.protocols`).

    Args:
        model: a causal LM, plain, attached, or inside PEFT.
        stream: token ids, int64 [X]; see `hici.data.stream.load_stream`.
        context: tokens of a window, C.
        stride, max_windows: see `hici.eval.windows.disjoint_windows`.
        allow_beyond_rope: permit more tokens than the model's rope represents.
        progress: called after each window with (done, all).

    Raises:
        ValueError: see `disjoint_windows`; a context beyond the rope settings; a token outside of the vocabulary; a
            loss that is not finite.
    """
    windows = disjoint_windows(len(stream), context, stride, max_windows)
    lm = get_causal_lm(model)
    if not allow_beyond_rope:
        check_context(lm.config, context)
    check_stream(stream, lm.config.vocab_size)
    warn_if_not_causal(model)
    begin = time.perf_counter()
    losses = []
    for window in windows.chosen:
        losses.append(window_losses(model, stream, window).mean().item())
        if progress is not None:
            progress(len(losses), len(windows.chosen))
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
        counts=windows.counts,
        stream_tokens=len(stream),
        stream_sha256=stream_sha256(stream),
        seconds=seconds,
        tokens_per_second=len(losses) * context / seconds,
    )


@torch.inference_mode()
def window_losses(model: Any, stream: np.ndarray, window: Window) -> np.ndarray:
    """Losses of the tokens that a window scores, in order, in nats: float64 [last - first].

    The model is in evaluation mode meanwhile.

    Raises:
        ValueError: a loss that is not finite.
    """
    read = torch.from_numpy(np.ascontiguousarray(stream[window.start : window.stop], dtype=np.int64))
    targets = torch.full_like(read, IGNORE)
    scored = slice(window.first - 1 - window.start, window.last - 1 - window.start)  # by the tokens before them
    targets[scored] = torch.from_numpy(np.ascontiguousarray(stream[window.first : window.last], dtype=np.int64))
    device = get_decoder(model).device
    was_training = model.training
    model.eval()
    try:
        losses_C = target_losses(model, read[None].to(device), targets[None].to(device))[0]
    finally:
        model.train(was_training)
    losses = losses_C.cpu().double()[scored].numpy()  # to the CPU first: not every device has float64
    mean = losses.mean().item()
    if not math.isfinite(mean):
        raise ValueError(
            f"the loss of the window at token {window.start} is {mean}; a model with sound weights gives finite "
            "ones: check the weights, or compute in float32 (--dtype float32)"
        )
    return losses


def warn_if_not_causal(model: Any) -> None:
    """Log what a number is not worth when tokens see their future."""
    if leaks_future(model):
        logger.warning(
            "not causal: visibility %r in attention mode 'hici' lets a token see a summary of its own future: this is "
            "no language-model perplexity (use visibility 'past', or attention 'full')",
            visibility_in_use(model),
        )


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


def exp_interval(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """An interval of a loss as one of perplexity."""
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


def stream_sha256(stream: np.ndarray) -> str:
    """SHA-256 of token ids as int64, little endian."""
    return hashlib.sha256(np.ascontiguousarray(stream, dtype="<i8").tobytes()).hexdigest()


def check_stream(stream: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError unless it is one row of ids in the vocabulary."""
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
