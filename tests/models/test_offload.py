"""Checkpoints in the CPU's memory: the same gradients, and what is on the device when. On CUDA: tests/gpu."""

import copy
import pickle
import re

import pytest
import torch

from helpers import ARCHITECTURES, assert_same_gradients, loss_and_gradients, random_ids, strong_model, tiny_model
from hici import add_lora
from hici.models import offload
from hici.models.offload import IN_FLIGHT, OffloadedCheckpoint, StreamTransfers, offload_checkpoints
from hici.models.tiled_mlp import tile_mlp

IDS = random_ids(2, 29)


class Recorded:
    """Transfers of a pretended device: a copy is filled only when it is waited for, as late as a stream may be."""

    def __init__(self):
        self.events = []
        self.copies = []

    def to_cpu(self, tensor):
        copy = torch.full_like(tensor, float("nan"))
        self.events.append(("to_cpu", len(self.copies)))
        self.copies.append(copy)
        return copy, ("to_cpu", len(self.copies) - 1, tensor, copy)

    def to_device(self, copy, device):
        tensor = torch.full_like(copy, float("nan"))
        number = next(i for i, made in enumerate(self.copies) if made is copy)
        self.events.append(("to_device", number))
        return tensor, ("to_device", number, copy, tensor)

    def wait(self, device, what):
        name, number, source, target = what
        self.events.append((f"wait_{name}", number))
        target.copy_(source)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_checkpointing_bit_for_bit(architecture, monkeypatch):
    monkeypatch.setattr(offload, "IN_FLIGHT", 0)  # (two layers would both still be there)
    model = strong_model(architecture, visibility="past").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected_loss, expected = loss_and_gradients(model, IDS)
    transfers = Recorded()
    offload_checkpoints(model, transfers=transfers)
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, IDS)
        assert torch.equal(loss, expected_loss)
        assert_same_gradients(gradients, expected, 0)
    for name in ("to_cpu", "wait_to_cpu", "to_device", "wait_to_device"):
        assert sorted(number for event, number in transfers.events if event == name) == [0, 1, 2, 3]


def test_what_is_on_the_device_when():
    """Sources stay for two layers, the copies back set out one layer ahead."""
    assert IN_FLIGHT == 2
    model = tiny_model(num_hidden_layers=5).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, expected = loss_and_gradients(model, IDS)
    transfers = Recorded()
    offload_checkpoints(model, transfers=transfers)
    assert_same_gradients(loss_and_gradients(model, IDS)[1], expected, 0)
    assert transfers.events == [
        ("to_cpu", 0),
        ("to_cpu", 1),
        ("to_cpu", 2), ("wait_to_cpu", 0),
        ("to_cpu", 3), ("wait_to_cpu", 1),
        ("to_cpu", 4), ("wait_to_cpu", 2),
        # layers 4 and 3 are still there
        ("to_device", 2),
        ("wait_to_device", 2), ("to_device", 1),
        ("wait_to_device", 1), ("to_device", 0),
        ("wait_to_device", 0),
    ]  # fmt: skip
    function = model.model.layers[0]._gradient_checkpointing_func
    assert function._last() is None  # nothing is held when the step is over


def test_backward_twice_with_add_lora_and_tiles():
    model = strong_model(visibility="past")
    tile_mlp(model, 5)
    wrapped = add_lora(model).train()
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    expected_loss, expected = loss_and_gradients(wrapped, IDS)
    offload_checkpoints(wrapped, transfers=Recorded())
    wrapped.zero_grad()
    loss = wrapped(IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    gradients = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(gradients, expected, 0)
    loss.backward()
    twice = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert_same_gradients(twice, {name: 2 * gradient for name, gradient in gradients.items()}, 1e-6)


def test_turned_off_and_copied():
    model = strong_model(visibility="past").train()
    _, expected = loss_and_gradients(model, IDS)
    transfers = Recorded()
    offload_checkpoints(model, transfers=transfers)
    twin = copy.deepcopy(model)
    assert_same_gradients(loss_and_gradients(twin, IDS)[1], expected, 2e-4)
    function = twin.model.layers[0]._gradient_checkpointing_func
    assert isinstance(function, OffloadedCheckpoint)
    assert function is twin.model.layers[1]._gradient_checkpointing_func  # one for all: the order is theirs
    assert function.transfers.events == [("to_cpu", 0), ("to_cpu", 1)]
    assert transfers.events == []
    model.eval()
    model(IDS, labels=IDS).loss.backward()
    model.train()
    model.gradient_checkpointing_disable()
    loss_and_gradients(model, IDS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_and_gradients(model, IDS)
    with torch.no_grad():
        offload_checkpoints(model, transfers=transfers)
        model(IDS)
    assert transfers.events == []


def test_the_function_can_be_pickled():
    """(A checkpointed model of transformers 5.23 as a whole cannot: a hook of its own is a local function.)"""
    function = OffloadedCheckpoint(StreamTransfers())
    function.transfers.streams["cuda:0"] = object()
    again = pickle.loads(pickle.dumps(function))
    assert again.transfers.streams == {}
    assert again._last is None


def test_only_from_a_gpu():
    model = tiny_model().train()
    message = (
        "offload_checkpoints=True, but the model is on cpu: only from a CUDA device can checkpoints move to the CPU's "
        "memory; take it out (checkpointing alone stays), or move the model to a GPU"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        offload_checkpoints(model)
    assert not model.is_gradient_checkpointing
