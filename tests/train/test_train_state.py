"""Trained weights, optimizers and generators through a checkpoint, bit for bit."""

import copy
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hici.files import read_json, write_json
from hici.train.state import (
    gather_optimizer,
    gather_weights,
    random_state,
    restore_optimizer,
    restore_random,
    restore_weights,
)


def make_model():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 16))
    model[2].bias.requires_grad_(False)
    return model


def make_optimizer(model, kind="adamw"):
    first, *rest = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": rest}, {"params": [first], "lr": 0.5}]
    options = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.01}
    if kind == "adamw":
        return torch.optim.AdamW(groups, **options)
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(groups, **options)


def train_steps(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 64, generator=generator)).square().sum().backward()
        optimizer.step()


def through_disk(model, optimizer, directory):
    """What a checkpoint keeps of them."""
    tensors, plain = gather_optimizer(optimizer, model)
    save_file(gather_weights(model), directory / "w.safetensors")
    save_file(tensors, directory / "o.safetensors")
    write_json(directory / "o.json", plain)
    return (
        load_file(directory / "w.safetensors"),
        load_file(directory / "o.safetensors"),
        read_json(directory / "o.json"),
    )


def bitsandbytes_works_here():
    try:
        model = make_model()
        train_steps(model, make_optimizer(model, "adamw_8bit"), 1, 0)
    except (RuntimeError, NotImplementedError, AttributeError):  # its kernels are not there for every machine
        return False
    return True


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_an_optimizer_goes_on_bit_for_bit(kind, tmp_path):
    if kind != "adamw":
        pytest.importorskip("bitsandbytes")
        if not bitsandbytes_works_here():
            pytest.skip("bitsandbytes has no 8-bit AdamW for this machine")
    model = make_model()
    optimizer = make_optimizer(model, kind)
    train_steps(model, optimizer, 3, seed=0)
    optimizer.param_groups[1]["lr"] = 0.25
    weights, tensors, plain = through_disk(model, optimizer, tmp_path)
    if kind != "adamw":
        assert any(tensor.dtype == torch.uint8 for tensor in tensors.values())  # large ones are really in 8 bits
    train_steps(model, optimizer, 3, seed=1)

    again = make_model()
    restore_weights(again, weights)
    other = make_optimizer(again, kind)
    restore_optimizer(other, again, tensors, plain)
    assert other.param_groups[1]["lr"] == 0.25
    train_steps(again, other, 3, seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name


def test_an_optimizer_without_its_state_would_go_elsewhere(tmp_path):
    """So that the test above can fail."""
    model = make_model()
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, 3, seed=0)
    again = copy.deepcopy(model)
    train_steps(model, optimizer, 3, seed=1)
    train_steps(again, make_optimizer(again), 3, seed=1)
    assert not torch.equal(model[0].weight, again[0].weight)


def test_only_trained_weights_and_their_own_memory():
    model = make_model()
    weights = gather_weights(model)
    assert list(weights) == ["0.weight", "0.bias", "2.weight"]
    model[0].weight.data.zero_()
    assert weights["0.weight"].abs().max() > 0


def test_restored_tensors_are_copies_of_the_checkpoints(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, 1, seed=0)
    tensors, plain = gather_optimizer(optimizer, model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_optimizer(optimizer, model, tensors, plain)
    train_steps(model, optimizer, 1, seed=0)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_weights_of_another_model_are_refused():
    model = make_model()
    weights = gather_weights(model)
    with pytest.raises(ValueError, match="lacks 1 trained parameters .2.weight. and has 0 others.*recipe that wrote"):
        restore_weights(model, {name: w for name, w in weights.items() if name != "2.weight"})
    with pytest.raises(ValueError, match="lacks 0 trained parameters .* and has 1 others .other."):
        restore_weights(model, {**weights, "other": torch.zeros(1)})
    shape = {**weights, "0.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="holds 0.bias as .3., but the model has it as .80."):
        restore_weights(model, shape)


def test_an_optimizer_of_other_groups_is_refused():
    model = make_model()
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, 1, seed=0)
    tensors, plain = gather_optimizer(optimizer, model)
    one_group = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"groups of \[2, 1\] parameters, but this run's has \[3\].*recipe that wrote"):
        restore_optimizer(one_group, model, tensors, plain)


def test_every_generator_is_put_back(tmp_path):
    def draw():
        return random.random(), np.random.random(), np.random.standard_normal(), torch.rand(()).item()

    np.random.standard_normal()  # leaves the second of a pair behind
    torch.save(random_state(), tmp_path / "r.pt")
    expected = [draw() for _ in range(3)]
    restore_random(torch.load(tmp_path / "r.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected
