"""A cheap fingerprint of a base model's own weights, so that an adapter is not put on another base."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from hici.models.architectures.base import is_hici_name

_SAMPLES = 64


@torch.no_grad()
def base_fingerprint(model: Any) -> str:
    """SHA-256 over names, shapes and 64 evenly spaced values of every floating base tensor of a plain causal LM.

    Values are rounded to bfloat16 first, so the same weights loaded as float32 and as bfloat16 agree. HiCI modules
    are left out. "unknown" when a tensor has no data (meta device) or is quantised.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if is_hici_name(name):
            continue
        if tensor.device.type == "meta" or not tensor.is_floating_point():
            return "unknown"
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(_sample(tensor).tobytes())
    return "sha256:" + digest.hexdigest()


def _sample(tensor: Tensor) -> Any:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].to(torch.bfloat16).float().cpu().numpy()
