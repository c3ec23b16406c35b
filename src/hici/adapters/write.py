"""Writing the two layouts of an adapter directory, and what stands beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hici.adapters.contents import PEFT_PREFIX, is_lora_name, is_module_name
from hici.adapters.file_names import (
    HICI_FILE,
    LORA_CONFIG_FILE,
    LORA_FILE,
    PICKLED_LORA_FILE,
    RECORD_FILE,
    TRAINABLE_FILE,
)
from hici.adapters.record import Record
from hici.files import write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)

# what the PEFT of the published code (0.5) knows of a LoRA config
_PUBLISHED_KEYS = (
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "revision", "target_modules", "task_type",
)  # fmt: skip


def write_hici(directory: Path, tensors: dict[str, Tensor], lora_config: Any, record: Record) -> None:
    """Our layout into an existing directory. `lora_config`: PEFT's LoraConfig; None: there is no LoRA."""
    modules = {name: tensor for name, tensor in tensors.items() if is_module_name(name)}
    if lora_config is not None:
        lora_config.save_pretrained(str(directory))
        rest = {PEFT_PREFIX + name: tensor for name, tensor in tensors.items() if name not in modules}
        save_file(_plain(rest), directory / LORA_FILE, metadata={"format": "pt"})
    save_file(_plain(modules), directory / HICI_FILE, metadata={"format": "pt"})
    write_json(directory / RECORD_FILE, record.to_dict())


def write_released(directory: Path, tensors: dict[str, Tensor], lora_config: Any, record: Record) -> None:
    """The released layout, as the published code reads it, with our record beside it.

    Raises:
        ValueError: LoRA settings that the published code cannot express.
    """
    values = _published_lora_config(lora_config)
    lora = {PEFT_PREFIX + name: tensor for name, tensor in tensors.items() if is_lora_name(name)}
    rest = {name: tensor for name, tensor in tensors.items() if not is_lora_name(name)}
    write_json(directory / LORA_CONFIG_FILE, values)
    torch.save(_plain(lora), directory / PICKLED_LORA_FILE)
    torch.save(_plain(rest), directory / TRAINABLE_FILE)
    write_json(directory / RECORD_FILE, record.to_dict())


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a directory's tokenizer files; returns their names (none: there is no tokenizer)."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not set(names) & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}:
        return []
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with storage of its own, as both file formats want them."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    return own


def _published_lora_config(lora_config: Any) -> dict[str, Any]:
    if lora_config is None:
        raise ValueError("the released format holds a LoRA adapter, but this one has none; keep it in our format")
    plain = type(lora_config)()
    values = lora_config.to_dict()
    ours_alone = ("task_type", "peft_version", "ensure_weight_tying", "runtime_config", *_PUBLISHED_KEYS)
    special = [key for key, value in values.items() if key not in ours_alone and value != plain.to_dict().get(key)]
    if special:
        raise ValueError(
            f"the released format cannot express {', '.join(f'{key}={values[key]}' for key in special)} of this "
            "adapter's LoRA config; keep it in our format"
        )
    published = {key: values.get(key) for key in _PUBLISHED_KEYS}
    published |= {"modules_to_save": None, "inference_mode": True}  # whole weights are in trainable_params.bin
    if isinstance(published["target_modules"], set):
        published["target_modules"] = sorted(published["target_modules"])
    return json.loads(json.dumps(published, default=str))
