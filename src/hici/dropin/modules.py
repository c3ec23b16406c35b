"""`replace_*_attn` and `register_hici_to_*` of the published modules, and their constants, which are read at forward.

The state of a drop-in module is its own: constants and the choice of `replace_*_attn`. A registered model knows that
module by name; a hook on its decoder compares the constants with what is applied, in front of every forward call.
"""

from __future__ import annotations

import importlib
import logging
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hici.config import HiCIConfig
from hici.models.attach import attach, reconfigure, write_config
from hici.models.lookup import FULL, HICI, MODES, S2, get_decoder, is_attached, is_peft
from hici.models.modes import set_attention
from hici.registry import suggest

logger = logging.getLogger(__name__)

# published CAUSAL_CONTEXT_MODE -> (visibility, use_local)
CONTEXT_MODES = {
    "none": ("all", True),
    "causal_gi": ("current", True),
    "causal_gi_gonly": ("current", False),
    "causal_shift": ("past", True),
    "causal_shift_g": ("past", False),
}
_HALF = (torch.float16, torch.bfloat16)  # what flash-attn computes in


@dataclass(frozen=True)
class Family:
    """One drop-in module.

    Attributes:
        module: its name.
        model_type: transformers' `config.model_type` of the models that it is for.
        replace, register: names of its two functions, for messages.
        precedence: what an argument of `replace` selects; the first true one wins, as published.
        otherwise: what it selects when none is true.
    """

    module: str
    model_type: str
    replace: str
    register: str
    precedence: tuple[tuple[str, str], ...]
    otherwise: str


LLAMA = Family(
    module="llama_attn_hici",
    model_type="llama",
    replace="replace_llama_attn",
    register="register_hici_to_model",
    precedence=(("inference", FULL), ("use_hierarchical_forward", HICI), ("use_full", FULL)),
    otherwise=S2,
)
QWEN3 = Family(
    module="qwen3_attn_hici",
    model_type="qwen3",
    replace="replace_qwen3_attn",
    register="register_hici_to_qwen3_model",
    precedence=(("use_full", FULL), ("inference", HICI), ("use_hierarchical_forward", HICI)),
    otherwise=HICI,
)


class Choice(NamedTuple):
    """What `replace_*_attn` chose: the attention mode, and flash-attn's kernel for full attention."""

    attention: str = HICI
    flash: bool = False


class Wanted(NamedTuple):
    """What a module's constants and choice ask of one registered model."""

    choice: Choice
    use: dict[str, Any]  # fields of HiCIConfig


@dataclass
class Registered:
    """Kept on the decoder of a registered model; survives deepcopy and torch.save.

    Attributes:
        module: name of the drop-in module.
        use_global, use_local: which slots there are at all; the constants can switch off more.
        stock_attention: the model's attention before.
        attached: what `hici.attach` left on the decoder; another one is not of this registration.
        applied: what the model is set to; compared in front of every forward call.
        draws: where MIXED_GROUP_TRAINING's ratios come from, apart from torch's global generator.
    """

    module: str
    use_global: bool
    use_local: bool
    stock_attention: str
    attached: Any = None
    applied: Wanted | None = None
    draws: random.Random | None = None


def choose(family: Family, *, use_flash_attn: bool, **arguments: bool) -> Choice:
    """The attention that the arguments of `replace_*_attn` select. Logs what has no effect."""
    given = [(name, attention) for name, attention in family.precedence if arguments[name]]
    attention = given[0][1] if given else family.otherwise
    ignored = [name for name, other in given if other != attention]
    if ignored:
        logger.warning(
            "%s: %s=True has no effect beside %s=True, as in the published module; the attention is %r",
            family.replace, ", ".join(ignored), given[0][0], attention,
        )  # fmt: skip
    flash = use_flash_attn and flash_available()
    if use_flash_attn and not flash:
        logger.warning(
            "%s: use_flash_attn=True without flash-attn or a GPU for it; torch's scaled_dot_product_attention is used, "
            "with the same results", family.replace,
        )  # fmt: skip
    return Choice(attention, flash)


