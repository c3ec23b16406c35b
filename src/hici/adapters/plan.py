"""From what a directory holds and a base's config to all that a loaded model will be, tried without any weights.

Every error about names, shapes, rope or vocabulary comes from here, before the base's weights are read or touched.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from hici.adapters.contents import Contents, config_of, is_lora_name
from hici.adapters.file_names import LORA_CONFIG_FILE
from hici.adapters.hub import context_of_name
from hici.config import HiCIConfig
from hici.models.architectures import get_architecture
from hici.models.architectures.base import is_hici_name
from hici.models.attach import attach, hici_state_dict
from hici.models.load import first_line, meta_model
from hici.models.lookup import is_peft
from hici.models.vocabulary import grow_rows
from hici.rope import extended_rope

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a base becomes.

    Attributes:
        contents: the adapter.
        hici: config of the HiCI modules; None: there are none (LongLoRA).
        rope_parameters, positions, context_length: of the adapted model.
        vocab_size: rows of its embeddings.
        modules_to_save: what was trained whole, by PEFT's names for it.
        tied: the base's output layer is its embedding.
        head: the output layer's name, where it is tied in the base, and the adapter makes it another than the
            embedding; else None.
        scaling: LoRA's factor of B A, by the module that it wraps.
        shapes: of all tensors of the adapted model (LoRA apart), under their plain names.
    """

    contents: Contents
    hici: HiCIConfig | None
    rope_parameters: dict[str, Any]
    positions: int
    context_length: int
    vocab_size: int
    modules_to_save: list[str]
    tied: bool
    head: str | None = None
    scaling: dict[str, float] = dataclasses.field(default_factory=dict)
    shapes: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def lora_config(self) -> Any:
        """PEFT's config for the adapted model; None without LoRA.

        Raises:
            ValueError: adapter_config.json is no LoRA config of the installed PEFT.
        """
        if self.contents.lora_config is None:
            return None
        from peft import LoraConfig

        file = self.contents.directory / LORA_CONFIG_FILE
        try:
            config = LoraConfig.from_pretrained(str(self.contents.directory))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is not a LoRA config ({error}); copy the file again") from error
        config.inference_mode = True
        if self.contents.layout == "released":  # its config does not say what trainable_params.bin holds
            config.modules_to_save = self.modules_to_save or None
            config.ensure_weight_tying = self.tied and any("embed" in name for name in self.modules_to_save)
        return config


def make_plan(
    contents: Contents,
    model_config: Any,
    *,
    context_length: int | None = None,
    config: HiCIConfig | dict[str, Any] | None = None,
) -> Plan:
    """Plan an adapter onto a base of that transformers config, with a dry run on the meta device.

    Raises:
        ValueError: another base (type, width, layers, vocabulary, key/value heads); a tensor missing, left over or of
            another shape; an unknown or too short context; LoRA of another rank than its config says.
    """
    record = contents.record
    if record is not None and model_config.model_type != record.base_model_type:
        raise ValueError(
            f"{contents.directory} was made on {record.base_model!r} ({record.base_model_type}), but this base is "
            f"{model_config.name_or_path!r} ({model_config.model_type}); give the base that it was made on"
        )
    get_architecture(model_config.model_type)
    hici = config_of(contents, config) if contents.has_hici else None
    if hici is None and config is not None:
        raise ValueError(f"config is given, but {contents.directory} holds no HiCI modules; leave it out")
    meta = meta_model(model_config)
    check_rank(contents)
    _check_base(contents, meta)
    rope, positions, context = _rope(contents, model_config, context_length)
    plan = Plan(
        contents=contents,
        hici=hici,
        rope_parameters=rope,
        positions=positions,
        context_length=context,
        vocab_size=_vocabulary(contents, meta),
        modules_to_save=_modules_to_save(contents, meta),
        tied=bool(model_config.tie_word_embeddings),
    )
    return _dry_run(plan, meta)


def wrap_in_peft(model: Any, plan: Plan) -> Any:
    """The model under PEFT with fresh LoRA and copies, to be filled; the model itself where there is no LoRA."""
    from peft import get_peft_model

    config = plan.lora_config()
    if config is None:
        return model
    config.base_model_name_or_path = model.config.name_or_path  # checked already; PEFT would warn of a new path
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def peft_tensors(wrapped: Any) -> dict[str, Tensor]:
    """PEFT's part of a model by plain names: LoRA, and the whole trained copies; nothing on a plain model."""
    if not is_peft(wrapped):
        return {}
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


