"""What model.generate in HiCI's modes refuses, with the message; and other caches."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from cache_refusals import GENERATE, RAW
from helpers import padded, random_ids, read, tiny_model
from hici import HiCICache, reconfigure
from hici.models.generation_cache import OLD_PREFILL


def test_several_sequences_of_one_row_that_was_read(model):
    cache = HiCICache(model)
    ids = random_ids(1, 13)
    read(model, cache, ids[:, :9], [(0, 9)])
    with pytest.raises(ValueError, match="the HiCICache holds 1 rows, but the input has 3; give as many, or change"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, num_beams=3, **GENERATE)
    cache.batch_repeat_interleave(3)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, num_beams=3, **GENERATE)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, num_beams=3, **GENERATE)
    assert torch.equal(out, expected)


def test_generate_knows_the_rope_before_it_begins(model):
    ids = random_ids(1, 100)
    with pytest.raises(ValueError, match=r"^129 tokens are more than the 128 positions of the model's rope settings"):
        model.generate(ids, **{**GENERATE, "max_new_tokens": 30})
    # the last token is not read, so it needs no position
    assert model.generate(ids, **{**GENERATE, "max_new_tokens": 29}).shape == (1, 129)


def test_only_what_is_asked_for_needs_positions(model):
    """Neither padding nor a limit in the model's own settings."""
    ids, mask = padded([random_ids(1, 20)[0], random_ids(1, 9)[0]], "left", total=120)
    assert model.generate(ids, attention_mask=mask, **{**GENERATE, "max_new_tokens": 20}).shape == (2, 140)
    first = int(model.generate(ids[:1, 100:], **{**GENERATE, "max_new_tokens": 1})[0, -1])
    model.generation_config.max_length, model.generation_config.eos_token_id = 4096, first
    try:
        assert model.generate(ids[:1, 100:], pad_token_id=0, do_sample=False).shape == (1, 21)
    finally:
        model.generation_config.max_length, model.generation_config.eos_token_id = None, None


@pytest.mark.parametrize("mode", ["hici", "hici_s2"])
@pytest.mark.parametrize("decode", ["auto", "raw"])
def test_a_row_of_padding_only(model, mode, decode):
    reconfigure(model, decode=decode)
    model.set_attn_implementation(mode)
    ids, mask = padded([random_ids(1, 9)[0], random_ids(1, 0)[0], random_ids(1, 0)[0]], "left")
    message = r"^row 1 of the prompt is empty \(padding only\); leave it out, or give it a token$"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, attention_mask=mask, **GENERATE)


@pytest.mark.parametrize("mode", ["hici", "hici_s2"])
@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
@pytest.mark.parametrize("cache", [None, DynamicCache, HiCICache])
def test_assisted_decoding(model, mode, way, cache):
    given = cache and (cache(model) if cache is HiCICache else cache(config=model.config))
    model.set_attn_implementation(mode)
    options = {"assistant_model": tiny_model()} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
    message = (
        rf"^assisted decoding in attention mode '{mode}': rejected tokens cannot be taken out of slots again; leave "
        r"out assistant_model and prompt_lookup_num_tokens, or call model\.set_attn_implementation\('sdpa'\)$"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(1, 9), past_key_values=given, **options, **GENERATE)


def test_as_the_assistant_of_another(model):
    with pytest.raises(ValueError, match="assisted decoding in attention mode 'hici': rejected tokens cannot"):
        tiny_model().generate(random_ids(1, 9), assistant_model=model, **GENERATE)


@pytest.mark.parametrize(
    "changes", [{"decode": "raw"}, {"visibility": "all"}, {"visibility": "current"}, {"mode": "hici_s2"}], ids=str
)
@pytest.mark.parametrize("cache", [None, DynamicCache], ids=["none", "given"])
def test_prefill_in_pieces_over_raw_keys(model, changes, cache):
    reconfigure(model, **{k: v for k, v in changes.items() if k != "mode"})
    model.set_attn_implementation(changes.get("mode", "hici"))
    message = (
        r"^prefill_chunk_size=4 with decode over raw keys: only the first piece of the prompt would get slots; leave "
        r"it out, or use visibility 'past' with a HiCICache$"
    )
    given = cache and cache(config=model.config)
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(1, 9), past_key_values=given, prefill_chunk_size=4, **GENERATE)
    if cache is not None and not OLD_PREFILL:  # read already: no piece would get slots, nor would the whole
        ids = random_ids(1, 20)
        with torch.no_grad():
            model(ids[:, :9], past_key_values=given)
        model.generate(ids, past_key_values=given, prefill_chunk_size=4, **GENERATE)


def test_num_segments_of_the_past_needs_a_choice(model):
    reconfigure(model, num_segments=3)
    message = (
        r"^num_segments=3 with a HiCICache: .*; call hici\.reconfigure\(model, segment_size=S\) with the segments' "
        rf"length in training \(--segment-size S\), or {RAW}$"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(1, 20), **GENERATE)
    for way in ({"past_key_values": DynamicCache(config=model.config)}, {"cache_implementation": "dynamic"}):
        assert model.generate(random_ids(1, 20), **way, **GENERATE).shape == (1, 22)


class _Quantized(QuantizedCache):
    """Without the package that quantises."""

    def __init__(self):
        Cache.__init__(self, layer_class_to_replicate=DynamicLayer)


def _other_cache(kind, model):
    return _Quantized() if kind == "quantized" else StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("mode", ["hici", "hici_s2"])
@pytest.mark.parametrize(
    "kind, message",
    [
        ("quantized", r"^a quantized cache in attention mode '{mode}', which needs the keys as they are; use "),
        (
            "static",
            r"^a static cache \(StaticCache\) in attention mode '{mode}': its unused places would be summarised",
        ),
    ],
)
def test_other_caches(model, mode, kind, message):
    model.set_attn_implementation(mode)
    message = message.format(mode=mode)
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 9), past_key_values=_other_cache(kind, model))
    with pytest.raises(ValueError, match=message) as caught:
        model.generate(random_ids(2, 9), past_key_values=_other_cache(kind, model), **GENERATE)
    assert ("hici.HiCICache(model)" in str(caught.value)) == (mode == "hici")
