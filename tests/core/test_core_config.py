"""HiCIConfig: every refusal with value, rule and remedy; replace; to and from dict; parameter counts."""

import dataclasses
import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hici import HiCIConfig, attach
from hici.core.global_integration import GlobalIntegrator
from hici.core.local_construction import LocalConstructor
from hici.registry import suggest

REFUSALS = {
    "heads-0": ({"num_heads": 0}, "num_heads=0 is not an integer >= 1; give one"),
    "heads-none": ({"num_heads": None}, "num_heads=None is not an integer >= 1; give one"),
    "heads-float": ({"num_heads": 8.0}, "num_heads=8.0 is not an integer >= 1; give one"),
    "heads-true": ({"num_heads": True}, "num_heads=True is not an integer >= 1; give one"),
    "bottleneck-0": ({"bottleneck_dim": 0}, "bottleneck_dim=0 is not an integer >= 1 or None; give one"),
    "compress-text": ({"compress_dim": "128"}, "compress_dim='128' is not an integer >= 1 or None; give one"),
    "segments-0": ({"num_segments": 0}, "num_segments=0 is not an integer >= 1 or None; give one"),
    "segment-size-negative": ({"segment_size": -4}, "segment_size=-4 is not an integer >= 1 or None; give one"),
    "integrator-0": ({"integrator_dim": 0}, "integrator_dim=0 is not an integer >= 1 or None; give one"),
    "local-negative": ({"num_local_slots": -1}, "num_local_slots=-1 is not an integer >= 0; give one"),
    "global-none": ({"num_global_slots": None}, "num_global_slots=None is not an integer >= 0; give one"),
    "use-global-text": ({"use_global": "no"}, "use_global='no' is not true or false; give one of the two"),
    "use-local-1": ({"use_local": 1}, "use_local=1 is not true or false; give one of the two"),
    "visibility": (
        {"visibility": "pasts"},
        "unknown visibility 'pasts'; known: all, current, past. Did you mean 'past'?",
    ),
    "visibility-none": ({"visibility": None}, "unknown visibility 'None'; known: all, current, past."),
    "backend": ({"backend": 3}, "backend=3 is not a name; give 'auto' or a backend's name"),
    "both-segments": (
        {"num_segments": 4, "segment_size": 16},
        "num_segments=4 and segment_size=16 are both given, but each one decides the segments alone; give one of them "
        "and leave the other None",
    ),
    "no-width": (
        {"bottleneck_dim": None},
        "bottleneck_dim=None (no bottleneck in local construction) leaves the width of global integration open; give "
        "integrator_dim",
    ),
    "bottleneck-heads": (
        {"bottleneck_dim": 30, "num_heads": 4},
        "bottleneck_dim=30 is not a multiple of num_heads=4, but every head gets an equal share; make bottleneck_dim "
        "a multiple of 4 or choose num_heads that divides 30",
    ),
    "integrator-heads": (
        {"integrator_dim": 30, "num_heads": 4},
        "integrator_dim=30 is not a multiple of num_heads=4, but every head gets an equal share; make integrator_dim "
        "a multiple of 4 or choose num_heads that divides 30",
    ),
    "no-local-slots": (
        {"num_local_slots": 0, "use_local": False},
        "num_local_slots=0 with use_local or use_global on, but both kinds of slots are built from local slots; give "
        "num_local_slots >= 1, or use_local=False and use_global=False",
    ),
    "no-global-slots": (
        {"num_global_slots": 0},
        "use_global=True with num_global_slots=0 has no slot to broadcast; give num_global_slots >= 1 or "
        "use_global=False",
    ),
}


@pytest.mark.parametrize("values, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        HiCIConfig(**values)


def test_defaults_are_the_published_ones():
    config = HiCIConfig()
    assert (config.num_local_slots, config.num_global_slots, config.num_heads) == (8, 4, 8)
    assert (config.bottleneck_dim, config.compress_dim, config.global_width) == (512, 128, 512)
    assert (config.num_segments, config.segment_size) == (4, None)
    assert (config.visibility, config.use_global, config.use_local) == ("all", True, True)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HiCIConfig().num_heads = 4


def test_segment_size_leaves_num_segments_open():
    assert HiCIConfig(segment_size=16).num_segments is None


@pytest.mark.parametrize(
    "values, length, expected",
    [({}, 64, 16), ({}, 65, 17), ({}, 3, 1), ({"num_segments": 1}, 9, 9), ({"segment_size": 7}, 3, 7), ({}, 0, 1)],
)
def test_resolve_segment_size(values, length, expected):
    assert HiCIConfig(**values).resolve_segment_size(length) == expected


def test_replace():
    config = HiCIConfig(num_segments=8, visibility="past")
    assert config.replace(segment_size=16) == HiCIConfig(segment_size=16, visibility="past")
    assert config.replace(segment_size=16).replace(num_segments=2) == HiCIConfig(num_segments=2, visibility="past")
    assert config.replace(use_local=False).num_segments == 8
    assert config.num_segments == 8
    with pytest.raises(ValueError, match="both given"):
        config.replace(num_segments=2, segment_size=16)
    with pytest.raises(ValueError, match="num_heads=3"):
        config.replace(num_heads=3)
    with pytest.raises(ValueError, match="leave no segments; give one of them"):
        config.replace(segment_size=16).replace(segment_size=None)


@pytest.mark.parametrize("change", [lambda v: HiCIConfig().replace(**v), HiCIConfig.from_dict], ids=["replace", "from"])
def test_unknown_field_names_the_nearest(change):
    with pytest.raises(ValueError, match=r"unknown HiCIConfig field 'num_local_slot'; known: .*num_local_slots'\?"):
        change({"num_local_slot": 4})


@pytest.mark.parametrize(
    "config", [HiCIConfig(), HiCIConfig(segment_size=5, compress_dim=None, bottleneck_dim=None, integrator_dim=64)]
)
def test_json_round_trip(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert HiCIConfig.from_dict(values) == config
    assert set(values) == {field.name for field in dataclasses.fields(HiCIConfig)}


def test_check_width():
    config = HiCIConfig(bottleneck_dim=None, integrator_dim=64)
    config.check_width(64)
    HiCIConfig().check_width(63)
    message = "num_heads=8 does not divide the model's width 60, which bottleneck_dim=None uses; choose num_heads that"
    with pytest.raises(ValueError, match=message):
        config.check_width(60)


def test_suggest():
    assert suggest("zzz", ["b", "a"], "thing") == "unknown thing 'zzz'; known: a, b."
    assert suggest("alhpa", ["alpha"], "thing", "Do.") == (
        "unknown thing 'alhpa'; known: alpha. Did you mean 'alpha'? Do."
    )


def test_parameters_of_one_7b_layer():
    config, meta = HiCIConfig(), torch.device("meta")
    constructor = LocalConstructor(4096, config.num_local_slots, config.num_heads, config.bottleneck_dim, device=meta)
    integrator = GlobalIntegrator(
        4096, config.num_global_slots, config.num_heads, config.global_width, config.compress_dim, device=meta
    )
    assert sum(p.numel() for m in (constructor, integrator) for p in m.parameters()) == 12_160_257


def test_parameters_of_llama_2_7b():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, vocab_size=32000))
        base = sum(p.numel() for p in model.parameters())
        attach(model)
    added = sum(p.numel() for p in model.parameters()) - base
    assert added == 389_128_224 == 32 * 12_160_257
    assert round(100 * added / (base + added), 2) == 5.46
    assert {p.device.type for p in model.parameters()} == {"meta"}