def _dry_run(plan: Plan, meta: Any) -> Plan:
    """Build the adapted model on the meta device and compare every name and shape."""
    grow_rows(meta, plan.vocab_size)
    if plan.hici is not None:
        attach(meta, plan.hici)
    shapes = {name: list(tensor.shape) for name, tensor in _own_tensors(meta).items()}
    expected = dict(hici_state_dict(meta)) if plan.hici is not None else {}
    try:
        with torch.device("meta"):  # PEFT makes the copy of a tied head anew
            wrapped = wrap_in_peft(meta, plan)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{plan.contents.directory / LORA_CONFIG_FILE} does not fit {meta.config.name_or_path!r} "
            f"({first_line(error)}); give the base that it was made on, or copy the file again"
        ) from error
    expected |= peft_tensors(wrapped)
    check_tensors({name: list(tensor.shape) for name, tensor in expected.items()}, plan.contents)
    scaling = {}
    if is_peft(wrapped):
        for name, module in wrapped.get_base_model().named_modules():
            factors = getattr(module, "scaling", None)  # a dict on PEFT's layers, a number on attention modules
            if isinstance(factors, dict) and "default" in factors:
                scaling[name] = float(factors["default"])
    head = _untied_head(meta) if plan.tied else None
    return dataclasses.replace(plan, scaling=scaling, shapes=shapes, head=head)


def _untied_head(model: Any) -> str | None:
    """The output layer's name when its weight is no longer the embedding's: trained apart, or left behind by it."""
    head = model.get_output_embeddings()
    if _weight_in_use(head) is _weight_in_use(model.get_input_embeddings()) and not hasattr(head, "lora_A"):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _weight_in_use(module: Any) -> Any:
    copies = getattr(module, "modules_to_save", None)  # of PEFT's wrapper
    if copies is not None and "default" in copies:
        return copies["default"].weight
    return module.base_layer.weight if hasattr(module, "base_layer") else module.weight


def _own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters (tied ones once) and saved buffers of a model, HiCI modules under their published shapes."""
    names = {name for name, _ in model.named_parameters()}
    buffers = {name for name, _ in model.named_buffers()}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name in names or name in buffers}


def check_tensors(expected: dict[str, list[int]], contents: Contents) -> None:
    """Raise ValueError unless the contents have exactly the expected names and shapes; lists what differs, by file."""
    tensors = contents.tensors
    problems = [(name, "missing") for name in sorted(set(expected) - set(tensors))]
    problems += [(name, "left over") for name in sorted(set(tensors) - set(expected))]
    problems += [
        (name, f"shape {list(tensors[name].shape)} instead of {expected[name]}")
        for name in sorted(set(tensors) & set(expected))
        if list(tensors[name].shape) != expected[name]
    ]
    if problems:
        files = ", ".join(sorted({contents.file_of(name).name for name, _ in problems}))
        raise ValueError(
            f"{contents.directory}: {files} does not fit the model, so nothing of it was loaded. {len(problems)} "
            "problems, first ones: "
            + "; ".join(f"{problem}: {name}" for name, problem in problems[:8])
            + ". Give the config and base that it was saved with, or copy the files again"
        )


def check_rank(contents: Contents) -> None:
    """Raise ValueError when LoRA tensors have another rank than adapter_config.json says."""
    config = contents.lora_config or {}
    if config.get("rank_pattern"):
        return  # ranks by module; the dry run compares them
    for name, tensor in contents.lora.items():
        rank = tensor.shape[0] if ".lora_A." in name else tensor.shape[-1]
        if (".lora_A." in name or ".lora_B." in name) and rank != config["r"]:
            raise ValueError(
                f"{contents.directory}: adapter_config.json says r={config['r']}, but {name} in "
                f"{contents.file_of(name).name} has rank {rank}; copy both files again from the same training"
            )


def _check_base(contents: Contents, meta: Any) -> None:
    """The usual wrong bases, by what makes them wrong; the dry run finds all others."""
    config, where = meta.config, contents.directory
    base = f"the base {config.name_or_path!r} ({config.model_type})"
    remedy = "give the base that it was made on"
    layers = max((int(found) for name in contents.tensors for found in _LAYER.findall(name)), default=-1) + 1
    if layers and layers != config.num_hidden_layers:
        raise ValueError(f"{where} is an adapter for {layers} layers, but {base} has {config.num_hidden_layers}; "
                         f"{remedy}")  # fmt: skip
    modules = {name for name, _ in meta.named_modules()}
    of_adapter = {_module_of(name) for name in contents.tensors}
    if of_adapter and not of_adapter & modules:  # a single stranger is left to the dry run
        raise ValueError(f"{where} is an adapter of another architecture: {min(of_adapter)} is no module of {base}; "
                         f"{remedy}")  # fmt: skip
    widths = {
        tensor.shape[1]
        for name, tensor in contents.tensors.items()
        if name.endswith(("embed_tokens.weight", "embed_in.weight", ".memory_slots")) and tensor.dim() == 2
    }
    if len(widths) == 1 and widths != {config.hidden_size}:
        raise ValueError(f"{where} is an adapter for hidden size {widths.pop()}, but {base} has {config.hidden_size}; "
                         f"{remedy}")  # fmt: skip
    _check_kv_heads(contents, meta, base, remedy)


def _check_kv_heads(contents: Contents, meta: Any, base: str, remedy: str) -> None:
    for name, tensor in contents.lora.items():
        if name.endswith(("self_attn.k_proj.lora_B.weight", "self_attn.v_proj.lora_B.weight")):
            rows, module = tensor.shape[0], meta.get_submodule(_module_of(name))
            head_dim = meta.get_submodule(_module_of(name).rpartition(".")[0]).head_dim
            if rows != module.out_features:
                raise ValueError(
                    f"{contents.directory} is an adapter for {rows / head_dim:g} key/value heads of {head_dim} "
                    f"({name}), but {base} has {module.out_features // head_dim}; {remedy}"
                )


def _module_of(name: str) -> str:
    """The base's own module that a tensor belongs to; for one of a HiCI module the attention around it."""
    if is_hici_name(name):
        return re.split(r"\.(?:local_constructor|global_integrator)\.", name)[0]
    return name.split(".lora_")[0] if is_lora_name(name) else name.rpartition(".")[0]


