"""Every refusal of a HiCICache, with its message: the value, the rule, the remedy. Nothing has changed then."""

import copy

import pytest
import torch

from cache_refusals import DYNAMIC, GENERATE, RAW
from helpers import cut, difference, logits, padded, random_ids, randomise, read, strong_model, tiny_model
from hici import HiCICache, reconfigure


@pytest.fixture
def filled(model):
    """A cache that has read 13 tokens of two rows."""
    cache = HiCICache(model)
    read(model, cache, random_ids(2, 13), [(0, 13)])
    return cache


def _assert_refused(model, cache, message, ids=None, mask=None, **inputs):
    ids = random_ids(2, 5) if ids is None else ids
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, **inputs)


def _assert_as_before(model, cache):
    """The refused call has changed nothing: it goes on from the 13 tokens."""
    ids = torch.cat((random_ids(2, 13), random_ids(2, 15, seed=4)), dim=1)
    out = read(model, cache, ids, [(13, 17), (17, 28)])
    assert difference(out, logits(model, ids)[:, 13:]) < 1e-5


# ---- made for


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"visibility": visibility},
            rf"^visibility='{visibility}' with a HiCICache: tokens of a segment see a summary of what comes after "
            rf"them, so they cannot be read one after another; call hici\.reconfigure\(model, visibility='past'\) if "
            rf"the model was trained so, or {RAW}$",
        )
        for visibility in ("all", "current")
    ]
    + [
        (
            {"num_segments": 3},
            r"^num_segments=3 with a HiCICache: the segments would change with every token; call "
            rf"hici\.reconfigure\(model, segment_size=S\) with the segments' length in training "
            rf"\(--segment-size S\), or {RAW}$",
        ),
        (
            {"decode": "raw"},
            r"^decode='raw' with a HiCICache, which decodes from slots; call "
            rf"hici\.reconfigure\(model, decode='auto'\), or {RAW}$",
        ),
    ],
    ids=["all", "current", "num_segments", "raw"],
)
def test_config(model, changes, message):
    reconfigure(model, **changes)
    with pytest.raises(ValueError, match=message):
        HiCICache(model)


def test_nothing_attached():
    message = (
        r"^a HiCICache for a model without HiCI modules; call hici\.attach\(model, HiCIConfig\(\.\.\.\)\) first, or "
        rf"pass {DYNAMIC}$"
    )
    with pytest.raises(ValueError, match=message):
        HiCICache(tiny_model())


# ---- used with


def test_stock_attention(model, filled):
    model.set_attn_implementation("sdpa")
    message = (
        r"^a HiCICache in an attention mode other than 'hici': it does not keep the keys of all tokens; pass "
        rf"{DYNAMIC}, or call model\.set_attn_implementation\('hici'\)$"
    )
    _assert_refused(model, filled, message)
    _assert_refused(model, HiCICache(model), message)
    model.set_attn_implementation("hici")
    _assert_as_before(model, filled)


def test_s2_attention(model, filled):
    model.set_attn_implementation("hici_s2")
    message = (
        rf"^a HiCICache in attention mode 'hici_s2', which has no slots; pass {DYNAMIC}, or call "
        r"model\.set_attn_implementation\('hici'\)$"
    )
    _assert_refused(model, filled, message)
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(2, 9), past_key_values=HiCICache(model), **GENERATE)
    model.set_attn_implementation("hici")
    _assert_as_before(model, filled)


ANOTHER = (
    r"^the HiCICache was made for another model; make one with HiCICache\(model\) for this one, and read the tokens "
    r"again$"
)


def test_another_model(model, filled):
    other = strong_model(visibility="past", seed=5)
    _assert_refused(other, filled, ANOTHER)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[1].self_attn.global_integrator.expand.weight.mul_(1.1)
    _assert_refused(twin, filled, ANOTHER)
    _assert_as_before(model, filled)


def test_a_model_that_is_gone():
    model = strong_model(visibility="past")
    cache = HiCICache(model)
    other = strong_model(visibility="past")
    del model
    _assert_refused(other, cache, ANOTHER)


def test_a_copy_of_the_model_is_the_same_model(model, filled):
    twin = copy.deepcopy(model)
    _assert_as_before(twin, filled)
    randomise(twin, seed=5)
    assert filled.tokens == [28, 28]


def test_dtype():
    for length in (13, 16):  # inside of a segment, where the construction goes on, and at a border
        for more in (1, 5, 16):
            model = strong_model(visibility="past", check=False)
            cache = HiCICache(model)
            read(model, cache, random_ids(2, length), [(0, length)])
            model.to(torch.bfloat16)
            message = (
                r"^the HiCICache holds torch\.float32, but the model computes in torch\.bfloat16; make a new "
                r"HiCICache, or read on in torch\.float32$"
            )
            _assert_refused(model, cache, message, random_ids(2, more))
            assert cache.tokens == [length] * 2
            cache.snapshot()  # not interrupted


