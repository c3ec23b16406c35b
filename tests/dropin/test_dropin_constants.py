"""replace_*_attn, register_hici_to_*, and the constants of the drop-in modules, which are read at forward time."""

import copy

import peft
import pytest
import torch

import hici
import hici.models.bridge as bridge
import llama_attn_hici
import qwen3_attn_hici
from helpers import (
    assert_same_gradients,
    difference,
    logits,
    loss_and_gradients,
    random_ids,
    randomise,
    small_config,
    strong_model,
    tiny_model,
)
from hici.dropin import modules
from hici.models.attach import hici_state_dict
from hici.models.lookup import attention_mode, get_decoder, hici_config, is_attached

IDS = random_ids(2, 32)
SMALL = {"num_local_slots": 3, "global_slots": 2, "num_heads": 4, "bottleneck_dim": 32, "shared_compress_dim": 16}
MODULES = {"llama": llama_attn_hici, "qwen3": qwen3_attn_hici}


def make(architecture="llama", **options):
    model = tiny_model(architecture)
    MODULES[architecture].register_hici_to_model(model, **{**SMALL, **options})
    randomise(model)
    return model


def replace(module, **arguments):
    names = {"llama_attn_hici": "replace_llama_attn", "qwen3_attn_hici": "replace_qwen3_attn"}
    getattr(module, names[module.__name__])(**{"use_flash_attn": False, **arguments})


def expected(architecture, mode="hici", **config):
    shapes = {"num_local_slots": 3, "num_global_slots": 2, "num_heads": 4, "bottleneck_dim": 32, "compress_dim": 16}
    model = strong_model(architecture, check=False, **{"num_segments": 4, **shapes, **config})
    model.set_attn_implementation(mode)
    return logits(model, IDS)


# the choice of attention


@pytest.mark.parametrize(
    ("module", "arguments", "mode", "ignored"),
    [
        (llama_attn_hici, {}, "hici_s2", ""),
        (llama_attn_hici, {"use_full": True}, "full", ""),
        (llama_attn_hici, {"inference": True}, "full", ""),
        (llama_attn_hici, {"use_hierarchical_forward": True}, "hici", ""),
        (llama_attn_hici, {"use_full": True, "use_hierarchical_forward": True}, "hici", "use_full=True has no effect"),
        (llama_attn_hici, {"inference": True, "use_hierarchical_forward": True}, "full", "forward=True has no effect"),
        (qwen3_attn_hici, {}, "hici", ""),
        (qwen3_attn_hici, {"use_full": True}, "full", ""),
        (qwen3_attn_hici, {"inference": True}, "hici", ""),
        (qwen3_attn_hici, {"use_full": True, "use_hierarchical_forward": True}, "full", "forward=True has no effect"),
    ],
)
def test_what_the_arguments_choose(module, arguments, mode, ignored, caplog):
    replace(module, **arguments)
    assert (mode, False) == module.CHOICE
    assert ignored in caplog.text
    assert len(caplog.records) == bool(ignored)


def test_registered_models_follow_every_call(caplog):
    model = make()
    outputs = {"hici": expected("llama"), "full": expected("llama", "sdpa"), "hici_s2": expected("llama", "hici_s2")}
    assert difference(outputs["hici"], outputs["full"]) > 0.1
    assert attention_mode(model) == "hici"  # before any replace_llama_attn
    for arguments, mode in (
        ({"use_full": True}, "full"),
        ({}, "hici_s2"),
        ({"use_hierarchical_forward": True}, "hici"),
        ({"inference": True}, "full"),
        ({"use_hierarchical_forward": True}, "hici"),
    ):
        replace(llama_attn_hici, **arguments)
        assert difference(logits(model, IDS), outputs[mode]) < 1e-6
        assert attention_mode(model) == mode
        assert model.config.hici["attention"] == mode
    assert not caplog.records


def test_a_choice_before_registering_counts_too():
    replace(llama_attn_hici, use_full=True)
    model = make()
    assert attention_mode(model) == "full"
    assert difference(logits(model, IDS), expected("llama", "sdpa")) == 0


def test_set_attn_implementation_holds_until_the_next_choice():
    model = make()
    model.set_attn_implementation("sdpa")
    llama_attn_hici.CAUSAL_CONTEXT_MODE = "causal_shift"
    assert difference(logits(model, IDS), expected("llama", "sdpa")) == 0
    assert hici_config(model).visibility == "past"
    replace(llama_attn_hici, use_hierarchical_forward=False)
    assert difference(logits(model, IDS), expected("llama", "hici_s2")) < 1e-6


