"""Optimizers by name: torch's AdamW, and bitsandbytes' with 8-bit state."""

from __future__ import annotations

from typing import Any

import torch

from hici.registry import suggest

ADAMW = "adamw"
_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
OPTIMIZERS = (ADAMW, *_BITSANDBYTES)


def create_optimizer_class(name: str) -> tuple[Any, dict[str, Any]]:
    """(class, its arguments beside rates, betas and weight decay) of an optimizer.

    "adamw" holds two float32 numbers a trained parameter, "adamw_8bit" two of 8 bits (and two float32 for 256 of them;
    tensors below 4,096 numbers stay in float32). "paged_adamw_8bit" holds the same in memory that moves to the CPU's
    when the GPU's runs out; on the CPU it is "adamw_8bit".

    Raises:
        ValueError: an unknown name; bitsandbytes is not installed, or does not work here.
    """
    if name not in OPTIMIZERS:
        raise ValueError(suggest(name, OPTIMIZERS, "optimizer"))
    if name == ADAMW:
        return torch.optim.AdamW, {}
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"optimizer={name!r} needs bitsandbytes ({error}); pip install 'hici[quantization]', or give 'adamw'"
        ) from error
    return getattr(bitsandbytes.optim, _BITSANDBYTES[name]), {}
