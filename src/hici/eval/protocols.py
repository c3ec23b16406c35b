"""`hici eval ppl`: one text, several lengths and attentions, under one of three protocols.

strict      by document, every token scored once, token weighted, bootstrap interval: lm-evaluation-harness's
            rolling log-likelihood. For a statement about a model.
published   windows every 256 tokens over one stream, all positions scored: the tables of LongLoRA and HiCI.
position    the loss of every position in a window, in bins that grow: what more context is worth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from hici.data.stream import Document, join_documents
from hici.eval.bootstrap import bootstrap_interval
from hici.eval.conditions import describe_condition, describe_model
from hici.eval.measure import Plan
from hici.eval.perplexity import check_stream, exp_interval, stream_sha256, warn_if_not_causal, window_losses
from hici.eval.statistics import CONFIDENCE, group_means, weighted_estimate
from hici.eval.windows import (
    OVERLAPPING,
    PUBLISHED_STRIDE,
    Window,
    Windows,
    disjoint_windows,
    published_windows,
    strict_windows,
)
from hici.machine import measured_peak
from hici.models.lookup import get_causal_lm, get_decoder
from hici.models.modes import set_attention
from hici.registry import suggest

PROTOCOLS = ("strict", "published", "position")

_WHAT = {
    "strict": "every document with the prefix token in front, which is not scored; the first window reads `context` "
    "tokens and scores the next token of each, every later one scores the next `stride` tokens and reads the `context` "
    "tokens before the last of them; every token once, token weighted",
    "published": "documents in order, each text followed by EOS (token files as they are); windows of `context` tokens "
    "at 0, `stride`, ... below tokens - context, each scoring all of its tokens but the first; the mean over windows",
    "position": "documents in order, each text followed by EOS (token files as they are); windows of `context` tokens "
    "side by side; position p is a token's place in its window, so it is predicted from p tokens",
}


@dataclass(frozen=True)
class Text:
    """What is measured on.

    Attributes:
        stream: token ids, int64 [X], with the prefix tokens in it in "strict".
        lengths: tokens of each document, without EOS or prefix.
        facts: for the result.
    """

    stream: np.ndarray
    lengths: list[int]
    facts: dict[str, Any]


def make_text(
    documents: Sequence[Document], protocol: str, *, bos_token_id: int | None, eos_token_id: int | None
) -> Text:
    """The documents as the protocol wants them.

    Raises:
        ValueError: an unknown protocol; "strict" with a tokenizer that has neither BOS nor EOS.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(suggest(protocol, PROTOCOLS, "perplexity protocol"))
    lengths = [len(document.tokens) for document in documents]
    facts: dict[str, Any] = {"documents": len(documents), "tokens": sum(lengths)}
    if protocol == "strict":
        prefix = eos_token_id if bos_token_id is None else bos_token_id
        if prefix is None:
            raise ValueError(
                "the tokenizer has neither BOS nor EOS, so nothing predicts a document's first token under protocol "
                "strict; give protocol published"
            )
        stream = np.concatenate([np.append([prefix], tokens) for tokens, _ in documents]).astype(np.int64)
        facts["prefix_token_id"] = prefix
    else:
        stream = join_documents(documents, eos_token_id)
        facts["eos_token_id"] = eos_token_id
    return Text(stream, lengths, {**facts, "stream_tokens": len(stream), "sha256": stream_sha256(stream)})


def choose(text: Text, protocol: str, context: int, stride: int | None, max_windows: int | None) -> Windows:
    """The protocol's windows of one length; stride None: the protocol's own. Raises ValueError as they do."""
    if protocol == "strict":
        return strict_windows(text.lengths, context, stride, max_windows)
    if protocol == "published":
        stride = min(PUBLISHED_STRIDE, context) if stride is None else stride
        return published_windows(len(text.stream), context, stride, max_windows)
    if stride is not None:
        raise ValueError(
            f"stride={stride} with protocol position, whose windows lie side by side and score every position; drop it"
        )
    return disjoint_windows(len(text.stream), context, None, max_windows)


