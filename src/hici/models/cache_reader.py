"""The model that a HiCICache belongs to, and whether it is still what read the tokens."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from hici.models.fingerprint import model_fingerprint
from hici.models.lookup import attention_modules, hici_config
from hici.rope import changes_between, changing_rope, check_context


class Reader:
    """The model that a cache belongs to, without keeping it alive, and what the cached keys and values depend on."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = weakref.ref(decoder)
        self._accepted = weakref.WeakKeyDictionary({decoder: _State(decoder)})

    def check(self, decoder: Any) -> None:
        """Raise ValueError unless it is this model as it was, or one with the same weights (a copy of it)."""
        state = self._accepted.get(decoder)
        if state is None:
            own = self._decoder()
            if own is None or fingerprint_of(own) != fingerprint_of(decoder):
                raise ValueError(
                    "the HiCICache was made for another model; make one with HiCICache(model) for this one, and read "
                    "the tokens again"
                )
            self._accepted[decoder] = _State(decoder)
            return
        changed = state.what_changed(decoder)
        if changed is not None:
            raise ValueError(
                f"the model has changed ({changed}) since the HiCICache was made; make a new one, and read the tokens "
                "again"
            )

    def copy(self) -> Reader:
        """Of the same model, as it was."""
        copied = object.__new__(Reader)
        copied._decoder, copied._accepted = self._decoder, weakref.WeakKeyDictionary(self._accepted)
        return copied

    def renew(self) -> None:
        """The model as it is now is what counts: nothing depends on what it was."""
        own = self._decoder()
        if own is not None:
            self._accepted = weakref.WeakKeyDictionary({own: _State(own)})

    def decoder(self) -> Any:
        """Raises ValueError when the model is gone."""
        own = self._decoder()
        if own is None:
            raise ValueError("the model of this HiCICache is gone; keep it while the cache is in use")
        return own

    def __reduce__(self) -> Any:
        raise ValueError("a HiCICache cannot be pickled, since it belongs to a model; use its save() and load()")


class _State:
    """What of a model can change under a cache without a change of weights."""

    def __init__(self, decoder: Any) -> None:
        self._attached = weakref.ref(decoder.hici_attached)
        self._rope = copy.deepcopy(decoder.config.rope_parameters)
        self._tuned = [weakref.ref(module) for module in tuned_modules(decoder)]
        self._adapters = self._adapters_now()
        self._projections = _projections(decoder)

    def what_changed(self, decoder: Any) -> str | None:
        """None: nothing."""
        if decoder.config.rope_parameters != self._rope:
            return "its rope settings"
        if decoder.hici_attached is not self._attached():
            return "its HiCI modules"
        if self._adapters_now() != self._adapters or _projections(decoder) != self._projections:
            return "its active adapters"
        return None

    def _adapters_now(self) -> list[Any]:
        return [None if module is None else adapter_state(module) for module in (ref() for ref in self._tuned)]


def tuned_modules(decoder: Any) -> list[Any]:
    """The first of PEFT's tuner layers of every name: PEFT switches adapters in all layers at once."""
    found: dict[str, Any] = {}
    for name, module in decoder.named_modules():
        if hasattr(module, "merged_adapters"):
            found.setdefault(name.rpartition(".")[2], module)
    return list(found.values())


def adapter_state(module: Any) -> list[Any]:
    """Which adapters are on, which are merged, and how strong they are."""
    scaling = sorted(getattr(module, "scaling", {}).items())
    return [list(module.active_adapters), module.disable_adapters, list(module.merged_adapters), scaling]


def _projections(decoder: Any) -> list[type]:
    """Types of the first layer's projections: adapters that came or went."""
    return [type(child) for child in attention_modules(decoder)[0].children()]


def fingerprint_of(decoder: Any) -> str:
    """Of all that what a cache holds depends on: HiCI modules that nobody uses may hold anything."""
    weights = model_fingerprint(decoder, hici_modules=bool(hici_config(decoder).slots_in_use))
    adapters = [adapter_state(module) for module in tuned_modules(decoder)]
    return weights if not adapters else f"{weights} {adapters}"


def check_rope(model_config: Any, before: int, total: int, *, beyond: bool) -> None:
    """Raise ValueError when a model's rope does not represent `total` tokens, the first `before` of them read before.

    `beyond` permits more tokens than it represents, but no rope that changes with the length of a text: what was read
    before would have another one.
    """
    if not beyond:
        again = ", and read the tokens again" if before else ""
        check_context(model_config, total, f"{again}, or make the cache with allow_beyond_rope=True")
    if changes_between(model_config, before, total):
        changing = changing_rope(model_config)
        assert changing is not None  # changes_between
        raise ValueError(
            f"{total} tokens with a {changing[0]} rope, which is another one beyond {changing[1]} tokens: the {before} "
            "that were read before would have to be read again; read everything in one call with a new cache"
        )


def check_window(window: int | None, segment_size: int) -> None:
    """Inside a segment no shorter than the layer's sliding window changes nothing; a longer one would be wrong."""
    if window is not None and segment_size > window:
        raise ValueError(
            f"segments of {segment_size} tokens are longer than the model's sliding window of {window}, which HiCI "
            f"attention would not keep; give segment_size <= {window}, or config.sliding_window=None if the model "
            "allows full attention"
        )
