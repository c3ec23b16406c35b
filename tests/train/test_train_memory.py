"""Optimizers with 8-bit state, and quantised bases: what trains, what stays, and what is refused."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import hici
from helpers import logits, random_ids, small_config, strong_model, tiny_model
from hici.adapters.lora import trainable_parameters
from hici.models.lookup import get_decoder
from hici.models.loss import next_token_loss
from hici.models.quantized import QUANTIZATIONS, load_quantized, quantization_config
from hici.models.tiled_mlp import tile_mlp
from hici.train.optimizers import OPTIMIZERS, create_optimizer_class
from hici.train.recipe import CHOICES

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes: pip install 'hici[quantization]'"
)


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
    assert CHOICES["quantization"] == QUANTIZATIONS


def test_adamw_is_torchs():
    assert create_optimizer_class("adamw") == (torch.optim.AdamW, {})


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_state_trains_as_whole_state_does(name):
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


# rows of whole blocks of 64: bitsandbytes' kernels for some CPUs pack no others
SHAPE = {"tie_word_embeddings": True, "intermediate_size": 128}


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny_model(**SHAPE).save_pretrained(directory)
    return str(directory)


def prepared(base_directory, quantization):
    """As `hici train` prepares it: all that trains in float32, checkpointed, MLPs in tiles."""
    torch.manual_seed(0)
    base = load_quantized(base_directory, quantization, dtype=torch.bfloat16)
    hici.attach(base, small_config(visibility="past"))
    model = hici.add_lora(base).train()
    for group in trainable_parameters(model):
        for parameter in group:
            parameter.data = parameter.data.float()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tile_mlp(base, 7)
    return model


def frozen(model):
    """The base's weights, and what belongs to packed ones."""
    return {name: tensor.clone() for name, tensor in get_decoder(model).state_dict().items()
            if ".mlp." in name or ".base_layer." in name or "original_module" in name}  # fmt: skip


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("quantization, layer", [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_a_quantised_base_trains_and_stays(base_directory, tmp_path, quantization, layer):
    model = prepared(base_directory, quantization)
    assert type(get_decoder(model).layers[1].mlp.down_proj).__name__ == layer
    assert {p.dtype for group in trainable_parameters(model) for p in group} == {torch.float32}
    before = frozen(model)
    assert len({tensor.dtype for tensor in before.values()}) > 1  # packed ones are among them
    ids, found = random_ids(4, 29), []
    optimizer = torch.optim.AdamW([p for g in trainable_parameters(model) for p in g], lr=3e-3)
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, count = next_token_loss(model, ids)
        optimizer.zero_grad()
        (total / count).backward()
        assert all(p.grad is not None for group in trainable_parameters(model) for p in group)
        optimizer.step()
        found.append((total / count).item())
    assert found[-1] < found[0] - 0.5
    after = frozen(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    hici.save_pretrained(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "adapter_model.safetensors").stat().st_size < 2**18
    expected = losses_without_gradient(model.eval(), ids)
    again = hici.from_pretrained(
        tmp_path / "ours",
        attention="hici",
        dtype=torch.float32,
        quantization_config=quantization_config(base_directory, quantization, torch.float32),
    )
    assert type(get_decoder(again).layers[1].mlp.down_proj).__name__ == layer
    assert losses_without_gradient(again, ids) == pytest.approx(expected, abs=0.05)
    whole = hici.from_pretrained(tmp_path / "ours", attention="hici", dtype=torch.float32)
    assert type(get_decoder(whole).layers[1].mlp.down_proj) is torch.nn.Linear
    assert losses_without_gradient(whole, ids) == pytest.approx(expected, abs=0.5)
    assert not torch.equal(logits(whole, ids), logits(again, ids))


def losses_without_gradient(model, ids):
    with torch.no_grad():
        total, count = next_token_loss(model, ids)
    return (total / count).item()


def test_no_quantisation_is_the_plain_model(base_directory):
    model = load_quantized(base_directory, "none", dtype=torch.float32)
    assert torch.equal(logits(model, random_ids(1, 9)), logits(tiny_model(**SHAPE), random_ids(1, 9)))


def test_refusals_of_quantisation(base_directory, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="quantization '5bit'.*4bit"):
        load_quantized(base_directory, "5bit", dtype=torch.float32)
    config = json.loads((Path(base_directory) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if importlib.util.find_spec("bitsandbytes"):
        message = f"quantization='4bit', but the weights of {tmp_path} are quantised already (gptq); give 'none'"
        with pytest.raises(ValueError, match=re.escape(message)):
            load_quantized(str(tmp_path), "4bit", dtype=torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"quantization='8bit' needs bitsandbytes \(.*\); pip install 'hici\[quantization\]', or give 'none'"
    with pytest.raises(ValueError, match=message):
        load_quantized(base_directory, "8bit", dtype=torch.float32)
