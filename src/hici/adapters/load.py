"""from_pretrained: a directory of ours, a released one, LongLoRA's or a merged one, completely or not at all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hici.adapters.base_files import fingerprints_on_disk
from hici.adapters.contents import Contents, read_contents
from hici.adapters.hub import find_directory
from hici.adapters.plan import Plan, make_plan, wrap_in_peft
from hici.config import HiCIConfig
from hici.models.attach import attach, detach, hici_state_dict, remember_base
from hici.models.fingerprint import base_fingerprint
from hici.models.load import floating_dtype, load_config, load_plain_model
from hici.models.lookup import FULL, HICI, get_decoder, is_attached, is_peft
from hici.models.merged import is_merged_directory, load_merged
from hici.models.modes import set_attention
from hici.models.vocabulary import grow_rows, shrink_vocabulary, vocabulary_weights
from hici.registry import suggest
from hici.rope import set_rope

logger = logging.getLogger(__name__)

ATTENTIONS = (FULL, HICI)


def from_pretrained(
    path_or_hub_id: str | Path,
    base_model: Any = None,
    context_length: int | None = None,
    attention: str = "full",
    config: HiCIConfig | dict[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    *,
    revision: str | None = None,
    quantization_config: Any = None,
) -> Any:
    """A trained model: base, rope, vocabulary, HiCI modules, LoRA, embeddings and norms, in eval mode.

    Reads what `hici.save_pretrained` wrote, the released format (`adapter_model.bin` or `.safetensors` with
    `trainable_params.bin`), LongLoRA's (the same without HiCI modules), and what `hici merge --as hici` wrote.

    Args:
        path_or_hub_id: a directory, or a name on the Hugging Face hub (downloaded by huggingface_hub).
        base_model: name or path of the base, or a plain loaded model (used in place). None: the recorded name.
        context_length: tokens that a released adapter was trained for; None: what its name tells (-16k is 16 x 1024).
            Rope is scaled by ceil(context / the base's positions).
        attention: "full" (the model's stock attention) or "hici".
        config: use of the modules (segments, visibility, ...) and, for a released adapter, `num_heads`, which is in
            no file (8 where it is not given, logged). A HiCIConfig's fields at their defaults count as not given.
        dtype, device_map: as in transformers' from_pretrained; None: the base's own dtype, CPU. Not with a loaded
            `base_model`, which has its own. `hici train` saves float32; on a bfloat16 base that is rounded (logged),
            and small changes of weights near 1, such as the norms', may vanish. `torch.float32` keeps all of it.
        revision: of the adapter on the hub.
        quantization_config: as in transformers (4 or 8 bits), for the base.

    Returns:
        A PeftModel where LoRA was saved, else the plain causal LM; nothing in it requires gradients.

    Raises:
        ValueError: a missing, damaged or foreign file; a tensor missing, left over, of another shape, NaN or
            infinite; another base; an unknown or too short context; an unknown key. A loaded `base_model` is then as
            it was.
    """
    if attention not in ATTENTIONS:
        raise ValueError(suggest(str(attention), ATTENTIONS, "attention"))
    floating_dtype(dtype)
    directory = find_directory(path_or_hub_id, revision)
    if is_merged_directory(directory):
        _refuse_for_merged(directory, base_model=base_model, context_length=context_length)
        return load_merged(directory, attention, config, dtype, device_map, quantization_config)
    contents = read_contents(directory, str(path_or_hub_id))
    if attention == HICI and not contents.has_hici:
        raise ValueError(f"attention 'hici', but {directory} holds no HiCI modules (a LongLoRA adapter); use 'full'")
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model, plan = _base_and_plan(contents, base_model, options, context_length, config)
    wrapped = install(model, plan)
    if plan.hici is not None:
        set_attention(wrapped, attention)
    return wrapped.requires_grad_(False).eval()


def _base_and_plan(
    contents: Contents,
    base_model: Any,
    options: dict[str, Any],
    context_length: int | None,
    config: HiCIConfig | dict[str, Any] | None,
) -> tuple[Any, Plan]:
    """The base, untouched, and what it becomes; planned before the weights are read."""
    loaded = _is_model(base_model)
    if loaded:
        _refuse_used_base(base_model, options)
        base_config = base_model.config
    else:
        name = base_name(contents, base_model)
        with _base_errors(name, contents):
            base_config = load_config(name)
    plan = make_plan(contents, base_config, context_length=context_length, config=config)
    # a merged base may hold modules of its own: the adapter's come in their place
    model = base_model if loaded else load_plain_model(name, **options, drop_modules=plan.hici is not None)
    _check_base_weights(model, contents)
    return model, plan


def _check_base_weights(model: Any, contents: Contents) -> None:
    """The recorded base, as it is loaded; or both as its files have it, read in another dtype."""
    found, name = base_fingerprint(model), str(model.config.name_or_path)
    recorded = None if contents.record is None else contents.record.base_fingerprint
    if recorded not in (None, "unknown", found) and found != "unknown":
        on_disk = fingerprints_on_disk(name, model.config)
        if recorded in on_disk and found in on_disk:
            return
    check_fingerprint(found, contents, name)


def install(model: Any, plan: Plan) -> Any:
    """Turn a base into the adapted model, in place: rope, vocabulary, HiCI modules, LoRA. The plan has been tried.

    `model` may have the modules attached already (the drop-in's). On an error, an interrupt too, it is as it was.

    Raises:
        ValueError: layers without a device to fill them on (offload).
    """
    undo = _remember(model)
    try:
        if (dict(model.config.rope_parameters), model.config.max_position_embeddings) != (
            plan.rope_parameters, plan.positions,
        ):  # fmt: skip
            set_rope(model, plan.rope_parameters, plan.positions)
        grow_rows(model, plan.vocab_size)
        if plan.hici is not None:
            if is_attached(model):
                remember_base(model)
            else:
                attach(model, plan.hici)
            _load_modules(model, plan.contents)
        wrapped = wrap_in_peft(model, plan)
        _load_peft(wrapped, plan.contents)
    except BaseException:
        _undo(model, undo)
        raise
    _tell_rounding(plan.contents, model.dtype)
    return wrapped


def base_name(contents: Contents, given: Any = None) -> str:
    """The base of an adapter: the given name, or the recorded one. Raises ValueError when nothing tells it."""
    if given is not None:
        return str(Path(given).expanduser()) if Path(str(given)).expanduser().is_dir() else str(given)
    recorded = contents.record.base_model if contents.record is not None else None
    if recorded is None and contents.lora_config is not None:
        recorded = contents.lora_config.get("base_model_name_or_path")
    if not recorded:
        raise ValueError(f"{contents.directory} does not record the name of its base model; give base_model= "
                         "(--base-model)")  # fmt: skip
    return str(recorded)


def _is_model(base_model: Any) -> bool:
    return base_model is not None and not isinstance(base_model, (str, Path))


def _refuse_used_base(model: Any, options: dict[str, Any]) -> None:
    if not hasattr(model, "config"):
        raise ValueError(f"base_model is a {type(model).__name__}, but it must be a causal LM of transformers, or its "
                         "name")  # fmt: skip
    if is_peft(model) or hasattr(model, "peft_config") or is_attached(model):
        raise ValueError("base_model is attached or wrapped already; give the plain base model or its name")
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} with a loaded base_model, which has both already; leave them out, or "
                         "give the base's name")  # fmt: skip


def _refuse_for_merged(directory: Path, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value}, but {directory} is a merged model, which has its own; leave it out")


@contextlib.contextmanager
def _base_errors(name: str, contents: Contents) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"the base model {name!r} of {contents.directory} could not be loaded ({error}); give base_model= "
            "(--base-model) a directory or hub name that holds it"
        ) from error


def check_fingerprint(found: str, contents: Contents, base: str) -> None:
    """Whether a base's weights are those that the adapter was made on; a released adapter does not tell.

    Raises:
        ValueError: they are others.
    """
    record = contents.record
    if record is None:
        return
    if "unknown" in (found, record.base_fingerprint):
        logger.warning(
            "the base of %s is quantised or without data, here or where it was made: whether it is the right one is "
            "checked by names and shapes only", contents.directory,
        )  # fmt: skip
    elif found != record.base_fingerprint:
        raise ValueError(
            f"{contents.directory} was made on {record.base_model!r} (fingerprint {record.base_fingerprint}), but this "
            f"base is {base!r} ({found}); give the base that it was made on"
        )


def _load_modules(model: Any, contents: Contents) -> None:
    if any(tensor.device.type == "meta" for tensor in hici_state_dict(model).values()):
        raise ValueError("device_map keeps layers off every device (offload), where HiCI modules cannot be filled; "
                         "give a device_map that holds the whole model")  # fmt: skip
    # not strict: the base's own weights are not in the file; the dry run compared every name of the HiCI part
    unexpected = model.load_state_dict(contents.hici, strict=False).unexpected_keys
    assert not unexpected


def _load_peft(wrapped: Any, contents: Contents) -> None:
    if not is_peft(wrapped):
        return
    from peft import set_peft_model_state_dict

    tensors = {f"base_model.model.{name}": tensor for name, tensor in {**contents.saved, **contents.lora}.items()}
    result = set_peft_model_state_dict(wrapped, tensors)
    assert not result.unexpected_keys  # the dry run compared every name


def _tell_rounding(contents: Contents, dtype: torch.dtype) -> None:
    tensors = contents.tensors
    finer = [n for n, t in tensors.items() if t.is_floating_point() and torch.promote_types(t.dtype, dtype) != dtype]
    if finer:
        logger.warning(
            "%d of %d tensors of %s are finer than the base's %s and were rounded to it (%s, ...); dtype=torch.float32 "
            "keeps them exactly", len(finer), len(tensors), contents.directory, dtype, finer[0],
        )  # fmt: skip


def _remember(model: Any) -> dict[str, Any]:
    attached = is_attached(model)
    return {
        "modules": dict(model.named_modules()),
        "configs": [
            (config, dict(vars(config))) for config in {id(m.config): m.config for m in _configured(model)}.values()
        ],
        "vocabulary": vocabulary_weights(model),
        "trained": [(parameter, parameter.requires_grad) for parameter in model.parameters()],
        "base": _base_of(model) if attached else None,
        "hici": {name: tensor.clone() for name, tensor in hici_state_dict(model).items()} if attached else None,
    }


def _base_of(model: Any) -> tuple[str, Any]:
    attached = get_decoder(model).hici_attached
    return attached.base_fingerprint, attached.base_checksums


def _configured(model: Any) -> list[Any]:
    return [model, get_decoder(model)]


def _undo(model: Any, before: dict[str, Any]) -> None:
    """Put the model's own modules back (PEFT's unload would leave its copies of embeddings and norms)."""
    for name, module in before["modules"].items():
        if _submodule(model, name) is not module:
            model.set_submodule(name, module)
    if hasattr(model, "peft_config"):
        del model.peft_config
    if before["hici"] is not None:
        model.load_state_dict(before["hici"], strict=False)  # the base's own weights are not in it
        attached = get_decoder(model).hici_attached
        attached.base_fingerprint, attached.base_checksums = before["base"]
    elif is_attached(model):
        detach(model)
    if any(module.weight is not weight for module, weight in before["vocabulary"]):
        shrink_vocabulary(model, before["vocabulary"])
    for config, values in before["configs"]:
        vars(config).clear()
        vars(config).update(values)
    for parameter, trained in before["trained"]:  # PEFT froze them
        parameter.requires_grad_(trained)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