def _rope(contents: Contents, model_config: Any, context_length: int | None) -> tuple[dict[str, Any], int, int]:
    """(rope parameters, positions, context) of the adapted model."""
    record, positions = contents.record, model_config.max_position_embeddings
    if context_length is not None and (type(context_length) is not int or context_length < 1):
        raise ValueError(f"context_length={context_length!r} is not an integer >= 1; give the number of tokens")
    if record is not None:
        if context_length not in (None, record.context_length):
            raise ValueError(
                f"context_length={context_length}, but {contents.directory} records {record.context_length}; leave it "
                "out (hici.extend_rope(model, ...) extends a loaded model further)"
            )
        return dict(record.rope_parameters), record.max_position_embeddings, record.context_length
    context = context_length if context_length is not None else context_of_name(contents.name)
    if context is None:
        raise ValueError(
            f"{contents.name} does not tell the context that it was trained for, which rope needs: no file of the "
            "released format holds it, and the name does not end like -16k; give context_length (--context-length)"
        )
    if context < positions:
        raise ValueError(
            f"a context of {context} is shorter than the {positions} positions of the base "
            f"{model_config.name_or_path!r}; give the context that the adapter was trained for"
        )
    if _scaled_by_hand(model_config, context):
        return dict(model_config.rope_parameters), context, context
    return extended_rope(model_config, context), context, context


def _scaled_by_hand(model_config: Any, context: int) -> bool:
    """Whether somebody has set the published factor on the base's config already, as the published scripts do."""
    rope, positions = model_config.rope_parameters, model_config.max_position_embeddings
    factor = context / positions
    if get_architecture(model_config.model_type).whole_rope_factor:
        factor = math.ceil(factor)
    return rope.get("rope_type") == "linear" and context > positions and rope["factor"] == factor


def _vocabulary(contents: Contents, meta: Any) -> int:
    """Rows of the adapted model's embeddings."""
    own = int(meta.get_input_embeddings().weight.shape[0])
    embedding = next(name for name, module in meta.named_modules() if module is meta.get_input_embeddings())
    trained = contents.tensors.get(f"{embedding}.weight")
    recorded = None if contents.record is None else contents.record.vocab_size
    size = next((s for s in (recorded, None if trained is None else int(trained.shape[0])) if s is not None), own)
    if trained is not None and trained.shape[0] != size:
        raise ValueError(f"{contents.directory / 'hici_config.json'}: vocab_size={size}, but the embeddings have "
                         f"{trained.shape[0]} rows; copy both files again")  # fmt: skip
    if size < own:
        raise ValueError(
            f"{contents.directory} is an adapter for a vocabulary of {size} entries, but the base "
            f"{meta.config.name_or_path!r} has {own}; give the base that it was made on"
        )
    return size


def _modules_to_save(contents: Contents, meta: Any) -> list[str]:
    """PEFT's names for the modules that were trained whole.

    A released directory says nowhere what it should hold: its training trains the embeddings and all norms, so that a
    lost one is missed. What else is there comes by its full name.
    """
    if contents.layout == "hici":
        return list((contents.lora_config or {}).get("modules_to_save") or [])
    if contents.record is not None and contents.record.modules_to_save is not None:
        return contents.record.modules_to_save
    architecture = get_architecture(meta.config.model_type)
    names = [architecture.embeddings, *architecture.norms]
    own = meta.state_dict().keys()  # PEFT would wrap what is above a stray name; it shows as left over later
    others = {name.rpartition(".")[0] for name in contents.saved if name in own}
    return names + sorted(module for module in others if not module.endswith(tuple(names)))
