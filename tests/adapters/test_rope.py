"""Context extension through the model's own rope parameters."""

import copy
import itertools
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hici
from helpers import ARCHITECTURES, difference, logits, random_ids, tiny_model
from hici.models.lookup import get_decoder
from hici.rope import (
    check_context,
    check_rope_parameters,
    config_rope_parameters,
    extended_rope,
    far_rope,
    set_rope,
)

REFUSED = (("phi3", "yarn"), ("llama3", "yarn"), ("llama3", "linear"))  # see below
METHODS = [pair for pair in itertools.product(ARCHITECTURES, (None, "auto", "linear", "yarn")) if pair not in REFUSED]


@pytest.mark.parametrize("architecture, method", [(a, m) for a, m in METHODS if a != "llama3"])
def test_extended_in_place_equals_loaded_with_the_parameters(architecture, method, tmp_path):
    model = tiny_model(architecture, max_position_embeddings=32)
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 80)
    stock = logits(model, ids)
    hici.extend_rope(model, 80, method=method)
    # as published: qwen3 divides, the others round up
    assert far_rope(model.config.rope_parameters)["factor"] == (2.5 if architecture == "qwen3" else 3.0)
    assert model.config.max_position_embeddings == 80
    config = AutoConfig.from_pretrained(tmp_path)
    config_rope_parameters(config, extended_rope(config, 80, method), 80)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert difference(logits(model, ids), logits(loaded, ids)) < 1e-5
    assert difference(logits(model, ids), stock) > 0.01
    model.save_pretrained(tmp_path / "extended")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")
    assert difference(logits(again, ids), logits(loaded, ids)) < 1e-5


def test_linear_divides_positions_by_the_factor():
    model = tiny_model(max_position_embeddings=32)
    before = model.model.rotary_emb.inv_freq.clone()
    hici.extend_rope(model, 64)
    assert torch.allclose(model.model.rotary_emb.inv_freq, before / 2)


def test_nothing_happens_within_the_positions():
    model = tiny_model(max_position_embeddings=32)
    rotary = model.model.rotary_emb
    hici.extend_rope(model, 32)
    assert model.model.rotary_emb is rotary
    assert model.config.max_position_embeddings == 32


def test_refusals():
    model = tiny_model(max_position_embeddings=32)
    with pytest.raises(ValueError, match="33 tokens are more than the 32 positions.*extend_rope"):
        check_context(model.config, 33)
    with pytest.raises(ValueError, match="unknown rope method 'linaer'.*Did you mean 'linear'"):
        hici.extend_rope(model, 64, method="linaer")
    with pytest.raises(ValueError, match="rope method 'llama3' on a rope that is not scaled.*use linear or yarn"):
        hici.extend_rope(model, 64, method="llama3")
    hici.extend_rope(model, 64)
    with pytest.raises(ValueError, match="rope method 'yarn', but the model's rope is scaled already by linear.*leave"):
        hici.extend_rope(model, 128, method="yarn")
    assert model.config.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize(
    "rope, message",
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            r"scaled already \(dynamic, 32 positions\), and dynamic has no one factor to extend to 64; give a context "
            "<= 32, or set config.rope_parameters and config.max_position_embeddings yourself",
        ),
        (
            {"rope_type": "yarn", "factor": 4.0},
            r"yarn rope has factor 4, but max_position_embeddings=32 is no more than its "
            r"original_max_position_embeddings=32, so how far it reaches is unknown; set "
            r"config.max_position_embeddings \(for example 128\)",
        ),
        (
            {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
            "longrope has no one factor",
        ),
    ],
    ids=["dynamic", "yarn", "longrope"],
)
def test_what_cannot_be_extended(rope, message):
    model = tiny_model(max_position_embeddings=32, rope_parameters={"rope_theta": 10000.0, **rope})
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        hici.extend_rope(model, 64)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("missing", ["factor", "original_max_position_embeddings"])
def test_a_scaled_rope_that_lacks_a_value(missing):
    config = tiny_model("llama3").config
    config.rope_parameters = {key: value for key, value in config.rope_parameters.items() if key != missing}
    with pytest.raises(ValueError, match=f"llama3 rope lacks {missing}, so it cannot be extended; set it in config"):
        extended_rope(config, 256)


def test_phi3_takes_no_yarn():
    model = tiny_model("phi3", max_position_embeddings=32)
    with pytest.raises(ValueError, match="rope method 'yarn', but transformers' phi3 config takes no other.*'linear'"):
        hici.extend_rope(model, 64, method="yarn")


def _fresh(model):
    """The rotary embedding of a model that is made from a written config."""
    config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
    return get_decoder(type(model)(config)).rotary_emb


def _scaling(rotary):
    names = ("attention_scaling", "full_attention_attention_scaling", "sliding_attention_attention_scaling")
    return {name: getattr(rotary, name) for name in names if hasattr(rotary, name)}


