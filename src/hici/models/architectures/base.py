"""What HiCI must know of an architecture. An architecture is one instance of (a subclass of) `Architecture`.

Shapes: B batch, X slots of all segments, D width, J key/value heads, E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

HICI_MODULES = ("local_constructor", "global_integrator")  # their names on the attention module, as published


def is_hici_name(name: str) -> bool:
    """Whether a parameter name is inside a HiCI module."""
    return any(f".{module}." in name for module in HICI_MODULES)


@dataclass(frozen=True)
class Architecture:
    """Names and projections; the defaults are Llama's.

    Attributes:
        model_types: transformers' `config.model_type` values.
        lora_targets: attention projections for LoRA, as names on the attention module.
        norms: what `modules_to_save` names so that all norms train (suffixes; "model.norm" whole, since "norm" alone
            is a suffix of every other norm).
        embeddings: the input embedding's name, likewise.
        attention: the attention module's name on a layer.
        mlp: the MLP's name on a layer; its forward takes the hidden states and nothing else.
        cache_argument: the name under which the attention module gets the cache.
        whole_rope_factor: rope factors are rounded up to a whole number, as in the published code of the family.
        gated_mlp: the MLP has a gate beside its first projection (for the memory estimate).
    """

    model_types: tuple[str, ...]
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "model.norm")
    embeddings: str = "embed_tokens"
    attention: str = "self_attn"
    mlp: str = "mlp"
    cache_argument: str = "past_key_values"
    whole_rope_factor: bool = True
    gated_mlp: bool = True

    def check(self, model_config: Any) -> None:
        """Raise ValueError when HiCI attention cannot follow a model of this config; by default it can."""

    def logit_cap(self, model_config: Any) -> float | None:
        """c where the model's logits are c tanh(x / c) of what its head gives; None: they are what the head gives."""
        return None

    def scaled_rope(self, model_config: Any, rope: dict[str, Any], method: str, factor: float) -> dict[str, Any]:
        """The model's unscaled `rope` parameters, scaled by `factor`; method: "linear" or "yarn"."""
        scaled = {**rope, "rope_type": method, "factor": factor}
        if method == "yarn":
            scaled["original_max_position_embeddings"] = model_config.max_position_embeddings
        return scaled

    def attention_modules(self, decoder: nn.Module) -> list[nn.Module]:
        """The attention module of every layer of the decoder (the model without its head), in order."""
        layers: Any = decoder.layers
        return [getattr(layer, self.attention) for layer in layers]

    def mlp_modules(self, decoder: nn.Module) -> list[nn.Module]:
        """The MLP of every layer of the decoder, in order."""
        layers: Any = decoder.layers
        return [getattr(layer, self.mlp) for layer in layers]

    def slot_keys_values(self, attention: Any, slots_BXD: Tensor) -> tuple[Tensor, Tensor]:
        """Slot keys and values [B, X, J, E] from the layer's own projections: no RoPE and no q/k-norm."""
        keys = attention.k_proj(slots_BXD).unflatten(-1, (-1, attention.head_dim))
        values = attention.v_proj(slots_BXD).unflatten(-1, (-1, attention.head_dim))
        return keys, values

    def lora_regex(self) -> str:
        """Full-match pattern of the attention's own projections; the HiCI modules' projections don't match."""
        return rf".*\.{self.attention}\.({'|'.join(self.lora_targets)})"