def flash_available() -> bool:
    """Whether flash-attn is installed and there is a device for it."""
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def register(
    family: Family,
    model: Any,
    *,
    num_local_slots: int | None,
    num_memory_slots: int | None,
    global_slots: int,
    num_heads: int,
    use_bottleneck: bool,
    bottleneck_dim: int,
    use_local_constructor: bool,
    use_global_integrator: bool,
    use_local_constructor_flash: bool,
    use_attn_init: bool,
    use_shared_compressor: bool,
    compress_dim: int,
    shared_compress_dim: int,
    ds_config_path: str | None,
) -> Any:
    """Attach HiCI as the published `register_hici_to_model` does.

    `use_local_constructor_flash` chooses between two ways to the same numbers, so it changes nothing here.

    Raises:
        ValueError: a model that cannot be registered; options that contradict each other or have no meaning here;
            a constant of the module with an impossible value.
    """
    _refuse_model(family, model)
    _refuse_options(use_local_constructor, use_global_integrator, use_attn_init, ds_config_path)
    registered = Registered(
        module=family.module,
        use_global=use_global_integrator,
        use_local=use_local_constructor,
        stock_attention="sdpa" if model.config._attn_implementation in MODES else model.config._attn_implementation,
    )
    wanted = read_constants(registered)
    # quirk of the published code, which checkpoints depend on: compress_dim counts for independent compressors only
    width = bottleneck_dim if use_shared_compressor else compress_dim
    config = HiCIConfig(
        num_local_slots=_slots(num_local_slots, num_memory_slots),
        num_global_slots=global_slots,
        num_heads=num_heads,
        bottleneck_dim=bottleneck_dim if use_bottleneck else None,
        compress_dim=shared_compress_dim if use_shared_compressor else None,
        integrator_dim=None if use_bottleneck and width == bottleneck_dim else width,
        **wanted.use,
    )
    attach(model, config)
    decoder = get_decoder(model)
    registered.attached = decoder.hici_attached
    decoder.hici_dropin = registered
    if constants_hook not in decoder._forward_pre_hooks.values():  # one may be left from before a detach
        decoder.register_forward_pre_hook(constants_hook, with_kwargs=True, prepend=True)
    apply_constants(decoder)
    return model


def _refuse_model(family: Family, model: Any) -> None:
    if is_peft(model) or hasattr(model, "peft_config"):
        raise ValueError(
            f"{family.register} was given a PEFT model, but HiCI goes below PEFT (LoRA inside the modules would be "
            "lost); register the base model first, then call PeftModel.from_pretrained"
        )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type != family.model_type:
        other = next((each for each in (LLAMA, QWEN3) if each.model_type == model_type), None)
        remedy = f"import {other.module}" if other else "use hici.attach, which knows more models, without drop-in"
        raise ValueError(
            f"{family.module} is for models of type {family.model_type!r}, but this one is {model_type!r}; {remedy}"
        )
    if is_attached(model):
        raise ValueError(
            f"{family.register}: HiCI modules are on this model already, and new ones would replace their weights; "
            "load the base again, or call hici.detach(model) first"
        )


def _refuse_options(local: bool, integrator: bool, use_attn_init: bool, ds_config_path: str | None) -> None:
    if integrator and not local:
        raise ValueError(
            "use_local_constructor=False with use_global_integrator=True: global slots are built from local slots; "
            "give use_global_integrator=False too, or leave use_local_constructor=True"
        )
    if use_attn_init:
        raise ValueError(
            f"use_attn_init={use_attn_init}: initial values from the layer's attention are not offered here, and a "
            "checkpoint overwrites all of them; leave it out"
        )
    if ds_config_path is not None:
        raise ValueError(
            f"ds_config_path={ds_config_path!r}: no DeepSpeed config is read here, new modules are made whole on each "
            "layer's device; leave it out, and shard the model after registering"
        )


def _slots(num_local_slots: int | None, num_memory_slots: int | None) -> int:
    given = {count for count in (num_local_slots, num_memory_slots) if count is not None}
    if len(given) == 2:
        raise ValueError(
            f"num_local_slots={num_local_slots} and num_memory_slots={num_memory_slots} are two names of one number; "
            "give one of them"
        )
    return given.pop() if given else HiCIConfig.num_local_slots


def get_registered(model: Any) -> Registered | None:
    """What the drop-in knows of a model (a PEFT model too); None: it did not register it, or it was detached."""
    lm = model.get_base_model() if is_peft(model) else model
    decoder = getattr(lm, "base_model", None)
    return _of_this_attachment(decoder)


def _of_this_attachment(decoder: Any) -> Registered | None:
    """The decoder's registration; None: none, or the modules it was made with are gone (`hici.detach`)."""
    registered: Registered | None = getattr(decoder, "hici_dropin", None)
    attached = getattr(decoder, "hici_attached", None)
    return registered if registered is not None and attached is registered.attached else None