@pytest.mark.parametrize("architecture, method", METHODS)
def test_extended_in_place_equals_a_fresh_model_of_the_config(architecture, method):
    model = tiny_model(architecture, max_position_embeddings=128)
    decoder = get_decoder(model)
    before = {name: buffer.clone() for name, buffer in decoder.rotary_emb.named_buffers()}
    hici.extend_rope(model, 256, method=method)
    fresh = _fresh(model)
    assert dict(decoder.rotary_emb.named_buffers()).keys() == dict(fresh.named_buffers()).keys() == before.keys()
    moved = set()
    for name, buffer in decoder.rotary_emb.named_buffers():
        assert torch.equal(buffer, fresh.get_buffer(name)), name
        if not torch.equal(buffer, before[name]):
            moved.add(name)
    assert _scaling(decoder.rotary_emb) == _scaling(fresh) != {}
    # of Gemma 3 the layers with a window keep their rope
    prefix = "full_attention_" if architecture == "gemma3" else ""
    assert moved == {f"{prefix}inv_freq", f"{prefix}original_inv_freq"}
    if method != "yarn" and architecture != "llama3":
        linear = before[f"{prefix}inv_freq"] / 2
        assert torch.allclose(decoder.rotary_emb.get_buffer(f"{prefix}inv_freq"), linear, rtol=1e-6)
        assert set(_scaling(decoder.rotary_emb).values()) == {1.0}


def test_llama_3_1_is_extended_in_its_own_way():
    own = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = tiny_model(max_position_embeddings=131072, rope_parameters=own).config
    assert extended_rope(config, 131072) == own
    for method in (None, "auto", "llama3"):
        assert extended_rope(config, 262144, method) == {**own, "factor": 16.0}
    assert extended_rope(config, 300000) == {**own, "factor": 24.0}  # 8 times ceil(2.29)
    assert config.rope_parameters == own


@pytest.mark.parametrize("architecture, factor", [("llama", 6.0), ("qwen3", 5.0)])
def test_a_linear_rope_is_extended_again(architecture, factor):
    model = tiny_model(architecture, max_position_embeddings=32)
    hici.extend_rope(model, 64)
    hici.extend_rope(model, 160)
    assert model.config.rope_parameters["factor"] == factor
    once = tiny_model(architecture, max_position_embeddings=32)
    hici.extend_rope(once, 32 * int(factor))
    assert torch.equal(model.model.rotary_emb.inv_freq, once.model.rotary_emb.inv_freq)


def test_yarn_keeps_what_was_set():
    own = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
           "beta_fast": 16.0, "attention_factor": 1.25}  # fmt: skip
    model = tiny_model(max_position_embeddings=128, rope_parameters=own)
    hici.extend_rope(model, 256)
    assert model.config.rope_parameters == {**own, "factor": 8.0}
    assert model.model.rotary_emb.attention_scaling == 1.25
    del own["attention_factor"]
    model = tiny_model(max_position_embeddings=128, rope_parameters=own)
    hici.extend_rope(model, 256)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1 + 0.1 * math.log(8))


def test_phi3_writes_linear_as_a_longrope():
    """transformers' Phi3Config refuses a linear rope, and its generate drops the cache at the original positions."""
    model = tiny_model("phi3", max_position_embeddings=32)
    hici.extend_rope(model, 80)
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["attention_factor"]) == ("longrope", 3.0, 1.0)
    assert rope["short_factor"] == rope["long_factor"] == [3.0] * 6
    assert model.config.original_max_position_embeddings == 96
    ids = random_ids(1, 31)
    with torch.no_grad():
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                                pad_token_id=0)[0]  # fmt: skip
    for i in range(31, 37):
        assert tokens[i] == logits(model, tokens[None, :i])[0, -1].argmax()


def test_the_gemma_3_entry_by_layer_type():
    model = tiny_model("gemma3", max_position_embeddings=32)
    sliding = dict(model.config.rope_parameters["sliding_attention"])
    hici.extend_rope(model, 80)
    assert model.config.rope_parameters["sliding_attention"] == sliding
    assert model.config.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert far_rope(model.config.rope_parameters)["factor"] == 3.0
    hici.extend_rope(model, 160)
    assert far_rope(model.config.rope_parameters)["factor"] == 6.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_new_rope_is_on_the_device_of_the_old_one(architecture):
    model = tiny_model(architecture).to("meta")
    hici.extend_rope(model, 256)
    assert {buffer.device.type for buffer in get_decoder(model).rotary_emb.buffers()} == {"meta"}


def test_set_rope_shares_nothing_with_what_it_is_given():
    model = tiny_model("gemma3")
    given = copy.deepcopy(model.config.rope_parameters)
    set_rope(model, given, 64)
    given["full_attention"]["rope_theta"] = 1.0
    assert model.config.rope_parameters["full_attention"]["rope_theta"] != 1.0


@pytest.mark.parametrize(
    "parameters, missing",
    [
        ({"rope_type": "default", "rope_theta": 1e4}, []),
        ({"rope_type": "default"}, ["rope_theta"]),
        ({}, ["rope_type", "rope_theta"]),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": None}, []),
        (
            {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}},
            ["full_attention.rope_theta", "sliding_attention.rope_type"],
        ),
        ({"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, ["full_attention"]),
    ],
)
def test_what_rope_parameters_lack(parameters, missing):
    assert check_rope_parameters(parameters) == missing
