"""Parts of a model, looked up: also below a PEFT wrapper. And the names of the attention modes."""

from __future__ import annotations

from typing import Any

from hici.config import HiCIConfig
from hici.models.architectures import get_architecture

FULL = "full"  # short for the stock attention, whichever of transformers' that is
HICI = "hici"
S2 = "hici_s2"
MODES = (HICI, S2)  # transformers looks for "sdpa", "flash" and "flex_attention" in such names: none may be in them


def is_attached(model: Any) -> bool:
    """Whether HiCI modules are attached (also below a PEFT wrapper)."""
    return hasattr(get_decoder(model), "hici_attached")


def hici_config(model: Any) -> HiCIConfig:
    """The HiCIConfig of an attached model. Raises ValueError when nothing is attached."""
    attached_decoder(model)
    return attention_modules(model)[0].hici_config


def attention_mode(model: Any) -> str:
    """The mode that the model is in: "hici", "hici_s2", or "full" for any attention of transformers."""
    implementation = get_causal_lm(model).config._attn_implementation
    return implementation if implementation in MODES else FULL


def is_peft(model: Any) -> bool:
    """Whether it is a PeftModel (PEFT leaves a `peft_config` on the model inside too)."""
    return hasattr(model, "get_base_model")


def get_causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if is_peft(model) else model


def get_decoder(model: Any) -> Any:
    """The model without its head (`model.model` of a causal LM)."""
    return get_causal_lm(model).base_model


def attention_modules(model: Any) -> list[Any]:
    """The attention module of every layer, in order."""
    architecture = get_architecture(get_causal_lm(model).config.model_type)
    return list(architecture.attention_modules(get_decoder(model)))


def attached_decoder(model: Any) -> Any:
    decoder = get_decoder(model)
    if not hasattr(decoder, "hici_attached"):
        raise ValueError("HiCI is not attached to this model; call hici.attach(model, HiCIConfig(...)) first")
    return decoder
