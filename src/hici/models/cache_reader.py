"""The model that a HiCICache belongs to, and whether it is still what read the tokens."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from hici.models.fingerprint import model_fingerprint
from hici.models.lookup import attention_modules, hici_config
from hici.rope import rope_kinds


class Reader:
    """The model that a cache belongs to, without keeping it alive, and what the cached keys and values depend on."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = weakref.ref(decoder)
        self._attached = weakref.ref(decoder.hici_attached)
        self._rope = copy.deepcopy(decoder.config.rope_parameters)
        self._adapters = _adapters(decoder)
        self._copies: weakref.WeakSet[Any] = weakref.WeakSet()

    def check(self, decoder: Any) -> None:
        """Raise ValueError unless it is this model as it was, or one with the same weights (a copy of it)."""
        own: Any = self._decoder()
        if own is not decoder and decoder not in self._copies:
            if own is None or fingerprint_of(own) != fingerprint_of(decoder):
                raise ValueError(
                    "the HiCICache was made for another model; make one with HiCICache(model) for this one, and read "
                    "the tokens again"
                )
            self._copies.add(decoder)
        changed = "its rope settings" if decoder.config.rope_parameters != self._rope else None
        if own is decoder and decoder.hici_attached is not self._attached():
            changed = "its HiCI modules"
        if _adapters(decoder) != self._adapters:
            changed = "its active adapters"
        if changed is not None:
            raise ValueError(
                f"the model has changed ({changed}) since the HiCICache was made; make a new one, and read the tokens "
                "again"
            )

    def decoder(self) -> Any:
        """Raises ValueError when the model is gone."""
        own = self._decoder()
        if own is None:
            raise ValueError("the model of this HiCICache is gone; keep it while the cache is in use")
        return own

    def __reduce__(self) -> Any:
        raise ValueError("a HiCICache cannot be pickled, since it belongs to a model; use its save() and load()")


def _adapters(decoder: Any) -> list[Any]:
    """PEFT's state of the first layer's LoRA: which adapters are on, and which are merged."""
    return [
        (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
        for module in attention_modules(decoder)[0].modules()
        if hasattr(module, "merged_adapters")
    ]


def fingerprint_of(decoder: Any) -> str:
    """Of all weights that what a cache holds depends on: HiCI modules that nobody uses may hold anything."""
    return model_fingerprint(decoder, hici_modules=bool(hici_config(decoder).slots_in_use))


def check_rope(model_config: Any, before: list[int], new: list[int], *, beyond: bool) -> None:
    """Raise ValueError when a model's rope does not represent `new` more tokens behind `before`, or not in two calls.

    `beyond` permits more tokens than it represents, but no rope that changes with the length of a text: what was read
    before would have another one.
    """
    positions = model_config.max_position_embeddings
    total = max(old + more for old, more in zip(before, new, strict=True))
    if total > positions and not beyond:
        again = ", and read the tokens again" if any(before) else ""
        raise ValueError(
            f"{total} tokens are more than the {positions} positions of the model's rope settings; extend it first "
            f"(hici.extend_rope(model, {total})){again}, or make the cache with allow_beyond_rope=True"
        )
    for kind, rope in rope_kinds(model_config.rope_parameters):
        border = _border(model_config, kind, rope)
        for old, more in zip(before, new, strict=True):
            if border is not None and old > 0 and old + more > border and (kind == "dynamic" or old <= border):
                raise ValueError(
                    f"{old + more} tokens with a {kind} rope, which is another one beyond {border} tokens: the {old} "
                    "that were read before would have to be read again; read everything in one call, or use attention "
                    "full"
                )


def _border(model_config: Any, kind: str, rope: dict[str, Any]) -> int | None:
    """The length at which a rope becomes another one; None: it stays as it is."""
    if kind == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
        return int(rope["original_max_position_embeddings"])
    return int(model_config.max_position_embeddings) if kind == "dynamic" else None
