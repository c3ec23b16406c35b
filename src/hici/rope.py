"""Context extension through the model's own rope parameters."""

from __future__ import annotations

import math
from typing import Any

from hici.models.architectures import get_architecture
from hici.registry import suggest

METHODS = ("linear", "yarn")


def extended_rope(model_config: Any, context_length: int, method: str = "linear") -> dict[str, Any]:
    """Rope parameters with which `model_config`'s model represents `context_length` positions.

    As published: factor = ceil(context / original positions), and for qwen3 the quotient itself. Returns the present
    parameters when they already reach.

    Raises:
        ValueError: unknown method; a model type without an architecture file; the model's rope is scaled already, so
            that a second scaling has no agreed meaning.
    """
    if method not in METHODS:
        raise ValueError(suggest(method, METHODS, "rope method"))
    present = dict(model_config.rope_parameters)
    positions = model_config.max_position_embeddings
    if context_length <= positions:
        return present
    if present.get("rope_type", "default") != "default":
        raise ValueError(
            f"the model's rope is scaled already ({present['rope_type']}, {positions} positions), so extending it to "
            f"{context_length} would scale twice; give a context <= {positions}, or set config.rope_parameters and "
            "config.max_position_embeddings yourself"
        )
    factor = context_length / positions
    if get_architecture(model_config.model_type).whole_rope_factor:
        factor = float(math.ceil(factor))
    extended = {**present, "rope_type": method, "factor": factor}
    if method == "yarn":
        extended["original_max_position_embeddings"] = positions
    return extended


def extend_rope(model: Any, context_length: int, method: str = "linear") -> Any:
    """Make `model` represent `context_length` positions, in place; does nothing when it already does.

    The rotary embedding is made anew from the config, so the change is saved with the model's config.

    Raises:
        ValueError: as `extended_rope`.
    """
    from hici.models.attach import get_causal_lm

    config = get_causal_lm(model).config
    if context_length > config.max_position_embeddings:
        set_rope(model, extended_rope(config, context_length, method), context_length)
    return model


def set_rope(model: Any, rope_parameters: dict[str, Any], positions: int) -> None:
    """Set rope parameters and number of positions on a model's config and rebuild its rotary embedding."""
    from hici.models.attach import get_causal_lm, get_decoder

    decoder = get_decoder(model)
    for config in {id(c): c for c in (get_causal_lm(model).config, decoder.config)}.values():
        config_rope_parameters(config, rope_parameters, positions)
    old = decoder.rotary_emb
    decoder.rotary_emb = type(old)(config=decoder.config).to(old.inv_freq.device)


def config_rope_parameters(model_config: Any, rope_parameters: dict[str, Any], positions: int) -> None:
    """Set rope parameters and number of positions on a transformers config."""
    model_config.rope_parameters = dict(rope_parameters)
    model_config.max_position_embeddings = positions


def check_context(model_config: Any, length: int) -> None:
    """Raise ValueError when `length` tokens are more positions than the model's rope represents."""
    positions = model_config.max_position_embeddings
    if length > positions:
        raise ValueError(
            f"{length} tokens are more than the {positions} positions of the model's rope settings; extend it first "
            f"(hici.extend_rope(model, {length}), --rope linear on the command line) or give at most {positions} tokens"
        )
