"""A HiCICache in a file: a long document read once, questions asked many times.

One safetensors file: the tensors of every layer (`layers.0.keys`, ...), without the space that is kept free; in its
metadata, under `hici_cache`, a JSON with the format's version, HiCIConfig, the model's fingerprint, tokens of every
row, what the caller said about it, and how it was made.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hici.core.global_integration import RunningStatistics
from hici.core.local_construction import RunningConstruction
from hici.files import atomic_file
from hici.models.cache_layer import LayerState
from hici.provenance import provenance

if TYPE_CHECKING:
    from hici.models.cache import HiCICache

FORMAT_VERSION = 1
_KEY = "hici_cache"
_KEYS = ("hici", "model_fingerprint", "tokens", "columns", "farthest", "layers", "about", "tensors_sha256", "made_with")
_GROUPS: dict[str, Any] = {"construction": RunningConstruction, "statistics": RunningStatistics}


def save(cache: HiCICache, path: str | Path, *, about: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Write a cache to `path`, whole or not at all.

    Args:
        about: JSON values to find again (`read_about`): what was read, for example.
        overwrite: replace a file that is there.

    Raises:
        ValueError: the file exists; the cache holds nothing; a call stopped in its middle; the model is gone.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists, and nothing is overwritten silently; give another name or overwrite=True")
    if not cache.tokens:
        raise ValueError("the HiCICache is empty; read something with it before saving it")
    states = cache.snapshot().states
    tensors = {f"layers.{i}.{name}": tensor.contiguous()
               for i, state in enumerate(states) for name, tensor in state.tensors().items()}  # fmt: skip
    values = {
        "format_version": FORMAT_VERSION,
        "hici": cache.config.to_dict(),
        "model_fingerprint": cache.model_fingerprint(),
        "tokens": cache.tokens,
        "columns": cache.get_seq_length(),
        "farthest": cache.layers[0].state.farthest,
        "layers": len(cache.layers),
        "about": about or {},
        "tensors_sha256": _hash(tensors),
        "made_with": provenance(),
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(values)})
    return path


def load(cache: HiCICache, path: str | Path) -> HiCICache:
    """Fill an empty cache, made for the model that is to read on, from a file of `save`.

    Raises:
        ValueError: no such file, or not of this kind; another model, config or dtype than it was made with; damaged.
    """
    values, tensors = _read(Path(path), load_tensors=True)
    theirs, ours = values["hici"], cache.config.to_dict()
    for name in ours:
        if name != "backend" and theirs.get(name) != ours[name]:
            raise ValueError(
                f"{path} was made with {name}={theirs.get(name)!r}, but the model has {ours[name]!r}; reconfigure the "
                "model, or read the tokens again"
            )
    if values["model_fingerprint"] != cache.model_fingerprint():
        raise ValueError(
            f"{path} was made with another model (other weights or rope); load that model, or read the tokens again"
        )
    if values["layers"] != len(cache.layers):
        raise ValueError(f"{path} has {values['layers']} layers, but the model has {len(cache.layers)}; copy it again")
    for i, (layer, (device, dtype)) in enumerate(zip(cache.layers, cache.placements(), strict=True)):
        named = {name.removeprefix(f"layers.{i}."): x.to(device)
                 for name, x in tensors.items() if name.startswith(f"layers.{i}.")}  # fmt: skip
        if "values" in named and named["values"].dtype not in (dtype, autocast_dtype(device)):
            raise ValueError(
                f"{path} was made in {named['values'].dtype}, but the model is in {dtype}; load the model with "
                f"dtype={named['values'].dtype}, or read the tokens again"
            )
        layer.state = _state(Path(path), i, layer.num_slots, named, values)
    if values["tensors_sha256"] != _hash(tensors):
        raise ValueError(f"{path} is damaged (its tensors are not those that were written); copy it again")
    return cache


def autocast_dtype(device: Any) -> Any:
    """The dtype in which a cache is made under autocast; None outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def read_about(path: str | Path) -> dict[str, Any]:
    """What `save` was told about the file."""
    return dict(_read(Path(path), load_tensors=False)[0]["about"])


def _read(path: Path, *, load_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it should be a file that HiCICache.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if load_tensors else {}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy it again") from error
    if _KEY not in metadata:
        raise ValueError(f"{path} is no HiCICache (its metadata lacks {_KEY}); give a file that HiCICache.save wrote")
    try:
        values = json.loads(metadata[_KEY])
        version = values["format_version"]
        if version == FORMAT_VERSION:
            missing = [key for key in _KEYS if key not in values]
            if missing:
                raise KeyError(", ".join(missing))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged (its metadata: {error}); copy it again") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, but this hici reads {FORMAT_VERSION}; install the hici that wrote "
            "it, or read the tokens again"
        )
    return values, tensors


def _hash(tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _state(path: Path, i: int, num_slots: int, named: dict[str, Tensor], values: dict[str, Any]) -> LayerState:
    missing = [name for name in ("keys", "values") if name not in named]
    groups: dict[str, Any] = {}
    for group, kind in _GROUPS.items():
        fields = [name for name in kind._fields if name in named]
        needed = bool(num_slots) and (
            group == "construction" or max(values["tokens"]) >= values["hici"]["segment_size"]
        )
        if fields or needed:
            missing += [name for name in kind._fields if name not in named]
            groups[group] = None if missing else kind(*(named[name] for name in kind._fields))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} of layer {i}; copy it again")
    rows, size = len(values["tokens"]), values["hici"]["segment_size"]
    kept = num_slots + max(tokens % size for tokens in values["tokens"])
    for name, tensor in named.items():
        if tensor.shape[0] != rows or (name in ("keys", "values") and tensor.shape[2] != kept):
            raise ValueError(
                f"{path} is damaged: {name} of layer {i} is {list(tensor.shape)} for {rows} rows and {kept} kept "
                "places; copy it again"
            )
    return LayerState(
        list(values["tokens"]), values["columns"], values["farthest"], named["keys"], named["values"], **groups
    )
