"""Attention backends: (q, k, v, slot keys, slot values) -> out. Functions only; never imports core.

Shape legend of this package: B batch, T tokens, N segments, S tokens in a segment, P slots of a segment, H query
heads, J key/value heads (J divides H), E head dimension. Tensors are token-major: q_BTHE, k_BTJE, slot_k_BNPJE.

Every backend computes the same thing. Segments are cut every S tokens, the last may be short. The last N' segments
(N' = slot_k.shape[1]) have P slots in front of their tokens; the segments before them have none. Slots are seen by
every token of their segment, tokens causally. A module of this package with a `BACKEND` is a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hici.registry import entries, suggest

AttentionFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Backend:
    """An entry of the registry.

    Attributes:
        name: what `HiCIConfig.backend` says.
        attend: (q_BTHE, k_BTJE, v_BTJE, slot_k_BNPJE | None, slot_v_BNPJE | None, *, segment_size, scale, dropout)
            -> out_BTHE.
        absorbed: local construction may use its absorbed projections (False for the specification).
        priority: "auto" takes the available backend with the highest.
        available: whether it runs on this machine.
    """

    name: str
    attend: AttentionFunction
    absorbed: bool
    priority: int
    available: Callable[[], bool] = lambda: True


def backends() -> dict[str, Backend]:
    """All backends by name."""
    return {backend.name: backend for backend in entries(__name__, "BACKEND")}


def get_backend(name: str) -> Backend:
    """The backend of that name; "auto": the best one that is available.

    Raises:
        ValueError: unknown (with the nearest known name), or not available on this machine.
    """
    known = backends()
    if name == "auto":
        return max((b for b in known.values() if b.available()), key=lambda b: b.priority)
    if name not in known:
        raise ValueError(suggest(name, [*known, "auto"], "attention backend"))
    if not known[name].available():
        raise ValueError(
            f"attention backend {name!r} does not run on this machine; use backend='auto', which takes one that does"
        )
    return known[name]