def constants_hook(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the decoder of a registered model, in front of all else: the module's constants as they are now.

    In a compiled model they are those of the last call of `apply_constants`: a graph holds no global values.
    """
    registered = None if torch.compiler.is_compiling() else _of_this_attachment(decoder)
    if registered is None:
        return None
    apply_constants(decoder)
    module = importlib.import_module(registered.module)
    if not (decoder.training and module.MIXED_GROUP_TRAINING and decoder.config._attn_implementation in MODES):
        return None
    if not module.GROUP_SIZE_RATIOS:
        raise ValueError(f"{registered.module}.GROUP_SIZE_RATIOS is empty, but MIXED_GROUP_TRAINING draws from it; "
                         "give ratios like [1/2, 1/4, 1/8]")  # fmt: skip
    counts = [segments_of(registered.module, "GROUP_SIZE_RATIOS", ratio) for ratio in module.GROUP_SIZE_RATIOS]
    if registered.draws is None:
        registered.draws = random.Random(torch.initial_seed())  # as seeded by the user; takes nothing from torch
    return args, {**kwargs, "hici_num_segments": registered.draws.choice(counts)}


def apply_constants(decoder: Any) -> None:
    """Set a registered decoder to what its module asks for now, where that has changed.

    Only what has changed: a mode that the user sets with `set_attn_implementation` stays until `replace_*_attn`
    chooses another.
    """
    registered: Registered = decoder.hici_dropin
    wanted, applied = read_constants(registered), registered.applied
    if wanted == applied:
        return
    if applied is None or wanted.use != applied.use:
        reconfigure(decoder, **wanted.use)
    if applied is None or wanted.choice != applied.choice:
        _set_choice(decoder, registered, wanted.choice)
    registered.applied = wanted


def _set_choice(decoder: Any, registered: Registered, choice: Choice) -> None:
    if choice.attention != FULL:
        set_attention(decoder, choice.attention)
        return
    flash = choice.flash and decoder.dtype in _HALF
    if choice.flash and not flash:
        logger.warning("use_flash_attn=True on a %s model, which flash-attn does not compute; %r is used",
                       decoder.dtype, registered.stock_attention)  # fmt: skip
    stock = "flash_attention_2" if flash else registered.stock_attention
    decoder.set_attn_implementation(stock)
    decoder.hici_attached.stock_attention = stock
    write_config(decoder)


def read_constants(registered: Registered) -> Wanted:
    """What the module's constants and its choice mean for a model.

    Raises:
        ValueError: a constant with an impossible value.
    """
    module = importlib.import_module(registered.module)
    mode = module.CAUSAL_CONTEXT_MODE
    if mode not in CONTEXT_MODES:
        raise ValueError(suggest(str(mode), CONTEXT_MODES, f"{registered.module}.CAUSAL_CONTEXT_MODE"))
    visibility, local = CONTEXT_MODES[mode]
    use = {
        "visibility": visibility,
        "use_global": registered.use_global,
        "use_local": registered.use_local and local,
        "num_segments": None,
        "segment_size": None,
        "decode": "raw",  # the published one, for every mode
    }
    if not module.USE_FIXED_SEGMENT_SIZE:
        use["num_segments"] = segments_of(registered.module, "group_size_ratio", module.group_size_ratio)
    elif module.USE_FULL_ATTN_WITH_HICI:
        use["num_segments"] = 1
    else:
        use["segment_size"] = positive_integer(registered.module, "FIXED_SEGMENT_SIZE", module.FIXED_SEGMENT_SIZE)
    return Wanted(module.CHOICE, use)


def segments_of(module: str, name: str, ratio: Any) -> int:
    """The number of segments of a published group size ratio. Raises ValueError unless it is 1/N."""
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    count = round(1 / ratio) if number and 0 < ratio <= 1 else 0
    if not count or abs(ratio * count - 1) > 1e-6:
        raise ValueError(
            f"{module}.{name}: {ratio!r} is not 1/N for a whole N, but a row is cut into N equal segments; give 1/2, "
            "1/4, ... (segments of a fixed length: USE_FIXED_SEGMENT_SIZE)"
        )
    return count


def positive_integer(module: str, name: str, value: Any) -> int:
    """The value of a constant, checked. Raises ValueError with the constant's name."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{module}.{name}={value!r} is not an integer >= 1; give one")
    return value
