"""Context extension through the model's own rope parameters.

Rope parameters are a dict with a rope_type and what belongs to it, or (Gemma 3) such a dict for every type of layer.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from hici.models.architectures import get_architecture
from hici.registry import suggest

METHODS = ("linear", "yarn")  # of a rope that is not scaled
EXTENSIBLE = (*METHODS, "llama3")  # scaled ropes with one `factor`
AUTO = "auto"

_FAR = "full_attention"  # the type of layer that sees far positions


def extended_rope(model_config: Any, context_length: int, method: str | None = None) -> dict[str, Any]:
    """Rope parameters with which `model_config`'s model represents `context_length` positions.

    An unscaled rope is scaled by `method`, as published: factor = ceil(context / positions), and for qwen3 the quotient
    itself. A linear, yarn or llama3 rope stays what it is, and its factor is multiplied by that; all else in it stays,
    an explicit attention_factor of yarn too. Parameters by type of layer: only those of full attention change (a
    sliding window sees short distances at any length). Returns the present parameters when they already reach.

    Args:
        model_config: its `max_position_embeddings` counts as what the present rope represents.
        context_length: positions.
        method: None or "auto": "linear", or the kind by which the model is scaled already.

    Raises:
        ValueError: an unknown method, or another one than the model's own; a model type without an architecture file;
            a rope scaled in another way (dynamic, longrope, ...), or one that does not say how far it reaches.
    """
    method = None if method == AUTO else method
    if method is not None and method not in EXTENSIBLE:
        raise ValueError(suggest(method, (AUTO, *METHODS), "rope method"))
    parameters = copy.deepcopy(dict(model_config.rope_parameters))
    positions = model_config.max_position_embeddings
    if context_length <= positions:
        return parameters
    architecture = get_architecture(model_config.model_type)
    factor = context_length / positions
    if architecture.whole_rope_factor:
        factor = float(math.ceil(factor))
    rope = far_rope(parameters)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        if method is not None and method not in METHODS:
            raise ValueError(
                f"rope method {method!r} on a rope that is not scaled: only a model that was trained with it can be "
                f"extended so; use {' or '.join(METHODS)}"
            )
        rope = architecture.scaled_rope(model_config, rope, method or METHODS[0], factor)
    else:
        _check_scaled(rope, positions, context_length, method)
        rope = {**rope, "factor": rope["factor"] * factor}
    return {**parameters, _FAR: rope} if _nested(parameters) else rope


def _check_scaled(rope: dict[str, Any], positions: int, context_length: int, method: str | None) -> None:
    kind = rope["rope_type"]
    by_hand = "set config.rope_parameters and config.max_position_embeddings yourself"
    if kind not in EXTENSIBLE:
        raise ValueError(
            f"the model's rope is scaled already ({kind}, {positions} positions), and {kind} has no one factor to "
            f"extend to {context_length}; give a context <= {positions}, or {by_hand}"
        )
    if method is not None and method != kind:
        raise ValueError(
            f"rope method {method!r}, but the model's rope is scaled already by {kind}, and a second scaling has no "
            f"agreed meaning; leave the method out (its {kind} factor is extended then)"
        )
    for name in ("factor",) if kind == "linear" else ("factor", "original_max_position_embeddings"):
        if rope.get(name) is None:
            raise ValueError(
                f"the model's {kind} rope lacks {name}, so it cannot be extended; set it in config.rope_parameters"
            )
    factor, original = rope["factor"], rope.get("original_max_position_embeddings", 0)
    if kind == "yarn" and factor > 1 and original >= positions:
        raise ValueError(
            f"the model's yarn rope has factor {factor:g}, but max_position_embeddings={positions} is no more than its "
            f"original_max_position_embeddings={original}, so how far it reaches is unknown; set "
            f"config.max_position_embeddings (for example {int(original * factor)}), and both explicitly"
        )


def extend_rope(model: Any, context_length: int, method: str | None = None) -> Any:
    """Make `model` represent `context_length` positions, in place; does nothing when it already does.

    The rotary embedding is made anew from the config, so the change is saved with the model's config.

    Args:
        method: see `extended_rope`; need not be named.

    Raises:
        ValueError: as `extended_rope`.
    """
    from hici.models.lookup import get_causal_lm

    config = get_causal_lm(model).config
    if context_length > config.max_position_embeddings:
        set_rope(model, extended_rope(config, context_length, method), context_length)
    return model


def set_rope(model: Any, rope_parameters: dict[str, Any], positions: int) -> None:
    """Set rope parameters and number of positions on a model's config and rebuild its rotary embedding."""
    from hici.models.lookup import get_causal_lm, get_decoder

    decoder = get_decoder(model)
    for config in {id(c): c for c in (get_causal_lm(model).config, decoder.config)}.values():
        config_rope_parameters(config, rope_parameters, positions)
    old = decoder.rotary_emb
    decoder.rotary_emb = type(old)(config=decoder.config).to(next(old.buffers()).device)


