"""Looking at what the attention of each layer works on, without a change to the model's results.

Shapes: B batch, T tokens, N segments, M local slots, K global slots, P slots of a segment, H query heads,
J key/value heads, E head dimension, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hici.models.lookup import HICI, attached_decoder, attention_mode, attention_modules


class Observation(NamedTuple):
    """The inputs of one layer's attention in a call of the model. The tensors are the call's own: not to be changed.

    Attributes:
        layer: its number, from 0.
        q_BTHE, k_BTJE, v_BTJE: behind RoPE and the norms of queries and keys.
        slot_k_BNPJE, slot_v_BNPJE: of the last N' segments, global slots first; None: no segment has slots.
        local_BNMD: local slots of the segments 1..N (visibility "past": 1..N-1, nobody sees those of the last). They
            are also there when only global slots, which are made from them, are in use.
        global_BNKD: global slots over 1..i for each of these segments i; visibility "all": N is 1, over all segments.
            None: not in use.
        segment_size, scale: S, and what scores are multiplied by.
    """

    layer: int
    q_BTHE: Tensor
    k_BTJE: Tensor
    v_BTJE: Tensor
    slot_k_BNPJE: Tensor | None
    slot_v_BNPJE: Tensor | None
    local_BNMD: Tensor | None
    global_BNKD: Tensor | None
    segment_size: int
    scale: float


@contextlib.contextmanager
def observe_attention(
    model: Any, callback: Callable[[Observation], None], layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Context: every call of `model` gives `callback` an `Observation` of each layer, as that layer is computed.

    Outputs stay the same, bit for bit, and at the end (also after an error) nothing stays behind on the model. Only one
    layer's tensors are held unless the callback keeps them.

    Args:
        model: with HiCI attached, in attention mode "hici"; also inside PEFT.
        layers: numbers of the layers to observe; None: all.

    Raises:
        ValueError: another mode; a compiled model; no such layer. From a call of the model inside: a cache
            (use_cache=False makes none); padding; another mode.
    """
    decoder = attached_decoder(model)
    _check_mode(attention_mode(model))
    _refuse_compiled(model)
    modules = attention_modules(model)
    numbers = check_layers(len(modules), layers)
    with contextlib.ExitStack() as undo:
        undo.callback(decoder.register_forward_pre_hook(_check_call, with_kwargs=True).remove)
        for number in numbers:
            _observe_layer(modules[number], number, callback, undo)
        yield


def check_layers(count: int, layers: Sequence[int] | None) -> list[int]:
    """The numbers in order, each once; None: all of `count`. Raises ValueError for what is no layer, or for none."""
    if layers is None:
        return list(range(count))
    if not layers:
        raise ValueError("layers is empty; name at least one, or give None for all")
    for number in layers:
        if not 0 <= number < count:
            raise ValueError(f"layer {number} is not in 0..{count - 1}, the layers of this model; give one of them")
    return sorted(set(layers))


def _observe_layer(
    module: Any, number: int, callback: Callable[[Observation], None], undo: contextlib.ExitStack
) -> None:
    made: dict[str, Tensor] = {}  # the slots of the call that is going on
    attend = module.hici_attend

    def observed(
        q: Tensor, k: Tensor, v: Tensor, slot_k: Tensor | None, slot_v: Tensor | None, **options: Any
    ) -> Tensor:
        global_slots = made.pop("global", None)
        callback(
            Observation(
                layer=number,
                q_BTHE=q,
                k_BTJE=k,
                v_BTJE=v,
                slot_k_BNPJE=slot_k,
                slot_v_BNPJE=slot_v,
                local_BNMD=made.pop("local", None),
                global_BNKD=global_slots[:, None]
                if global_slots is not None and global_slots.dim() == 3
                else global_slots,
                segment_size=options["segment_size"],
                scale=options["scale"],
            )
        )
        out: Tensor = attend(q, k, v, slot_k, slot_v, **options)
        return out

    def put_back() -> None:
        if module.hici_attend is observed:  # else `reconfigure` has put another one there
            module.hici_attend = attend

    for name, maker in (("local", module.local_constructor), ("global", module.global_integrator)):
        keep = lambda _module, _args, slots, name=name: made.__setitem__(name, slots)  # noqa: E731
        undo.callback(maker.register_forward_hook(keep).remove)
    module.hici_attend = observed
    undo.callback(put_back)


def _check_call(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Behind the decoder's own hook, which has given all arguments their names and has made the cache, if any."""
    _check_mode(decoder.config._attn_implementation)
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "an observed call has a cache, with which layers attend in pieces; call the model with use_cache=False and "
            "without past_key_values"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            "an observed call has padding, whose queries would count as tokens; give rows of one length without "
            "padding, or one row at a time"
        )


def _check_mode(mode: str) -> None:
    if mode != HICI:
        raise ValueError(
            f"attention mode {mode!r} makes no slots, so there is nothing to observe; call "
            "model.set_attn_implementation('hici') first"
        )


def _refuse_compiled(model: Any) -> None:
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            "the model is compiled, and compiled code does not stop to be looked at; observe the model as it was "
            "before torch.compile"
        )
