"""Gemma 2 without attention soft-capping, which is what fused attention kernels cannot compute.

Every second layer has a sliding window: segments must not be longer than it.
"""

from __future__ import annotations

from typing import Any

from hici.models.architectures.base import Architecture

_LLAMA_NORMS = Architecture(()).norms


class Gemma(Architecture):
    """What Gemma 2 and Gemma 3 have in common: configs that HiCI attention cannot follow, and capped logits."""

    def check(self, model_config: Any) -> None:
        """Refuse capped attention scores and attention to later tokens.

        Raises:
            ValueError: attn_logit_softcapping or use_bidirectional_attention is set.
        """
        cap = model_config.attn_logit_softcapping
        if cap is not None:
            raise ValueError(
                f"attn_logit_softcapping={cap}: the model caps its attention scores, which HiCI's attention kernels "
                "cannot compute; load it with attn_logit_softcapping=None (another model, to be trained as such), or "
                "use one without it, such as Gemma 3"
            )
        if getattr(model_config, "use_bidirectional_attention", None):
            raise ValueError(
                f"use_bidirectional_attention={model_config.use_bidirectional_attention}: the model's tokens attend to "
                "later ones, but HiCI attention is for causal language models; use a model without it"
            )

    def logit_cap(self, model_config: Any) -> float | None:
        """final_logit_softcapping."""
        cap: float | None = model_config.final_logit_softcapping
        return cap


ARCHITECTURE = Gemma(
    model_types=("gemma2",), norms=(*_LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
)
