"""Under which attention a number was measured: what stands beside it in every result, table and picture."""

from __future__ import annotations

from typing import Any

from hici.core.segments import count_segments
from hici.eval.labels import NOT_CAUSAL, attention_label
from hici.models.lookup import FULL, attention_mode, hici_config
from hici.models.modes import leaks_future, visibility_in_use

__all__ = ["NOT_CAUSAL", "attention_label", "describe_condition"]


def describe_condition(model: Any, context: int | None) -> dict[str, Any]:
    """The attention that `model` is in now, as JSON values.

    Returns:
        attention ("full", "hici", "hici_s2"); visibility (None: no slots in use); causal (False: a token sees a summary
        of its own future); segment_size and segments of `context` tokens (None in full attention); context (None: of
        any length, then segments is None too).
    """
    mode = attention_mode(model)
    size = segments = None
    if mode != FULL:
        config = hici_config(model)
        size = config.segment_size
        if context is not None:
            size = min(config.resolve_segment_size(context), context)
            segments = count_segments(context, size)
    return {
        "attention": mode,
        "visibility": visibility_in_use(model),
        "causal": not leaks_future(model),
        "segment_size": size,
        "segments": segments,
        "context": context,
    }
