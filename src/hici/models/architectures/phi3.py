"""Phi-3: one projection makes queries, keys and values, and transformers takes only one kind of scaled rope.

Shapes: B batch, X slots of all segments, D width, H query heads, J key/value heads, E head dimension.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hici.models.architectures.base import Architecture


class Phi3(Architecture):
    """`qkv_proj` gives all queries, then all keys, then all values: H E + J E + J E numbers."""

    def slot_keys_values(self, attention: Any, slots_BXD: Tensor) -> tuple[Tensor, Tensor]:
        """Slot keys and values [B, X, J, E]. The slots' queries are made too and dropped: slots are few, and a
        call of the whole projection counts what LoRA adds to it."""
        width = attention.num_key_value_heads * attention.head_dim
        fused = attention.qkv_proj(slots_BXD)[..., -2 * width :].unflatten(-1, (2, -1, attention.head_dim))
        return fused[..., 0, :, :], fused[..., 1, :, :]

    def scaled_rope(self, model_config: Any, rope: dict[str, Any], method: str, factor: float) -> dict[str, Any]:
        """Linear scaling, written as a longrope of equal factors: transformers' Phi-3 config takes no other type.

        Raises:
            ValueError: method "yarn".
        """
        if method != "linear":
            raise ValueError(
                f"rope method {method!r}, but transformers' phi3 config takes no other scaled rope than longrope; use "
                "'linear' (written as a longrope whose factors are all equal)"
            )
        head_dim = model_config.hidden_size // model_config.num_attention_heads
        factors = [factor] * (int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2)
        return {
            **rope,
            "rope_type": "longrope",
            "factor": factor,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            # all of the new positions: where this ends, transformers drops the cache to change to the long factors
            "original_max_position_embeddings": int(model_config.max_position_embeddings * factor),
        }


ARCHITECTURE = Phi3(model_types=("phi3",), lora_targets=("qkv_proj", "o_proj"))
