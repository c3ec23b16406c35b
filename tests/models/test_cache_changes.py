"""A HiCICache notices that its model, or the way in which it is called, is no longer what read the tokens."""

import copy
import pickle
import re

import peft
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import hici
from helpers import cut, difference, logits, padded, random_ids, randomise, read, small_config, strong_model, tiny_model
from hici import HiCICache
from hici.models.session import Session

IDS = random_ids(2, 40)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model():
    return strong_model(visibility="past")


@pytest.fixture
def filled(model):
    cache = HiCICache(model)
    read(model, cache, IDS, [(0, 21)])
    return cache


def refuse(model, cache, message):
    with pytest.raises(ValueError, match=message):
        read(model, cache, IDS, [(21, 40)])


def test_another_rope(model, filled):
    hici.extend_rope(model, 256)
    refuse(model, filled, r"the model has changed \(its rope settings\) since the HiCICache was made; make a new one")


def test_other_modules(model, filled):
    hici.detach(model)
    hici.attach(model, small_config(visibility="past"))
    randomise(model, 7)
    refuse(model, filled, r"the model has changed \(its HiCI modules\)")


def test_other_sizes(model, filled):
    hici.detach(model)
    hici.attach(model, small_config(visibility="past", num_local_slots=5))
    refuse(model, filled, r"the model has changed \(its HiCI modules\)|num_local_slots=3, but the model now has 5")


def test_another_adapter(model):
    wrapped = hici.add_lora(model)
    randomise(wrapped, 3)
    wrapped.requires_grad_(False)
    cache = HiCICache(wrapped)
    read(wrapped, cache, IDS, [(0, 21)])
    with wrapped.disable_adapter():
        refuse(wrapped, cache, r"the model has changed \(its active adapters\)")
    assert difference(read(wrapped, cache, IDS, [(21, 40)]), logits(wrapped, IDS)[:, 21:]) < 1e-5


def test_gradient_checkpointing_would_drop_it(model, filled):
    model.gradient_checkpointing_enable()
    model.train()
    refuse(model, filled, "a HiCICache with gradient checkpointing in training mode, .* call model.eval")
    model.eval()
    assert difference(read(model, filled, IDS, [(21, 40)]), logits(model, IDS)[:, 21:]) < 1e-5


def test_generate_without_use_cache(model, filled):
    with pytest.raises(ValueError, match="use_cache=False with a HiCICache: every step would read all tokens"):
        model.generate(IDS, use_cache=False, past_key_values=filled, **GREEDY)
    assert torch.equal(model.generate(IDS, use_cache=False, **GREEDY), model.generate(IDS, **GREEDY))
    with pytest.raises(ValueError, match="use_cache=None in attention mode 'hici'.*give True or False"):
        model.generate(IDS, use_cache=None, **GREEDY)


@pytest.mark.parametrize(
    "lora", [{"target_modules": ["gate_proj"]}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}], ids=str
)
def test_adapters_anywhere(model, lora, tmp_path):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **lora)).requires_grad_(False)
    cache = HiCICache(wrapped)
    read(wrapped, cache, IDS, [(0, 21)])
    cache.save(tmp_path / "cache")
    with wrapped.disable_adapter():
        refuse(wrapped, cache, r"the model has changed \(its active adapters\)")
        with pytest.raises(ValueError, match="was made with another model"):
            HiCICache.load(tmp_path / "cache", wrapped)
    scaled = next(module for module in wrapped.modules() if hasattr(module, "set_scale"))
    scaled.set_scale("default", 3.0)
    refuse(wrapped, cache, r"the model has changed \(its active adapters\)")


def test_an_empty_cache_takes_the_model_as_it_is(model):
    cache = HiCICache(model)
    hici.extend_rope(model, 256)
    read(model, cache, IDS, [(0, 21)])
    cache.reset()
    hici.extend_rope(model, 512)
    assert difference(read(model, cache, IDS, cut(40, [21])), logits(model, IDS)) < 1e-5