def test_flash_attn_falls_back_with_one_line(caplog):
    llama_attn_hici.replace_llama_attn(use_hierarchical_forward=True)
    assert len(caplog.records) == 1
    assert "use_flash_attn=True without flash-attn or a GPU" in caplog.text
    assert caplog.records[0].name.startswith("hici")
    logits(make(), IDS)
    assert len(caplog.records) == 1


def test_flash_attn_where_there_is_one(monkeypatch, caplog):
    monkeypatch.setattr(modules, "flash_available", lambda: True)
    llama_attn_hici.replace_llama_attn(use_full=True)
    assert not caplog.records
    assert llama_attn_hici.CHOICE == ("full", True)
    model = make()  # float32, which flash-attn does not compute
    assert "float32 model, which flash-attn does not compute; 'sdpa' is used" in caplog.text
    assert model.config._attn_implementation == "sdpa"
    set_to = []
    half = tiny_model().to(torch.bfloat16)
    monkeypatch.setattr(type(half.model), "set_attn_implementation", lambda self, name: set_to.append(name))
    llama_attn_hici.register_hici_to_model(half, **SMALL)
    assert set_to[-1] == "flash_attention_2"


# constants


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("mode", "use"),
    [
        ("none", {"visibility": "all"}),
        ("causal_gi", {"visibility": "current"}),
        ("causal_gi_gonly", {"visibility": "current", "use_local": False}),
        ("causal_shift", {"visibility": "past"}),
        ("causal_shift_g", {"visibility": "past", "use_local": False}),
    ],
)
def test_context_modes(architecture, mode, use):
    model = make(architecture)
    MODULES[architecture].CAUSAL_CONTEXT_MODE = mode
    assert difference(logits(model, IDS), expected(architecture, **use)) < 1e-6
    integrator_off = make(architecture, use_global_integrator=False)
    assert difference(logits(integrator_off, IDS), expected(architecture, **use, use_global=False)) < 1e-6


def test_defaults_are_the_published_ones():
    for module, mode in ((llama_attn_hici, "none"), (qwen3_attn_hici, "causal_gi")):
        assert mode == module.CAUSAL_CONTEXT_MODE
        assert (module.MIXED_GROUP_TRAINING, module.USE_FIXED_SEGMENT_SIZE) == (False, False)
        assert (module.GROUP_SIZE_RATIOS, module.group_size_ratio) == ([1 / 2, 1 / 4, 1 / 8], 1 / 4)
        assert (module.FIXED_SEGMENT_SIZE, module.USE_FULL_ATTN_WITH_HICI) == (1024, True)
        assert module.CONTEXT_LENGTH is None
    assert hici_config(make("qwen3")).visibility == "current"
    base = tiny_model(hidden_size=512, num_attention_heads=8)
    llama_attn_hici.register_hici_to_model(base)
    assert hici_config(base) == hici.HiCIConfig(decode="raw")


@pytest.mark.parametrize(
    ("constants", "segments"),
    [
        ({"group_size_ratio": 1 / 2}, {"num_segments": 2}),
        ({"group_size_ratio": 1 / 3}, {"num_segments": 3}),
        ({"group_size_ratio": 1}, {"num_segments": 1}),
        ({"USE_FIXED_SEGMENT_SIZE": True}, {"num_segments": 1}),
        ({"USE_FIXED_SEGMENT_SIZE": True, "FIXED_SEGMENT_SIZE": 5}, {"num_segments": 1}),
        (
            {"USE_FIXED_SEGMENT_SIZE": True, "USE_FULL_ATTN_WITH_HICI": False, "FIXED_SEGMENT_SIZE": 5},
            {"num_segments": None, "segment_size": 5},
        ),
    ],
)
def test_segments(constants, segments):
    model = make()
    logits(model, IDS)
    for name, value in constants.items():
        setattr(llama_attn_hici, name, value)
    assert difference(logits(model, IDS), expected("llama", **segments)) < 1e-6
    config = hici_config(model)
    assert (config.num_segments, config.segment_size) == (segments["num_segments"], segments.get("segment_size"))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("CAUSAL_CONTEXT_MODE", "causal_shfit", "llama_attn_hici.CAUSAL_CONTEXT_MODE 'causal_shfit'.*'causal_shift'"),
        ("group_size_ratio", 0.3, r"llama_attn_hici.group_size_ratio: 0.3 is not 1/N.*give 1/2"),
        ("group_size_ratio", 0, "group_size_ratio: 0 is not 1/N"),
        ("group_size_ratio", 4, "group_size_ratio: 4 is not 1/N"),
        ("group_size_ratio", None, "group_size_ratio: None is not 1/N"),
        ("FIXED_SEGMENT_SIZE", 0.25, "llama_attn_hici.FIXED_SEGMENT_SIZE=0.25 is not an integer >= 1"),
        ("GROUP_SIZE_RATIOS", [1 / 2, 0.3], "GROUP_SIZE_RATIOS: 0.3 is not 1/N"),
        ("GROUP_SIZE_RATIOS", [], "GROUP_SIZE_RATIOS is empty"),
    ],
)
def test_impossible_constants(name, value, match):
    model = make().train()
    llama_attn_hici.USE_FIXED_SEGMENT_SIZE = name == "FIXED_SEGMENT_SIZE"
    llama_attn_hici.USE_FULL_ATTN_WITH_HICI = False
    llama_attn_hici.MIXED_GROUP_TRAINING = True
    setattr(llama_attn_hici, name, value)
    with pytest.raises(ValueError, match=match):
        model(IDS)
    if name != "GROUP_SIZE_RATIOS":
        base = tiny_model()
        with pytest.raises(ValueError, match=match):
            llama_attn_hici.register_hici_to_model(base, **SMALL)
        assert not is_attached(base)


