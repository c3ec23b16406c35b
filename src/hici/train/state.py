"""Trained weights and optimizer state as whole tensors by name, from and into any engine's way of holding them.

One process and DDP hold them whole, FSDP2 as DTensors, ZeRO-3 in its own way. What is written is always whole, on the
CPU, under the model's own names, so that a checkpoint of one can be resumed by another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_PAGED = ("state1", "state2")  # bitsandbytes' moments


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that gets gradients, each once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def is_sharded(model: nn.Module) -> bool:
    """Whether an engine holds parts of the parameters only (FSDP2, DeepSpeed's ZeRO-3)."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def count_numbers(parameters: list[Any]) -> int:
    """How many numbers they hold, over all processes."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor | None:
    """A tensor with all of its shards, on the CPU, in memory of its own; None unless `keep`.

    All processes must call it together, also those that do not keep it.
    """
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True).contiguous() if keep else None
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True).contiguous() if keep else None


def gather_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Every trained parameter, whole; nothing unless `keep`. All processes must call it together."""
    gathered = {name: whole(parameter, keep=keep) for name, parameter in trained(model)}
    return {name: tensor for name, tensor in gathered.items() if tensor is not None}


@torch.no_grad()
def restore_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put trained parameters back, bit for bit.

    Raises:
        ValueError: a parameter too few or too many, or of another shape.
    """
    parameters = dict(trained(model))
    _check_names(set(parameters), set(weights), "trained parameters")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"the checkpoint holds {name} as {list(weights[name].shape)}, but the model has it as "
                f"{list(parameter.shape)}; resume with the recipe that wrote it"
            )
        _copy(parameter, weights[name])


def gather_optimizer(
    optimizer: Any, model: nn.Module, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors "NAME/KEY" of the state, plain values of it and of the groups); no tensors unless `keep`.

    All processes must call it together.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"state": {}, "groups": []}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        plain["groups"].append({**settings, "params": [names[parameter] for parameter in group["params"]]})
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    full = whole(value, keep=keep)
                    if full is not None:
                        tensors[f"{names[parameter]}/{key}"] = full
                else:
                    plain["state"].setdefault(names[parameter], {})[key] = value
    return tensors, plain


def restore_optimizer(optimizer: Any, model: nn.Module, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put an optimizer's state and its groups' settings back, bit for bit.

    Raises:
        ValueError: other groups of parameters than the checkpoint's.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in plain["groups"]]
    if held != saved:
        sizes = [len(group) for group in saved], [len(group) for group in held]
        raise ValueError(
            f"the checkpoint's optimizer has groups of {sizes[0]} parameters, but this run's has {sizes[1]}, or other "
            "ones; resume with the recipe that wrote it"
        )
    by_parameter: dict[str, dict[str, Any]] = {name: dict(values) for name, values in plain["state"].items()}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        by_parameter.setdefault(name, {})[entry] = tensor
    for group, settings in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
        for parameter in group["params"]:
            entries = by_parameter.get(names[parameter], {})
            optimizer.state[parameter] = {
                key: _placed(value, parameter, key, optimizer) for key, value in entries.items()
            }


def _placed(value: Any, parameter: Tensor, key: str, optimizer: Any) -> Any:
    """A state's entry where the optimizer keeps it: moments beside their parameter, AdamW's step counter on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return _shards(value, parameter)
    own = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's
    if getattr(own, "is_paged", False) and key in _PAGED:  # memory that bitsandbytes can move to the CPU's
        return own.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.clone() if key == "step" else value.to(parameter.device, copy=True)


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(_shards(value, parameter).to_local())
    else:
        parameter.copy_(value)


def _shards(value: Tensor, like: DTensor) -> DTensor:
    """A whole tensor as `like` is held: divided in the same way, on the same device (FSDP's may be the CPU)."""
    mesh, place = like.device_mesh, like.to_local().device
    shards = distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    if shards.to_local().device == place:
        return shards
    local = shards.to_local().to(place)
    return DTensor.from_local(local, mesh, like.placements, shape=value.shape, stride=value.stride())


def _check_names(have: set[str], saved: set[str], what: str) -> None:
    if have != saved:
        missing, extra = sorted(have - saved), sorted(saved - have)
        raise ValueError(
            f"the checkpoint lacks {len(missing)} {what} ({', '.join(missing[:2])}) and has {len(extra)} others "
            f"({', '.join(extra[:2])}); resume with the recipe that wrote it"
        )


def random_state() -> dict[str, Any]:
    """Every generator that training may use, as plain values and tensors (so that weights_only reads them)."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random(state: dict[str, Any]) -> None:
    """Put every generator back."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