def test_autocast(model, filled):
    message = r"the HiCICache holds torch\.float32, but the model computes in torch\.bfloat16; make a new"
    with torch.autocast("cpu", torch.bfloat16):
        _assert_refused(model, filled, message)
    _assert_as_before(model, filled)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segment_size": 16}, r"segment_size=8, but the model now has 16"),
        ({"num_segments": 3}, r"segment_size=8, but the model now has None"),
        ({"visibility": "all"}, r"visibility='past', but the model now has 'all'"),
        ({"decode": "raw"}, r"decode='auto', but the model now has 'raw'"),
        ({"use_local": False}, r"use_local=True, but the model now has False"),
        ({"use_global": False}, r"use_global=True, but the model now has False"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_reconfigured(model, filled, change, message):
    remedy = r"; make a new HiCICache, or reconfigure the model back$"
    reconfigure(model, **change)
    _assert_refused(model, filled, "^the HiCICache was made for " + message + remedy)
    reconfigure(model, visibility="past", segment_size=8, decode="auto", use_local=True, use_global=True)
    _assert_as_before(model, filled)
    reconfigure(model, backend="reference")  # changes no numbers
    read(model, filled, random_ids(2, 5), [(0, 5)])


# ---- input


@pytest.mark.parametrize("rows", [1, 3])
def test_rows(model, filled, rows):
    message = (
        rf"^the HiCICache holds 2 rows, but the input has {rows}; give as many, or change the cache with "
        r"batch_repeat_interleave or batch_select_indices \(for beams: before generate\)$"
    )
    _assert_refused(model, filled, message, random_ids(rows, 5))
    _assert_as_before(model, filled)


def test_a_mask_that_disagrees(model, filled):
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[1, :4] = 0
    message = (
        r"^attention_mask has 9 real tokens of row 1 before the new ones, but the HiCICache has read 13; give the mask "
        r"that the tokens were read with, and the new tokens' behind it$"
    )
    _assert_refused(model, filled, message, mask=mask)
    _assert_as_before(model, filled)


@pytest.mark.parametrize("length", [5, 17, 19])
def test_a_mask_of_another_length(model, filled, length):
    message = (
        rf"^attention_mask covers {length} tokens, but there are 18 with those in the cache; give one entry for each$"
    )
    _assert_refused(model, filled, message, mask=torch.ones(2, length, dtype=torch.long))
    _assert_as_before(model, filled)


@pytest.mark.parametrize("trainable", ["all", "embeddings", "slots", "last layer"])
def test_gradients(model, filled, trainable):
    names = {"all": "", "embeddings": "embed_tokens", "slots": "memory_slots", "last layer": "layers.1.mlp"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names[trainable] in name)
    message = (
        r"^a HiCICache while gradients are recorded: it is written in place and keeps no graph; call the model under "
        r"torch\.no_grad\(\), or without a cache \(use_cache=False\)$"
    )
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 5), past_key_values=filled)
    _assert_as_before(model, filled)


def test_gradients_of_embeddings(model, filled):
    model.requires_grad_(False)
    embeds = torch.randn(2, 5, 64, requires_grad=True)
    with pytest.raises(ValueError, match="a HiCICache while gradients are recorded"):
        model(inputs_embeds=embeds, past_key_values=filled)
    _assert_as_before(model, filled)


def test_more_than_the_rope(model):
    ids = random_ids(2, 140)
    cache = HiCICache(model)
    read(model, cache, ids, cut(128, [100]))
    message = (
        r"^129 tokens are more than the 128 positions of the model's rope settings; extend it first "
        r"\(hici\.extend_rope\(model, 129\)\)(, and read the tokens again)?, or make the cache with "
        r"allow_beyond_rope=True$"
    )
    _assert_refused(model, cache, message, ids[:, 128:129])
    assert cache.tokens == [128, 128]
    _assert_refused(model, HiCICache(model), message.replace("129", "140"), ids)
    free = HiCICache(model, allow_beyond_rope=True)
    assert difference(read(model, free, ids, cut(140, [100, 128])), logits(model, ids)) < 1e-5


def test_padding_takes_no_rope(model):
    """Real tokens count, not columns."""
    ids, mask = padded([random_ids(1, 120)[0], random_ids(1, 5)[0]], "left", total=140)
    cache = HiCICache(model)
    assert read(model, cache, ids, cut(140, [70]), mask).isfinite().all()
    assert cache.tokens == [120, 5]


NO_TOKENS = (
    r"^the input has no tokens; give at least one \(to go on with a cache, give all tokens so far and the new ones, or "
    r"the new ones with an attention_mask that covers all\)$"
)


def test_no_tokens(model, filled):
    empty = random_ids(2, 0)
    for cache in (None, filled):
        _assert_refused(model, cache, NO_TOKENS, empty)
    with pytest.raises(ValueError, match=NO_TOKENS):
        model.generate(random_ids(1, 0), **GENERATE)
    with pytest.raises(ValueError, match=NO_TOKENS):  # new tokens without the mask of all: fewer than were read
        model.generate(random_ids(2, 5), past_key_values=filled, **GENERATE)
    _assert_as_before(model, filled)