# MIXED_GROUP_TRAINING


@pytest.fixture
def segments(monkeypatch):
    """A list that fills with the number of segments of every attention call."""
    counts, original = [], bridge.to_segments

    def recorded(hidden, size):
        counts.append(original(hidden, size).shape[1])
        return original(hidden, size)

    monkeypatch.setattr(bridge, "to_segments", recorded)
    return counts


def test_mixed_group_training_draws_in_training_only(segments):
    model = make()
    llama_attn_hici.MIXED_GROUP_TRAINING = True
    model.eval()
    logits(model, IDS)
    assert segments == [4, 4]
    segments.clear()
    model.train()
    state = torch.get_rng_state()
    for _ in range(30):
        model(IDS)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = segments[::2]
    assert drawn == segments[1::2]  # one ratio for all layers of a forward call
    assert set(drawn) == {2, 4, 8}
    assert (hici_config(model).num_segments, model.config.hici["num_segments"]) == (4, 4)
    segments.clear()
    again = make().train()
    for _ in range(30):
        torch.rand(3)
        again(IDS)
    assert segments[::2] == drawn  # by the seed, whatever else draws
    segments.clear()
    torch.manual_seed(7)
    other = make().train()
    for _ in range(30):
        other(IDS)
    assert segments[::2] != drawn
    llama_attn_hici.MIXED_GROUP_TRAINING = False
    segments.clear()
    other(IDS)
    assert segments == [4, 4]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_same_ratio(segments, reentrant):
    llama_attn_hici.MIXED_GROUP_TRAINING = True

    def gradients(checkpointing):
        torch.manual_seed(5)
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        steps = []
        for _ in range(6):
            steps.append(loss_and_gradients(model, IDS)[1])
        # several forward calls with ratios of their own, and an evaluation, before one backward
        model.zero_grad(set_to_none=True)
        losses = [model(IDS, labels=IDS).loss for _ in range(4)]
        logits(model.eval(), IDS)
        model.train()
        sum(losses).backward()
        return [*steps, {name: p.grad for name, p in model.named_parameters()}]

    plain = gradients(False)
    drawn = segments[:12:2]
    assert len(set(drawn)) > 1
    assert len(set(segments[12:20:2])) > 1
    for ours, theirs in zip(gradients(True), plain, strict=True):
        assert_same_gradients(ours, theirs, 1e-5)


def test_mixed_in_other_modes_and_under_peft(segments):
    llama_attn_hici.MIXED_GROUP_TRAINING = True
    replace(llama_attn_hici, use_full=True)
    model = make().train()
    model(IDS)
    assert not segments
    replace(llama_attn_hici)  # shifted sparse attention, whose groups are the segments
    model(IDS, use_cache=False)
    replace(llama_attn_hici, use_hierarchical_forward=True)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*self_attn\.q_proj")).train()
    for _ in range(10):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert len(set(segments)) > 1


def test_copies_follow_the_constants_too(tmp_path):
    model = make()
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        llama_attn_hici.CAUSAL_CONTEXT_MODE = "causal_shift"
        assert difference(logits(copied, IDS), expected("llama", visibility="past")) < 1e-6
        llama_attn_hici.CAUSAL_CONTEXT_MODE = "none"


