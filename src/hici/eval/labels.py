"""The name of the attention under which a number was measured: it stands beside the number wherever that is shown."""

from __future__ import annotations

from typing import Any

NOT_CAUSAL = "not causal"


def attention_label(condition: dict[str, Any]) -> str:
    """ "full", "hici_s2", "hici, past", "hici, all (not causal)", "hici, no slots" of a condition or what holds one."""
    label = str(condition["attention"])
    if condition["attention"] == "hici":
        label += f", {condition['visibility']}" if condition["visibility"] else ", no slots"
    return label if condition["causal"] else f"{label} ({NOT_CAUSAL})"