def test_other_modules_of_a_copy(model, filled):
    twin = copy.deepcopy(model)
    read(twin, filled, IDS, [(21, 24)])
    hici.detach(twin)
    hici.attach(twin, small_config(visibility="past"))
    randomise(twin, 7)
    refuse(twin, filled, r"the model has changed \(its HiCI modules\)")


@pytest.mark.parametrize("place", ["layers.1.mlp", "norm"])
def test_a_call_that_failed_behind_the_last_attention(model, filled, place):
    def failing(*_):
        raise MemoryError

    hook = model.model.get_submodule(place).register_forward_pre_hook(failing)
    with pytest.raises(MemoryError):
        read(model, filled, IDS, [(21, 40)])
    hook.remove()
    refuse(model, filled, "stopped in its middle")
    with pytest.raises(ValueError, match="stopped in its middle"):
        filled.snapshot()
    filled.reset()
    assert difference(read(model, filled, IDS, [(0, 40)]), logits(model, IDS)) < 1e-5


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # fmt: skip


def _with_rope(architecture, rope, **options):
    return strong_model(architecture, visibility="past", options={"rope_parameters": rope, **options})


def test_a_rope_that_changes_with_length_is_read_on_one_side_of_its_border():
    model = _with_rope("phi3", LONGROPE, original_max_position_embeddings=32)
    expected = logits(model, IDS)
    cache = HiCICache(model)
    read(model, cache, IDS, [(0, 30)])
    message = "40 tokens with a longrope rope, which is another one beyond 32 tokens: the 30 that were read before"
    with pytest.raises(ValueError, match=message):
        read(model, cache, IDS, [(30, 40)])
    short = read(model, cache, IDS, [(30, 32)])
    assert difference(short, logits(model, IDS[:, :32])[:, 30:]) < 1e-5
    assert difference(read(model, HiCICache(model), IDS, [(0, 36), (36, 40)]), expected) < 1e-5


def _longrope():
    return _with_rope("phi3", LONGROPE, original_max_position_embeddings=32)


def test_a_long_text_with_such_a_rope_is_read_in_one_piece(monkeypatch):
    monkeypatch.setattr("hici.models.prefill.SMALL_PIECE", 1)
    monkeypatch.setattr("hici.models.prefill.PIECE", 8)
    model = _longrope()
    for mode in ("hici", "sdpa"):
        model.set_attn_implementation(mode)
        session = Session(model)
        ids = IDS[0].tolist()
        assert session.read(ids[:20]) == 20
        assert session.read(ids[:36]) == 36  # all of it again
        assert session.read(ids[:39]) == 3
        with torch.no_grad():
            out = model(IDS[:1, 39:], past_key_values=session.cache).logits
        assert difference(out, logits(model, IDS[:1])[:, 39:]) < 1e-5
        with pytest.raises(ValueError, match="20 .*be read|another rope"):
            hici.prefill(model, IDS[:, 20:], hici.prefill(model, IDS[:, :20]))


def test_the_longest_row_chooses_the_rope_of_a_batch():
    model = _longrope()
    ids, mask = padded([IDS[0], IDS[1, :30]], "left")
    cache = HiCICache(model)
    out = read(model, cache, ids, [(0, 38), (38, 40)], mask)
    assert difference(out, logits(model, ids, mask)) < 1e-5 or mask[1, 0] == 0
    assert difference(out[0], logits(model, ids, mask)[0]) < 1e-5
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match="31 tokens with a longrope rope, which is another one beyond 32 tokens"):
        read(model, cache, IDS[:1], [(0, 1)])


def test_equal_factors_change_nothing():
    model = _with_rope("phi3", {**LONGROPE, "long_factor": [1.0] * 8}, original_max_position_embeddings=32)
    cache = HiCICache(model)
    assert difference(read(model, cache, IDS, [(0, 30), (30, 40)]), logits(model, IDS)) < 1e-5