def test_detached_and_registered_again():
    model = make()
    hici.detach(model)
    stock = logits(model, IDS)
    llama_attn_hici.CAUSAL_CONTEXT_MODE = "causal_shift"
    assert difference(logits(model, IDS), stock) == 0
    llama_attn_hici.register_hici_to_model(model, **SMALL)
    assert hici_config(model).visibility == "past"
    assert list(get_decoder(model)._forward_pre_hooks.values()).count(modules.constants_hook) == 1


# registering


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"num_memory_slots": 5, "num_local_slots": None}, {"num_local_slots": 5}),
        ({"num_memory_slots": 3}, {}),
        ({"use_local_constructor_flash": True}, {}),
        ({"compress_dim": 64}, {}),  # counts for the independent compressors only
        ({"use_shared_compressor": False, "compress_dim": 64}, {"compress_dim": None, "integrator_dim": 64}),
        ({"use_shared_compressor": False, "compress_dim": 32}, {"compress_dim": None}),
        ({"use_bottleneck": False}, {"bottleneck_dim": None, "integrator_dim": 32}),
        ({"use_global_integrator": False}, {"use_global": False}),
        ({"use_global_integrator": False, "use_local_constructor": False}, {"use_global": False, "use_local": False}),
    ],
)
def test_options_become_a_config(options, config):
    model = tiny_model()
    assert llama_attn_hici.register_hici_to_model(model, **{**SMALL, **options}) is model
    shapes = {"num_local_slots": 3, "num_global_slots": 2, "num_heads": 4, "bottleneck_dim": 32, "compress_dim": 16}
    assert hici_config(model) == hici.HiCIConfig(**{**shapes, "num_segments": 4, "decode": "raw", **config})
    assert len(hici_state_dict(model)) >= 26
    logits(model, IDS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_memory_slots": 4}, "num_local_slots=3 and num_memory_slots=4 are two names of one number"),
        ({"num_local_slots": 8, "num_memory_slots": 4}, "num_local_slots=8 and num_memory_slots=4"),
        ({"use_local_constructor": False}, "use_local_constructor=False with use_global_integrator=True"),
        ({"use_attn_init": True}, "use_attn_init=True.*leave it out"),
        ({"ds_config_path": "ds.json"}, "ds_config_path='ds.json'.*leave it out"),
        ({"num_heads": 3}, "bottleneck_dim=32 is not a multiple of num_heads=3"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_options_that_are_refused(architecture, options, match):
    model = tiny_model(architecture)
    with pytest.raises(ValueError, match=match):
        MODULES[architecture].register_hici_to_model(model, **{**SMALL, **options})
    assert not is_attached(model)
    assert not hasattr(get_decoder(model), "hici_dropin")


def test_models_that_are_refused():
    with pytest.raises(ValueError, match="is for models of type 'llama', but this one is 'qwen3'; import qwen3_attn"):
        llama_attn_hici.register_hici_to_model(tiny_model("qwen3"), **SMALL)
    with pytest.raises(ValueError, match="is for models of type 'qwen3', but this one is 'llama'; import llama_attn"):
        qwen3_attn_hici.register_hici_to_qwen3_model(tiny_model(), **SMALL)
    with pytest.raises(ValueError, match="this one is 'mistral'; use hici.attach"):
        llama_attn_hici.register_hici_to_model(tiny_model("mistral"), **SMALL)
    with pytest.raises(ValueError, match="this one is None"):
        llama_attn_hici.register_hici_to_model(torch.nn.Linear(2, 2), **SMALL)
    with pytest.raises(ValueError, match="HiCI modules are on this model already"):
        llama_attn_hici.register_hici_to_model(make(), **SMALL)
    with pytest.raises(ValueError, match="HiCI modules are on this model already"):
        llama_attn_hici.register_hici_to_model(strong_model(), **SMALL)
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ValueError, match="was given a PEFT model.*register the base model first"):
            llama_attn_hici.register_hici_to_model(model, **SMALL)


def test_both_names_of_qwen3s_function():
    assert qwen3_attn_hici.register_hici_to_model is qwen3_attn_hici.register_hici_to_qwen3_model


def test_a_registration_ends_with_its_modules(registered):
    import hici

    model = registered()
    hici.detach(model)
    hici.attach(model, small_config(visibility="past"))
    llama_attn_hici.group_size_ratio = 1 / 2
    llama_attn_hici.MIXED_GROUP_TRAINING = True
    llama_attn_hici.replace_llama_attn(use_full=True)
    model.train()
    logits(model, random_ids(2, 16))
    config = hici_config(model)
    assert (config.visibility, config.segment_size) == ("past", 8)
    assert model.config._attn_implementation == "hici"