def config_rope_parameters(model_config: Any, rope_parameters: dict[str, Any], positions: int) -> None:
    """Set rope parameters and number of positions on a transformers config."""
    model_config.rope_parameters = copy.deepcopy(dict(rope_parameters))  # transformers fills in missing keys in place
    model_config.max_position_embeddings = positions
    if hasattr(model_config, "original_max_position_embeddings"):  # Phi-3: counts more than the one in the parameters
        original = rope_parameters.get("original_max_position_embeddings", positions)
        model_config.original_max_position_embeddings = original


def far_rope(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the layers that see far positions: all of them, or those of full attention."""
    return rope_parameters[_FAR] if _nested(rope_parameters) else rope_parameters


def rope_kinds(rope_parameters: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(rope_type, parameters) of every type of layer."""
    ropes = rope_parameters.values() if _nested(rope_parameters) else [rope_parameters]
    return [(rope.get("rope_type", "default"), rope) for rope in ropes if isinstance(rope, dict)]


def changing_rope(model_config: Any) -> tuple[str, int] | None:
    """(rope_type, length) of a rope that is another one beyond that length of the text; None: it stays as it is.

    transformers chooses it by the farthest position of a call, so keys of earlier calls would have the other one.
    """
    for kind, rope in rope_kinds(model_config.rope_parameters):
        if kind == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
            return kind, int(rope["original_max_position_embeddings"])
        if kind == "dynamic":
            return kind, int(model_config.max_position_embeddings)
    return None


def changes_between(model_config: Any, before: int, total: int) -> bool:
    """Whether `total` tokens in one text have another rope than its first `before` had."""
    changing = changing_rope(model_config)
    if changing is None or before == 0:
        return False
    kind, border = changing
    return (total > border and before < total) if kind == "dynamic" else (before > border) != (total > border)


def check_rope_parameters(rope_parameters: dict[str, Any]) -> list[str]:
    """Names of what rope parameters lack to be whole: rope_type and rope_theta, of every type of layer."""
    if not _nested(rope_parameters):
        return [key for key in ("rope_type", "rope_theta") if key not in rope_parameters]
    missing = [] if isinstance(rope_parameters.get(_FAR), dict) else [_FAR]
    for layer_type, rope in rope_parameters.items():
        if isinstance(rope, dict):
            missing += [f"{layer_type}.{key}" for key in check_rope_parameters(rope)]
    return missing


def _nested(rope_parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in rope_parameters.values())


def check_context(model_config: Any, length: int, remedy: str | None = None) -> None:
    """Raise ValueError when `length` tokens are more positions than the model's rope represents.

    `remedy`: what else than `hici.extend_rope` the caller can do; None: the flag of the verbs that extend it, or less.
    """
    positions = model_config.max_position_embeddings
    if length > positions:
        extend = f"extend it first (hici.extend_rope(model, {length}))"
        if remedy is None:
            extend, remedy = extend[:-1] + ", --rope auto on the command line)", f" or give at most {positions} tokens"
        raise ValueError(
            f"{length} tokens are more than the {positions} positions of the model's rope settings; {extend}{remedy}"
        )