def test_a_dynamic_rope_is_read_in_one_call_beyond_its_positions():
    model = _with_rope("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
                       max_position_embeddings=32)  # fmt: skip
    cache = HiCICache(model, allow_beyond_rope=True)
    read(model, cache, IDS, [(0, 40)])
    with pytest.raises(ValueError, match="41 tokens with a dynamic rope"):
        read(model, cache, IDS[:, :41], [(0, 1)])


def test_a_copy_of_an_interrupted_cache_is_interrupted(model, filled):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    layer = filled.layers[0]
    attend, layer.attend = layer.attend, interrupted
    with pytest.raises(KeyboardInterrupt):
        read(model, filled, IDS, [(21, 40)])
    layer.attend = attend
    for cache in (filled, copy.deepcopy(filled)):
        refuse(model, cache, "stopped in its middle")


def test_a_twin_may_come_and_go(model):
    twin, cache = copy.deepcopy(model), HiCICache(model)
    read(twin, cache, IDS, [(0, 11)])
    del twin
    assert difference(read(model, cache, IDS, [(11, 40)]), logits(model, IDS)[:, 11:]) < 1e-5


def test_compiled_with_use_cache():
    torch._dynamo.reset()
    model = strong_model(visibility="past")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        first = compiled(IDS[:, :21], use_cache=True)
        assert isinstance(first.past_key_values, HiCICache)
        out = compiled(IDS[:, 21:], past_key_values=first.past_key_values).logits
    assert difference(out, logits(model, IDS)[:, 21:]) < 1e-5


def test_use_cache_with_segments_by_number_is_as_before():
    model = strong_model(visibility="past", num_segments=3)
    with torch.no_grad():
        assert type(model(IDS, use_cache=True).past_key_values) is DynamicCache


@pytest.mark.parametrize("cache", [(), EncoderDecoderCache(DynamicCache(), DynamicCache())], ids=["tuple", "encoder"])
def test_caches_of_other_kinds_in_generate(model, cache):
    with pytest.raises(ValueError, match=r"(?i)past_key_values is a \w+, which attention mode 'hici'|tuple"):
        model.generate(IDS, past_key_values=cache, **GREEDY)


def test_a_window_refuses_before_anything_changes():
    model = strong_model("mistral", visibility="past", options={"sliding_window": 10})
    model.config.sliding_window = 6
    cache = HiCICache(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="segments of 8 tokens are longer than the model's sliding window of 6"):
            read(model, cache, IDS, [(0, 21)])
    assert difference(read(model, cache, IDS, cut(6, [2])), logits(model, IDS[:, :6])) < 1e-5


def test_a_window_of_a_later_layer_refuses_before_anything_changes():
    model = strong_model("gemma3", visibility="past", options={"sliding_window": 10,
                         "layer_types": ["full_attention", "sliding_attention"]})  # fmt: skip
    hici.reconfigure(model, segment_size=16)
    cache = HiCICache(model)
    read(model, cache, IDS, [(0, 8)])
    for _ in range(2):
        with pytest.raises(ValueError, match="longer than the model's sliding window of 10"):
            read(model, cache, IDS, [(8, 21)])
    assert cache.tokens == [8, 8]


def test_pickles_are_refused(filled):
    with pytest.raises(ValueError, match=re.escape("cannot be pickled, since it belongs to a model; use its save()")):
        pickle.dumps(filled)


def test_a_shallow_copy_of_a_model_that_is_gone():
    model = tiny_model()
    hici.attach(model, small_config(visibility="past"))
    shallow = copy.copy(model)
    assert shallow.generate(IDS, **GREEDY).shape == (2, 44)
    del model
    with pytest.raises(ValueError, match=r"is gone, and this is a shallow copy of it; use copy\.deepcopy"):
        shallow.generate(IDS, **GREEDY)
