"""What a base model's own weights were: a fingerprint for other processes, checksums for this one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hici.models.architectures.base import is_hici_name

_SAMPLES = 64

Checksum = tuple[str, int]  # dtype, and the sum of the tensor's bits


@torch.no_grad()
def base_fingerprint(model: Any) -> str:
    """SHA-256 over names, shapes and 64 evenly spaced values of every floating base tensor of a plain causal LM.

    Values are rounded to bfloat16 first, so the same weights loaded as float32 and as bfloat16 agree. HiCI modules
    are left out. "unknown" when a tensor has no data (meta device) or is quantised.
    """
    return fingerprint(model.state_dict().items())


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`base_fingerprint` of a model's tensors by name, wherever they come from; they are read one at a time."""
    digests = {}
    for name, tensor in tensors:
        if is_hici_name(name):
            continue
        if tensor.device.type == "meta" or not tensor.is_floating_point():
            return "unknown"
        digests[name] = (f"{name}{list(tensor.shape)}".encode(), _sample(tensor).tobytes())
    whole = hashlib.sha256()
    for _, parts in sorted(digests.items()):
        for part in parts:
            whole.update(part)
    return "sha256:" + whole.hexdigest()


def _sample(tensor: Tensor) -> Any:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].to(torch.bfloat16).float().cpu().numpy()


@torch.no_grad()
def base_checksums(model: Any) -> dict[str, Checksum]:
    """A checksum over all bits of every base tensor of a causal LM, under its name before PEFT wrapped it.

    Left out: HiCI modules, LoRA and PEFT's trained copies; layers that LoRA wraps (merging and unmerging rounds them);
    tensors without data (meta device).
    """
    left_out = (".lora_", ".base_layer.", ".modules_to_save.")
    return {
        name.replace(".original_module.", "."): (str(tensor.dtype), _sum_of_bits(tensor))
        for name, tensor in model.state_dict().items()
        if not is_hici_name(name) and not any(x in name for x in left_out) and tensor.device.type != "meta"
    }


def _sum_of_bits(tensor: Tensor) -> int:
    """Sum of the tensor's bytes, read as integers as wide as they go: sees every change of one element."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    wide = flat.view(torch.int64) if flat.numel() % 8 == 0 and flat.data_ptr() % 8 == 0 else flat
    return int(wide.sum(dtype=torch.int64))


def changed_tensors(before: dict[str, Checksum], now: dict[str, Checksum]) -> list[str]:
    """Names in `now` whose bits are others than before. A tensor cast to another dtype cannot be compared."""
    same_dtype = {name: sums for name, sums in now.items() if name not in before or before[name][0] == sums[0]}
    return [name for name, sums in same_dtype.items() if before.get(name) != sums]


@torch.no_grad()
def model_fingerprint(model: Any, *, hici_modules: bool = True) -> str:
    """SHA-256 of all that a model's keys and values depend on: a sample of every tensor (LoRA too), and rope.

    The same weights in float32 and in bfloat16 agree, as in `base_fingerprint`.
    """
    rope = getattr(model.config, "rope_parameters", None)
    whole = hashlib.sha256(f"{model.config.model_type} {sorted((rope or {}).items())}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if is_hici_name(name) and not hici_modules:
            continue
        if tensor.device.type == "meta":
            raise ValueError(f"{name} has no data here (offloaded), so the model cannot be told from another; load it "
                             "whole")  # fmt: skip
        whole.update(f"{name}{list(tensor.shape)}".encode())
        whole.update(_sample(tensor).tobytes())
    return "sha256:" + whole.hexdigest()


@torch.no_grad()
def weights_checksum(model: Any, *, hici_modules: bool = True) -> str:
    """SHA-256 over name, dtype, shape and sum of bits of every tensor of a model: one changed number changes it.

    Fingerprints look at a sample, rounded, so that they survive a change of dtype; this says that it is the very model.
    "unknown" when a tensor has no data here (offloaded).
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            return "unknown"
        if hici_modules or not is_hici_name(name):
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} {_sum_of_bits(tensor)}\n".encode())
    return "sha256:" + whole.hexdigest()
