"""The attention modes of one model under their short names: "full", "hici", "hici_s2"."""

from __future__ import annotations

from typing import Any

from hici.models.attach import write_config
from hici.models.lookup import FULL, HICI, MODES, attention_mode, get_causal_lm, get_decoder, hici_config, is_attached
from hici.registry import suggest

ATTENTIONS = (FULL, *MODES)


def set_attention(model: Any, attention: str) -> None:
    """Switch the mode, in place. "full" is the attention that the model had before `attach`.

    Raises:
        ValueError: an unknown mode; "hici" or "hici_s2" on a model without HiCI.
    """
    if attention not in ATTENTIONS:
        raise ValueError(suggest(attention, ATTENTIONS, "attention"))
    lm = get_causal_lm(model)
    if attention != FULL:
        if not is_attached(model):
            raise ValueError(
                f"attention {attention!r} on a model without HiCI modules; call hici.attach(model, HiCIConfig(...)) "
                "first, or use attention 'full'"
            )
        lm.set_attn_implementation(attention)
    elif attention_mode(model) != FULL:
        lm.set_attn_implementation(get_decoder(model).hici_attached.stock_attention)
    if is_attached(model):
        write_config(model)


def visibility_in_use(model: Any) -> str | None:
    """The visibility that the present mode works with; None where no slots are used (full, hici_s2, slots off)."""
    if attention_mode(model) != HICI:
        return None
    config = hici_config(model)
    return config.visibility if config.use_global or config.use_local else None


def leaks_future(model: Any) -> bool:
    """Whether a token sees its own future in the present mode (slots with visibility "all" or "current")."""
    return visibility_in_use(model) in ("all", "current")
