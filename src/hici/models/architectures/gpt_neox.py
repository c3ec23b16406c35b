"""GPT-NeoX (Pythia): one projection makes queries, keys and values, and RoPE turns only a part of each head.

Shapes: B batch, X slots of all segments, D width, H heads, E head dimension.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hici.models.architectures.base import Architecture


class GPTNeoX(Architecture):
    """`query_key_value` gives [q, k, v] head by head: its output is H times 3 E numbers."""

    def slot_keys_values(self, attention: Any, slots_BXD: Tensor) -> tuple[Tensor, Tensor]:
        """Slot keys and values [B, X, H, E]. The slots' queries are made too and dropped: slots are few, and a
        call of the whole projection counts what LoRA adds to it."""
        fused = attention.query_key_value(slots_BXD).unflatten(-1, (-1, 3, attention.head_size))
        return fused[..., 1, :], fused[..., 2, :]


ARCHITECTURE = GPTNeoX(
    model_types=("gpt_neox",),
    lora_targets=("query_key_value", "dense"),
    norms=("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
    embeddings="embed_in",
    attention="attention",
    cache_argument="layer_past",
    gated_mlp=False,
)
