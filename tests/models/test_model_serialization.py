"""deepcopy, torch.save, and config.hici through transformers' own config files."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import ARCHITECTURES, logits, padded, random_ids, randomise, small_config, strong_model, tiny_model
from hici import HiCIConfig, attach, detach, reconfigure
from hici.models.attach import saved_config
from hici.models.fingerprint import base_fingerprint
from hici.models.lookup import hici_config


@pytest.fixture
def inputs():
    return padded([random_ids(1, 29)[0], random_ids(1, 13)[0]], "left")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_deepcopy(architecture, inputs):
    model = strong_model(architecture, visibility="past")
    expected = logits(model, *inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, *inputs), expected)
    randomise(model, seed=5)  # the copy shares nothing
    reconfigure(model, visibility="all")
    assert torch.equal(logits(twin, *inputs), expected)
    assert hici_config(twin).visibility == "past"
    detach(twin)
    assert not any(m._forward_pre_hooks for m in twin.modules())
    assert any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_torch_save_of_the_whole_model(tmp_path, architecture, inputs):
    model = strong_model(architecture, visibility="past")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded, *inputs), logits(model, *inputs))
    detach(loaded)


def test_config_round_trip(tmp_path):
    config = small_config(visibility="past", use_local=False)
    model = attach(tiny_model(), config)
    assert type(model.config.hici) is dict
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hici"] == {**config.to_dict(), "attention": "hici"}
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded.hici) is dict
    assert saved_config(loaded) == config
    fresh = AutoModelForCausalLM.from_config(loaded)
    attach(fresh)  # no config given: the model's own counts
    assert hici_config(fresh) == config


def test_save_pretrained_of_an_attached_model(tmp_path, inputs):
    model = strong_model(visibility="past")
    expected = logits(model, *inputs)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    attach(base)
    base.load_state_dict(weights, strict=True)
    assert hici_config(base) == hici_config(model)
    assert torch.equal(logits(base, *inputs), expected)


def test_saved_config_of_a_stock_model_is_none():
    assert saved_config(tiny_model().config) is None


def test_attach_without_any_config_takes_the_defaults():
    model = tiny_model()
    attach(model)
    assert hici_config(model) == HiCIConfig()


def test_a_given_config_counts_more_than_the_saved_one():
    model = tiny_model()
    model.config.hici = small_config().to_dict()
    attach(model, small_config(visibility="past"))
    assert hici_config(model).visibility == "past"
    assert model.config.hici["visibility"] == "past"


def test_fingerprint():
    model = tiny_model()
    expected = base_fingerprint(model)
    assert expected.startswith("sha256:")
    assert base_fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == expected
    attach(model, small_config())
    assert base_fingerprint(model) == expected
    assert model.model.hici_attached.base_fingerprint == expected
    detach(model)
    assert base_fingerprint(model) == expected
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    assert base_fingerprint(model) != expected
