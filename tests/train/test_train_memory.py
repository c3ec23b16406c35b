"""Optimizers with 8-bit state, and quantised bases: what trains, what stays, and what is refused."""

import re
import sys

import pytest
import torch

from helpers import random_ids, strong_model
from hici.train.optimizers import OPTIMIZERS, create_optimizer_class
from hici.train.recipe import CHOICES


def losses(model, optimizer, steps=8):
    ids, found = random_ids(4, 29), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_recipe_knows_these():
    assert CHOICES["optimizer"] == OPTIMIZERS


def test_adamw_is_torchs():
    assert create_optimizer_class("adamw") == (torch.optim.AdamW, {})


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_state_trains_as_whole_state_does(name):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'hici[quantization]'")
    results = {}
    for optimizer_name in ("adamw", name):
        model = strong_model(visibility="past").train()
        cls, options = create_optimizer_class(optimizer_name)
        optimizer = cls(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, **options)
        results[optimizer_name] = losses(model, optimizer)
    assert results[name][-1] < results[name][0] - 0.5
    assert results[name][-1] == pytest.approx(results["adamw"][-1], abs=0.05)
    state = optimizer.state[model.get_parameter("model.layers.0.mlp.up_proj.weight")]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="optimizer 'adamw8bit'.*adamw_8bit"):
        create_optimizer_class("adamw8bit")


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = "optimizer='adamw_8bit' needs bitsandbytes (import of bitsandbytes halted; None in sys.modules); pip "
    message += "install 'hici[quantization]', or give 'adamw'"
    with pytest.raises(ValueError, match=re.escape(message)):
        create_optimizer_class("adamw_8bit")
