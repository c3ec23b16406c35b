"""attach / detach / reconfigure: HiCI modules on the attention layers of a Hugging Face model, in place."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hici.attention import Backend, get_backend
from hici.config import HiCIConfig
from hici.core.global_integration import GlobalIntegrator
from hici.core.local_construction import LocalConstructor
from hici.models.architectures import get_architecture
from hici.models.architectures.base import HICI_MODULES, Architecture, is_hici_name
from hici.models.bridge import attention_pre_hook, decoder_post_hook, decoder_pre_hook
from hici.models.fingerprint import Checksum, base_checksums, base_fingerprint
from hici.models.generation_cache import PREPARE, CacheChoice
from hici.models.lookup import (
    HICI,
    MODES,
    attached_decoder,
    attention_mode,
    attention_modules,
    get_causal_lm,
    get_decoder,
    hici_config,
    is_attached,
    is_peft,
)

logger = logging.getLogger(__name__)


@dataclass
class Attached:
    """What detach and save need of the model as it was: kept on the decoder, survives deepcopy and torch.save.

    `arguments`: names of the decoder's arguments in their order, for callers that give them by place.
    """

    stock_attention: str
    base_fingerprint: str
    base_checksums: dict[str, Checksum]
    arguments: tuple[str, ...]
    told_raw_decode: bool = False  # the decoder's hook says once that decoding has no slots
    told_bounded: bool = False  # and once that generation has a HiCICache


def attach(model: Any, config: HiCIConfig | None = None) -> Any:
    """Put HiCI on every attention layer of `model`, in place, and switch it to attention mode "hici".

    New modules are made on each layer's device, in its dtype, with the initial values of the paper; base weights are
    untouched. Choose the mode with `model.set_attn_implementation("hici" | "sdpa" | "hici_s2" | ...)`.

    Args:
        model: a causal LM of transformers of a type with a file in `hici.models.architectures`, not yet wrapped by
            PEFT.
        config: what to attach. None: the one in `model.config.hici` if there is one, else the defaults.

    Returns:
        The same model.

    Raises:
        ValueError: already attached; a PEFT model; a model type without an architecture file, or a model of it that
            HiCI attention cannot follow (soft-capped scores); a config that does not fit the model or names an unknown
            backend. Nothing has changed then.
    """
    _refuse_peft(model)
    architecture = get_architecture(model.config.model_type)
    architecture.check(model.config)
    if config is None:
        config = saved_config(model.config) or HiCIConfig()
    backend = get_backend(config.backend)
    decoder = get_decoder(model)
    if is_attached(model):
        raise ValueError(
            "HiCI is already attached to this model; call hici.detach(model) first, or hici.reconfigure(model, ...) "
            "to change segments, visibility, use of slots or backend"
        )
    config.check_width(model.config.hidden_size)
    _refuse_offloaded(architecture.attention_modules(decoder))
    stock = model.config._attn_implementation
    fingerprint, checksums = _what_the_base_is(model)
    attached = Attached(
        stock_attention=_default_attention(model) if stock in MODES else stock,
        base_fingerprint=fingerprint,
        base_checksums=checksums,
        arguments=tuple(inspect.signature(decoder.forward).parameters),
    )
    seed_rows_KD = _largest_embeddings(model, config.num_global_slots)
    attentions = architecture.attention_modules(decoder)
    # all modules are made before the first is put on: an error (of memory, say) leaves the model as it was
    made = [_make_modules(attention, config, model.config.hidden_size, backend, seed_rows_KD)
            for attention in attentions]  # fmt: skip
    for attention, modules in zip(attentions, made, strict=True):
        _put_on(attention, modules, architecture, config, backend)
    decoder.register_forward_pre_hook(decoder_pre_hook, with_kwargs=True)
    decoder.register_forward_hook(decoder_post_hook, with_kwargs=True)
    decoder.hici_attached = attached
    if hasattr(model, PREPARE):  # what cannot generate needs no cache
        setattr(model, PREPARE, CacheChoice(model))
    model.set_attn_implementation(HICI)
    write_config(model)
    return model


def _default_attention(model: Any) -> str:
    """What transformers would have chosen for a model that was loaded with attn_implementation="hici"."""
    return "sdpa" if model._supports_sdpa else "eager"  # Gemma 2 does not


def detach(model: Any) -> Any:
    """Take the HiCI modules off again, in place: the stock model with the attention it had before `attach`.

    The modules' weights are gone with them: save first what is worth keeping.

    Raises:
        ValueError: nothing is attached; a PEFT model.
    """
    _refuse_peft(model)
    decoder = attached_decoder(model)
    stock_attention = decoder.hici_attached.stock_attention
    for attention in attention_modules(model):
        for name in (*HICI_MODULES, "hici_config", "hici_architecture", "hici_attend"):
            delattr(attention, name)
        _remove_pre_hook(attention, attention_pre_hook)
    _remove_pre_hook(decoder, decoder_pre_hook)
    _remove_hook(decoder, decoder_post_hook)
    del decoder.hici_attached
    vars(model).pop(PREPARE, None)
    for each in _configs(model):
        del each.hici
    model.set_attn_implementation(stock_attention)
    return model


def reconfigure(model: Any, **changes: Any) -> Any:
    """Change how attached modules are used, in place: segments, visibility, use_global, use_local, backend,
    decode.

    Works on a PEFT model too. No weight is touched.

    Raises:
        ValueError: nothing is attached; a change that needs other modules (detach and attach for that).
    """
    attached_decoder(model)
    old = hici_config(model)
    new = old.replace(**changes)
    for name in ("num_local_slots", "num_global_slots", "num_heads", "bottleneck_dim", "compress_dim"):
        _check_same(name, getattr(new, name), getattr(old, name))
    if new.global_width != old.global_width:
        _check_same("integrator_dim", new.integrator_dim, old.integrator_dim)
    backend = get_backend(new.backend)
    for attention in attention_modules(model):
        attention.hici_config = new
        attention.hici_attend = backend.attend
        attention.local_constructor.absorb = backend.absorbed
    write_config(model)
    return model


def remember_base(model: Any) -> None:
    """Take the base weights of an attached model, as they are now, for those that `save_pretrained` compares with."""
    attached = attached_decoder(model).hici_attached
    attached.base_fingerprint, attached.base_checksums = _what_the_base_is(model)


def _what_the_base_is(model: Any) -> tuple[str, dict[str, Checksum]]:
    # a base whose vocabulary has grown is known by what it was (models.vocabulary)
    before = getattr(get_decoder(model), "hici_base_fingerprint", None)
    return before or base_fingerprint(model), base_checksums(model)


def _check_same(name: str, new: int | None, old: int | None) -> None:
    if new != old:
        raise ValueError(f"{name}={new} instead of {old} needs other modules; detach and attach with the new config")


def saved_config(model_config: Any) -> HiCIConfig | None:
    """The HiCIConfig in a transformers config (`config.hici`), or None."""
    values = getattr(model_config, "hici", None)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"config.json: hici={values!r} is no dict of HiCIConfig's fields; copy the file again")
    return HiCIConfig.from_dict({key: value for key, value in values.items() if key != "attention"})


def hici_state_dict(model: Any) -> dict[str, Tensor]:
    """The HiCI parameters under their published names (`model.layers.0.self_attn.local_constructor...`).

    LoRA inside the modules (plain PEFT target names make it) is PEFT's and left out; its base layers are not.
    """
    state = get_causal_lm(model).state_dict()
    hici = {name: tensor for name, tensor in state.items() if is_hici_name(name) and ".lora_" not in name}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in hici.items()}


def _make_modules(
    attention: Any, config: HiCIConfig, hidden_size: int, backend: Backend, seed_rows_KD: Tensor | None
) -> tuple[LocalConstructor, GlobalIntegrator]:
    """The two modules of one layer, on its device and in its dtype, with initial values."""
    device, dtype = _placement(attention)
    local_constructor = LocalConstructor(
        hidden_size,
        config.num_local_slots,
        config.num_heads,
        config.bottleneck_dim,
        absorb=backend.absorbed,
        device=device,
        dtype=dtype,
    )
    global_integrator = GlobalIntegrator(
        hidden_size,
        config.num_global_slots,
        config.num_heads,
        config.global_width,
        config.compress_dim,
        device=device,
        dtype=dtype,
    )
    if seed_rows_KD is not None and device.type != "meta":
        global_integrator.reset_parameters(seed_rows_KD)
    return local_constructor, global_integrator


def _put_on(
    attention: Any,
    modules: tuple[LocalConstructor, GlobalIntegrator],
    architecture: Architecture,
    config: HiCIConfig,
    backend: Backend,
) -> None:
    attention.local_constructor, attention.global_integrator = modules
    attention.hici_config = config
    attention.hici_architecture = architecture
    attention.hici_attend = backend.attend  # found once: torch.compile cannot trace the registry's imports
    attention.register_forward_pre_hook(attention_pre_hook, with_kwargs=True)


def _placement(attention: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the layer; a quantised weight has no usable dtype, then the config's counts."""
    weight = next(attention.parameters())
    usable = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return weight.device, weight.dtype if usable else (attention.config.dtype or torch.get_default_dtype())


def _refuse_offloaded(attentions: list[nn.Module]) -> None:
    """All layers on the meta device is a model without weights; some of them is offload, where nothing can be made."""
    on_meta = [next(attention.parameters()).device.type == "meta" for attention in attentions]
    if any(on_meta) and not all(on_meta):
        raise ValueError(
            f"{sum(on_meta)} of {len(on_meta)} layers are offloaded (no device holds their weights), so HiCI modules "
            "cannot be made beside them; give a device_map that holds the whole model"
        )


def _largest_embeddings(model: Any, count: int) -> Tensor | None:
    """The `count` rows of largest norm of the input embedding; None without one, or without data (meta)."""
    embedding = model.get_input_embeddings()
    if embedding is None or embedding.weight.device.type == "meta" or embedding.weight.shape[0] < count:
        return None
    weight = embedding.weight.detach()
    rows = torch.linalg.vector_norm(weight.float(), dim=1).topk(count).indices
    return weight[rows]


def _configs(model: Any) -> list[Any]:
    """The config objects of the model and its decoder (one object in most models)."""
    configs = [get_causal_lm(model).config, get_decoder(model).config]
    return configs[:1] if configs[0] is configs[1] else configs


def write_config(model: Any) -> None:
    """Write the HiCIConfig and the present attention mode of an attached model into its transformers config.

    transformers tells nobody of `set_attn_implementation`, so the mode is as of the last call of this function
    (`attach`, `reconfigure`, `set_attention`, `save_pretrained`).
    """
    values = hici_config(model).to_dict()
    for each in _configs(model):
        # a plain dict: a dataclass here would break save_pretrained
        each.hici = {**values, "attention": attention_mode(model)}


def _refuse_peft(model: Any) -> None:
    if is_peft(model) or hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} is a PEFT model, but HiCI goes below PEFT; attach to the plain model first and "
            "wrap it then (to detach: merge_and_unload() or unload() first)"
        )


def _remove_pre_hook(module: nn.Module, hook: Any) -> None:
    # by identity: a handle kept on the module would not survive deepcopy
    for key, registered in list(module._forward_pre_hooks.items()):
        if registered is hook:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _remove_hook(module: nn.Module, hook: Any) -> None:
    for key, registered in list(module._forward_hooks.items()):
        if registered is hook:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
