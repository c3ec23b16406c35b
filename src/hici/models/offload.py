"""Gradient checkpointing whose saved layer inputs lie in the CPU's memory.

With checkpointing, what a step holds that grows with the context is the input of every layer (4 B T L D bytes). Here
each is copied to pinned memory while the next layers compute, and back while the layer behind it is differentiated:
on the device lie those of about two layers. transformers (5.23) has an offload of its own, whose copies hold up the
computation; this one runs on a stream beside it, and on every supported version.

The function is given to each layer as transformers' `_gradient_checkpointing_func`: nothing process-wide changes, and
`gradient_checkpointing_disable` or `gradient_checkpointing_enable` undo it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hici.models.lookup import get_causal_lm

IN_FLIGHT = 2  # copies to the CPU whose sources are still held


def offload_checkpoints(model: Any, *, transfers: Transfers | None = None) -> None:
    """Turn on gradient checkpointing (not reentrant) with the saved inputs in the CPU's memory, in place.

    Args:
        model: on CUDA devices; below or above PEFT.
        transfers: how tensors get to the CPU and back; None: copies on a stream of their own.

    Raises:
        ValueError: a part of the model is not on a CUDA device. Nothing has changed then.
    """
    lm = get_causal_lm(model)
    if transfers is None:
        others = {parameter.device.type for parameter in lm.parameters()} - {"cuda"}
        if others:
            raise ValueError(
                f"offload_checkpoints=True, but the model is on {', '.join(sorted(others))}: only from a CUDA device "
                "can checkpoints move to the CPU's memory; take it out (checkpointing alone stays), or move the model "
                "to a GPU"
            )
        transfers = StreamTransfers()
    enable_checkpointing(lm)
    function = OffloadedCheckpoint(transfers)
    for module in lm.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function


def enable_checkpointing(model: Any) -> None:
    """Turn on gradient checkpointing (not reentrant) of every layer, in place, under the name that transformers has."""
    lm = get_causal_lm(model)
    if hasattr(lm, "activation_checkpointing_enable"):  # the other name warns then
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Transfers(Protocol):
    """Copies between a device and the CPU; each returns at once what `wait` makes safe to use."""

    def to_cpu(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """(copy in the CPU's memory, what to wait for)."""

    def to_device(self, copy: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """(copy on the device, what to wait for)."""

    def wait(self, device: torch.device, what: Any) -> None:
        """What is computed on the device from now on comes after that copy."""


class StreamTransfers:
    """Copies on one stream a device beside the one that computes; pinned memory comes from torch's cache of it."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"streams": {}}  # a stream is of this process

    def to_cpu(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """(pinned copy, event)."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return copy, self._copy(copy, tensor, tensor.device)

    def to_device(self, copy: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """(copy on the device, event)."""
        tensor = torch.empty_like(copy, device=device)
        return tensor, self._copy(tensor, copy, device)

    def _copy(self, target: Tensor, source: Tensor, device: torch.device) -> Any:
        """After all that is queued now: it made the source, or last used the target's memory."""
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        stream = self.streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, device: torch.device, what: Any) -> None:
        """The computing stream waits; this thread does not."""
        torch.cuda.current_stream(device).wait_event(what)


class Entry:
    """One saved tensor: its copy in the CPU's memory, and on the device what is on its way there or back.

    `before`: the one saved before it, which the backward pass wants next.
    """

    def __init__(self, tensor: Tensor, transfers: Transfers, before: Entry | None) -> None:
        self.transfers = transfers
        self.device = tensor.device
        self.before = before
        self.source: Tensor | None = tensor  # held until the copy is made: its memory must not be used again earlier
        self.copy, self.event = transfers.to_cpu(tensor)
        self.fetched: tuple[Tensor, Any] | None = None

    def release(self) -> None:
        """Give up the source, once its copy is made."""
        if self.source is not None:
            self.transfers.wait(self.device, self.event)
            self.source = None

    def fetch(self) -> None:
        """Start the copy back, if the tensor is not on the device."""
        if self.source is None and self.fetched is None:
            self.fetched = self.transfers.to_device(self.copy, self.device)

    def get(self) -> Tensor:
        """The tensor on the device; the one before it sets out."""
        self.fetch()
        if self.source is not None:
            tensor = self.source
        else:
            assert self.fetched is not None
            tensor, event = self.fetched
            self.transfers.wait(self.device, event)
            self.fetched = None  # a second backward pass would copy it again
        if self.before is not None:
            self.before.fetch()
        return tensor


class OffloadedCheckpoint:
    """torch's checkpoint (not reentrant) that keeps its inputs as `Entry`s. One for all layers of a model."""

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self._last: weakref.ref[Entry] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"transfers": self.transfers, "_last": None}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), differentiable; called again in the backward pass."""
        # these hooks get what the checkpoint itself keeps, its arguments; what `function` saves meets the checkpoint's
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def _pack(self, tensor: Tensor) -> Entry | Tensor:
        # a checkpoint also keeps an empty tensor of its own, on the CPU
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        before = None if self._last is None else self._last()
        entry = Entry(tensor, self.transfers, before)
        self._last = weakref.ref(entry)
        oldest: Entry | None = entry
        for _ in range(IN_FLIGHT):
            oldest = None if oldest is None else oldest.before
        if oldest is not None:
            oldest.release()
        return entry

    @staticmethod
    def _unpack(kept: Entry | Tensor) -> Tensor:
        return kept.get() if isinstance(kept, Entry) else kept
