"""HiCIConfig: what is attached to a model, validated, immutable, to and from plain JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any

from hici.registry import suggest

VISIBILITIES = ("all", "current", "past")
DECODES = ("auto", "raw")
DEFAULT_NUM_SEGMENTS = 4


@dataclasses.dataclass(frozen=True)
class HiCIConfig:
    """Shape and behaviour of HiCI attention (the paper's letters in the fields' descriptions).

    Args:
        num_local_slots: M, learnable slots that summarise one segment.
        num_global_slots: K, slots that summarise all visible local slots.
        num_heads: h, heads of local construction and of global integration.
        bottleneck_dim: D_b, width of local construction. None: the model's own width and no output projection.
        compress_dim: D_c, width of the shared compressor. None: five independent compressors, one a statistic.
            Equal to the integrator's width: no second (expanding) layer behind the shared compressor.
        num_segments: N; a batch padded to T tokens is cut into segments of ceil(T / N). Neither this nor
            `segment_size` means 4; both is an error.
        segment_size: S, tokens in a segment. Results are then independent of padding and of the batch's length.
        visibility: which summaries a token of segment i sees: "all" (G over every segment, L_i; not causal),
            "current" (G over 1..i, L_i; not causal within the segment), "past" (G over 1..i-1, L_(i-1); causal).
        use_global: global slots take part in the broadcast.
        use_local: local slots take part in the broadcast.
        backend: attention backend ("auto", "sdpa", "reference"; see `hici.attention`).
        integrator_dim: width of global integration. None: `bottleneck_dim`; required when that is None.
        decode: what new tokens attend to in generation. "auto": for visibility "past" their segment and its slots,
            as in one pass over everything (a HiCICache, which needs `segment_size`), else as "raw"; "raw": the raw
            keys of all tokens so far, without slots (as published).

    Raises:
        ValueError: an impossible combination; the message states the value, the rule and the remedy.
    """

    num_local_slots: int = 8
    num_global_slots: int = 4
    num_heads: int = 8
    bottleneck_dim: int | None = 512
    compress_dim: int | None = 128
    num_segments: int | None = None
    segment_size: int | None = None
    visibility: str = "all"
    use_global: bool = True
    use_local: bool = True
    backend: str = "auto"
    integrator_dim: int | None = None
    decode: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_heads", "bottleneck_dim", "compress_dim", "num_segments", "segment_size", "integrator_dim"):
            _check_integer(name, getattr(self, name), minimum=1, optional=name != "num_heads")
        for name in ("num_local_slots", "num_global_slots"):
            _check_integer(name, getattr(self, name), minimum=0, optional=False)
        for name in ("use_global", "use_local"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not true or false; give one of the two")
        if self.visibility not in VISIBILITIES:
            raise ValueError(suggest(str(self.visibility), VISIBILITIES, "visibility"))
        if self.decode not in DECODES:
            raise ValueError(suggest(str(self.decode), DECODES, "decode"))
        if not isinstance(self.backend, str):
            raise ValueError(f"backend={self.backend!r} is not a name; give 'auto' or a backend's name")
        self._check_segments()
        self._check_widths()
        self._check_slots()

    def _check_segments(self) -> None:
        if self.num_segments is not None and self.segment_size is not None:
            raise ValueError(
                f"num_segments={self.num_segments} and segment_size={self.segment_size} are both given, but each one "
                "decides the segments alone; give one of them and leave the other None"
            )
        if self.num_segments is None and self.segment_size is None:
            object.__setattr__(self, "num_segments", DEFAULT_NUM_SEGMENTS)

    def _check_widths(self) -> None:
        if self.bottleneck_dim is None and self.integrator_dim is None:
            raise ValueError(
                "bottleneck_dim=None (no bottleneck in local construction) leaves the width of global integration "
                "open; give integrator_dim"
            )
        for name, width in (("bottleneck_dim", self.bottleneck_dim), ("integrator_dim", self.integrator_dim)):
            if width is not None and width % self.num_heads:
                raise ValueError(
                    f"{name}={width} is not a multiple of num_heads={self.num_heads}, but every head gets an equal "
                    f"share; make {name} a multiple of {self.num_heads} or choose num_heads that divides {width}"
                )

    def _check_slots(self) -> None:
        if self.num_local_slots == 0 and (self.use_local or self.use_global):
            raise ValueError(
                "num_local_slots=0 with use_local or use_global on, but both kinds of slots are built from local "
                "slots; give num_local_slots >= 1, or use_local=False and use_global=False"
            )
        if self.use_global and self.num_global_slots == 0:
            raise ValueError(
                "use_global=True with num_global_slots=0 has no slot to broadcast; give num_global_slots >= 1 or "
                "use_global=False"
            )

    @property
    def global_width(self) -> int:
        """Width D_b of global integration."""
        width = self.integrator_dim if self.integrator_dim is not None else self.bottleneck_dim
        assert width is not None  # _check_widths
        return width

    @property
    def bounded_decode(self) -> bool:
        """Whether generation decodes from slots (a HiCICache), and not over raw keys."""
        return self.visibility == "past" and self.decode == "auto"

    @property
    def slots_in_use(self) -> int:
        """P: slots in front of a segment."""
        return self.use_global * self.num_global_slots + self.use_local * self.num_local_slots

    def resolve_segment_size(self, length: int) -> int:
        """Tokens in a segment for a batch padded to `length` tokens (at least 1)."""
        if self.segment_size is not None:
            return self.segment_size
        assert self.num_segments is not None  # _check_segments
        return max(1, -(-length // self.num_segments))

    def check_width(self, hidden_size: int) -> None:
        """Raise ValueError unless the heads divide the model's width where local construction uses it."""
        if self.bottleneck_dim is None and hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide the model's width {hidden_size}, which bottleneck_dim="
                "None uses; choose num_heads that divides it or give bottleneck_dim"
            )

    def replace(self, **changes: Any) -> HiCIConfig:
        """A copy with some fields changed. Giving `num_segments` drops `segment_size`, and the other way round.

        Raises:
            ValueError: an unknown field; values that don't fit together; the segments taken away without new ones.
        """
        check_field_names(changes)
        if changes.get("segment_size") is not None:
            changes.setdefault("num_segments", None)
        elif changes.get("num_segments") is not None:
            changes.setdefault("segment_size", None)
        segments = [changes.get(name, getattr(self, name)) for name in ("num_segments", "segment_size")]
        if segments == [None, None]:
            raise ValueError("num_segments=None and segment_size=None leave no segments; give one of them a number")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `HiCIConfig.from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HiCIConfig:
        """The config of `to_dict`. Raises ValueError on an unknown key, with the nearest known one."""
        check_field_names(values)
        return cls(**values)


def given_fields(given: HiCIConfig | dict[str, Any] | None) -> dict[str, Any]:
    """The fields that a caller sets: all of a dict; of a HiCIConfig those that are not at their defaults.

    Raises:
        ValueError: an unknown field; something else than a HiCIConfig or a dict.
    """
    if given is None:
        return {}
    if isinstance(given, dict):
        check_field_names(given)
        return dict(given)
    if not isinstance(given, HiCIConfig):
        raise ValueError(f"config={given!r} is no HiCIConfig and no dict of its fields; give one of these")
    plain = HiCIConfig()
    fields = {name: value for name, value in given.to_dict().items() if value != getattr(plain, name)}
    if fields.get("integrator_dim") == given.bottleneck_dim:
        del fields["integrator_dim"]
    return fields


def check_field_names(values: dict[str, Any]) -> None:
    """Raise ValueError on a key that HiCIConfig does not have."""
    known = [field.name for field in dataclasses.fields(HiCIConfig)]
    for key in values:
        if key not in known:
            raise ValueError(suggest(key, known, "HiCIConfig field"))


def _check_integer(name: str, value: Any, *, minimum: int, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        none = " or None" if optional else ""
        raise ValueError(f"{name}={value!r} is not an integer >= {minimum}{none}; give one")