def perplexity_plan(
    model: Any,
    text: Text,
    protocol: str,
    contexts: Sequence[int],
    attentions: Sequence[str],
    *,
    stride: int | None = None,
    max_windows: int | None = None,
    about: dict[str, Any],
) -> Plan:
    """The measurement of every length in every attention, lengths outermost.

    Args:
        model: attached where an attention asks for it; its rope represents the longest context.
        text: of `make_text` for the same protocol.
        about: what the result says of the model.

    Raises:
        ValueError: windows that are impossible; a token outside of the vocabulary.
    """
    chosen = {context: choose(text, protocol, context, stride, max_windows) for context in contexts}
    check_stream(text.stream, get_causal_lm(model).config.vocab_size)
    cases = [(context, attention) for context in contexts for attention in attentions]
    parts = {
        f"{context}/{attention}/{window.first}": (context, attention, window)
        for context, attention in cases
        for window in chosen[context].chosen
    }
    warned: set[str] = set()

    def measure_part(name: str) -> dict[str, Any]:
        context, attention, window = parts[name]
        set_attention(model, attention)
        if attention not in warned:
            warned.add(attention)
            warn_if_not_causal(model)
        return _measure_window(model, text.stream, window, bin_edges(context) if protocol == "position" else None)

    def summarise(values: dict[str, Any]) -> dict[str, Any]:
        conditions = []
        for context, attention in cases:
            set_attention(model, attention)
            windows = chosen[context]
            measured = [values[f"{context}/{attention}/{window.first}"] for window in windows.chosen]
            numbers = _condition(protocol, windows, measured, bin_edges(context))
            conditions.append({**describe_condition(model, context), **numbers})
        return {"conditions": conditions, "paired_differences": paired_differences(conditions)}

    settings = {"contexts": list(contexts), "attentions": list(attentions), "stride": stride}
    return Plan(
        task="perplexity",
        protocol={"name": protocol, "windows": _WHAT[protocol], **settings, "max_windows": max_windows},
        model=describe_model(model, attentions, about),
        data=text.facts,
        seed=None,  # nothing is drawn
        parts=list(parts),
        measure_part=measure_part,
        summarise=summarise,
    )


def bin_edges(context: int) -> list[int]:
    """First positions of the bins of positions 1..context-1, two bins an octave, and `context` behind the last."""
    edges = {round(2 ** (half / 2)) for half in range(2 * math.ceil(math.log2(context)) + 1)}
    return [edge for edge in sorted(edges) if edge < context] + [context]


def paired_differences(conditions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss of every later attention minus that of the first one, over the same windows, length by length."""
    differences = []
    for context, group in groupby(conditions, key=lambda condition: condition["context"]):
        first, *later = group
        for condition in later:
            windows = condition["windows"]
            gaps = [a - b for a, b in zip(condition["losses"], first["losses"], strict=True)]
            values, weights = group_means(gaps, condition["counts"], windows["groups"])
            estimate = weighted_estimate(values, weights, neighbours_depend=windows["unit"] == OVERLAPPING)
            differences.append(
                {"context": context, "attention": condition["attention"], "minus": first["attention"],
                 "loss_difference": estimate.mean, "standard_error": estimate.standard_error,
                 "interval": estimate.interval, "windows": len(gaps)}
            )  # fmt: skip
    return differences


def _measure_window(model: Any, stream: np.ndarray, window: Window, edges: list[int] | None) -> dict[str, Any]:
    begin = time.perf_counter()
    with measured_peak(get_decoder(model).device) as peak:
        losses = window_losses(model, stream, window)
    measured = {
        "loss": losses.mean().item(),
        "seconds": time.perf_counter() - begin,
        "peak_memory_bytes": peak.bytes,
    }
    if edges is not None:
        measured["bins"] = [losses[low - 1 : high - 1].mean().item() for low, high in pairwise(edges)]
    return measured


def _condition(protocol: str, windows: Windows, measured: list[dict[str, Any]], edges: Sequence[int]) -> dict[str, Any]:
    """The numbers of one length in one attention."""
    losses, counts = [part["loss"] for part in measured], windows.counts
    values, weights = group_means(losses, counts, windows.groups)
    estimate = weighted_estimate(values, weights, neighbours_depend=windows.unit == OVERLAPPING)
    interval, method = estimate.interval, f"Student's t, unit: {windows.unit}"
    if protocol == "strict":
        interval, method = bootstrap_interval(values, weights), f"bootstrap, unit: {windows.unit}"
    seconds = sum(part["seconds"] for part in measured)
    numbers = {
        "mean_loss": estimate.mean,
        "standard_error": estimate.standard_error,
        "loss_interval": interval,
        "ppl": math.exp(estimate.mean),
        "ppl_interval": exp_interval(interval),
        "confidence": CONFIDENCE,
        "interval_method": method,
        "groups": len(values),
        "tokens_scored": sum(counts),
        "seconds": seconds,
        "tokens_per_second": sum(window.stop - window.start for window in windows.chosen) / seconds,
        "peak_memory_bytes": max(part["peak_memory_bytes"] for part in measured),
        "losses": losses,
        "counts": counts,
        "windows": windows.to_dict(),
    }
    if protocol == "position":
        numbers["bins"] = _bins(measured, edges)
    return numbers


def _bins(measured: list[dict[str, Any]], edges: Sequence[int]) -> list[dict[str, Any]]:
    """Every window has all positions, so bins are plain means over windows."""
    bins = []
    for number, (low, high) in enumerate(pairwise(edges)):
        means = [part["bins"][number] for part in measured]
        estimate = weighted_estimate(means, [1] * len(means))
        bins.append({"first": low, "last": high - 1, "tokens": (high - low) * len(means), "mean_loss": estimate.mean,
                     "standard_error": estimate.standard_error, "interval": estimate.interval})  # fmt: skip
    return bins
