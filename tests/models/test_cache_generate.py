"""model.generate with a HiCICache, given or chosen by itself: what recomputing every step from scratch gives."""

import copy
import gc
import logging
import weakref

import peft
import pytest
import torch
from transformers import DynamicCache

import hici
from helpers import (
    ARCHITECTURES,
    difference,
    logits,
    padded,
    random_ids,
    randomise,
    small_config,
    strong_model,
    tiny_model,
)
from hici import HiCICache, reconfigure
from hici.models.generation_cache import OLD_PREFILL, PREPARE
from hici.models.merged import merged_class

NEW = 12  # over a border, from every prompt here


@pytest.fixture(scope="module")
def model():
    return strong_model(visibility="past")


@pytest.fixture(scope="module")
def batch():
    return padded([random_ids(1, length, seed=length)[0] for length in (29, 17, 8, 1)], "left")


def _generate(model, ids, mask=None, **options):
    """Tokens with the prompt, logits [B, n, V] (None of beams), cache."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    torch.manual_seed(3)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    steps = torch.stack(out.logits, dim=1) if settings.get("num_beams", 1) == 1 else None
    return out.sequences, steps, out.get("past_key_values")


def _assert_as_recomputed(model, ids, mask=None, **options):
    """The cache that generate used."""
    expected, expected_steps, none = _generate(
        model, ids, mask, use_cache=False, **{k: v for k, v in options.items() if k != "past_key_values"}
    )
    assert none is None
    tokens, steps, cache = _generate(model, ids, mask, **options)
    assert torch.equal(tokens, expected)
    if steps is not None:
        assert difference(steps, expected_steps) < 2e-5
    return cache


def _by_hand(model, ids):
    for _ in range(NEW):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy(architecture, batch):
    model = strong_model(architecture, visibility="past")
    ids = random_ids(2, 29)
    for cache in (None, HiCICache(model)):
        tokens, _, used = _generate(model, ids, past_key_values=cache)
        assert torch.equal(tokens, _by_hand(model, ids))
        assert type(used) is HiCICache
        assert cache in (None, used)
        assert used.tokens == [29 + NEW - 1] * 2  # the last token was not read
    assert type(_assert_as_recomputed(model, *batch)) is HiCICache


@pytest.mark.parametrize("given", [False, True], ids=["chosen", "given"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 0},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=["sampling", "several", "beams", "several-beams", "sampled-beams"],
)
def test_every_search(model, batch, options, given):
    if given:
        options = {**options, "past_key_values": HiCICache(model)}
    for inputs in ((random_ids(2, 29),), batch):
        if given:
            options["past_key_values"].reset()
        assert type(_assert_as_recomputed(model, *inputs, **options)) is HiCICache


@pytest.mark.parametrize("size", [1, 3, 8, 11, 16, 28, 29, 64])
def test_prefill_in_pieces(model, batch, size):
    for inputs in ((random_ids(2, 29),), batch):
        whole, steps, _ = _generate(model, *inputs)
        tokens, steps_of_pieces, cache = _generate(model, *inputs, prefill_chunk_size=size)
        assert torch.equal(tokens, whole)
        assert difference(steps_of_pieces, steps) < 2e-5
        assert type(cache) is HiCICache


@pytest.mark.parametrize("chunks", [None, 5])
@pytest.mark.parametrize("whole", [True, False], ids=["all-ids", "new-ids"])
def test_a_conversation(model, whole, chunks):
    cache = HiCICache(model)
    first, _, _ = _generate(model, random_ids(2, 29), past_key_values=cache)
    ids = torch.cat((first, random_ids(2, 10, seed=5)), dim=1)
    expected, steps, _ = _generate(model, ids, use_cache=False)
    read = cache.get_seq_length()
    given = ids if whole else ids[:, read:]  # the last token of the first turn has not been read
    if chunks and whole and OLD_PREFILL:
        with pytest.raises(ValueError, match=r"prefill_chunk_size=5 with a filled cache, .*hici\.prefill"):
            _generate(model, given, past_key_values=cache, prefill_chunk_size=chunks)
        return
    tokens, steps_on, _ = _generate(
        model, given, torch.ones_like(ids), past_key_values=cache, **({"prefill_chunk_size": chunks} if whole else {})
    )
    assert torch.equal(tokens[:, -NEW:], expected[:, -NEW:])
    assert difference(steps_on, steps) < 2e-5
    assert cache.tokens == [expected.shape[1] - 1] * 2


def test_a_conversation_of_padded_rows(model, batch):
    """The second turn is padded on the left too: holes in the rows."""
    ids, mask = batch
    cache = HiCICache(model)
    first, _, _ = _generate(model, ids, mask, past_key_values=cache)
    more, more_mask = padded([random_ids(1, length, seed=length)[0] for length in (2, 11, 20, 5)], "left")
    ids = torch.cat((first, more), dim=1)
    mask = torch.cat((mask, mask.new_ones(4, NEW), more_mask), dim=1)
    expected, steps, _ = _generate(model, ids, mask, use_cache=False)
    tokens, steps_on, _ = _generate(model, ids, mask, past_key_values=cache)
    assert torch.equal(tokens, expected)
    assert difference(steps_on, steps) < 2e-5
    for i in range(4):  # and of each row alone
        alone = _by_hand(model, ids[i : i + 1, mask[i].bool()])
        assert torch.equal(alone[0, -NEW:], tokens[i, -NEW:])


def test_embeddings_instead_of_ids(model):
    ids = random_ids(2, 29)
    embeds = model.get_input_embeddings()(ids).detach()
    out = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(out, _by_hand(model, ids)[:, 29:])


def test_it_is_told_once(caplog):
    model = strong_model(visibility="past")
    with caplog.at_level(logging.INFO, logger="hici"):
        for _ in range(2):
            _generate(model, random_ids(1, 21))
    told = [r for r in caplog.records if "generation in bounded memory" in r.getMessage()]
    assert [(r.levelno, r.name.split(".")[0]) for r in told] == [(logging.INFO, "hici")]
    assert "segments of 8 tokens" in told[0].getMessage()
    assert "hici.reconfigure(model, decode='raw')" in told[0].getMessage()


# ---- when it is another cache


@pytest.mark.parametrize(
    "config, options",
    [
        ({"visibility": "past", "decode": "raw"}, {}),
        ({"visibility": "all"}, {}),
        ({"visibility": "current"}, {}),
        ({"visibility": "all", "num_segments": 3}, {}),
        ({"visibility": "past"}, {"cache_implementation": "dynamic"}),
    ],
    ids=["raw", "all", "current", "num_segments", "dynamic"],
)
def test_decode_over_raw_keys(config, options):
    model = strong_model(**config)
    ids = random_ids(2, 29)
    tokens, steps, cache = _generate(model, ids, **options)
    assert type(cache) is DynamicCache
    given = DynamicCache(config=model.config)
    expected, expected_steps, used = _generate(model, ids, past_key_values=given)
    assert used is given
    assert torch.equal(tokens, expected)
    assert torch.equal(steps, expected_steps)
    assert difference(steps[:, :1], _generate(model, ids, use_cache=False)[1][:, :1]) < 1e-5


def test_raw_keys_are_something_else(model):
    ids = random_ids(2, 29)
    raw = _generate(model, ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=2)[1]
    assert difference(raw[:, 1], _generate(model, ids, max_new_tokens=2)[1][:, 1]) > 0.1


@pytest.mark.parametrize("mode", ["sdpa", "hici_s2"])
def test_other_modes_have_their_own_cache(mode):
    model = strong_model(visibility="past")
    model.set_attn_implementation(mode)
    assert type(_generate(model, random_ids(1, 21))[2]) is DynamicCache


# ---- calls of the model


def test_a_call_that_asks_for_a_cache(model):
    ids = random_ids(2, 29)
    with torch.no_grad():
        first = model(ids[:, :13], use_cache=True)
        cache = first.past_key_values
        assert type(cache) is HiCICache
        second = model(ids[:, 13:], past_key_values=cache)
    assert second.past_key_values is cache
    assert difference(torch.cat((first.logits, second.logits), dim=1), logits(model, ids)) < 1e-5


def test_a_call_with_gradients_gets_none(model):
    assert type(model(random_ids(2, 29), use_cache=True).past_key_values) is not HiCICache


@pytest.mark.parametrize("changes", [{"decode": "raw"}, {"visibility": "all"}], ids=["raw", "all"])
def test_a_call_without_bounded_decode_gets_none(changes):
    with torch.no_grad():
        out = strong_model(**{"visibility": "past", **changes})(random_ids(2, 29), use_cache=True)
    assert type(out.past_key_values) is DynamicCache


# ---- wrapped, copied, saved, detached, merged


def test_below_peft(batch):
    model = strong_model(visibility="past")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    randomise(wrapped)
    assert type(_assert_as_recomputed(wrapped, *batch)) is HiCICache
    assert type(_assert_as_recomputed(wrapped, *batch, past_key_values=HiCICache(wrapped))) is HiCICache


def _saved(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


@pytest.mark.parametrize("way", [lambda model, path: copy.deepcopy(model), _saved], ids=["deepcopy", "torch.save"])
def test_a_copy_has_a_cache_of_its_own(way, tmp_path):
    model = strong_model(visibility="past")
    twin = way(model, tmp_path)
    assert getattr(twin, PREPARE).model is twin
    reconfigure(model, visibility="all")  # the copy shares nothing
    randomise(model, seed=5)
    cache = _assert_as_recomputed(twin, random_ids(2, 29))
    assert type(cache) is HiCICache
    assert cache._reader.decoder() is twin.model
    assert type(_generate(model, random_ids(2, 29))[2]) is DynamicCache


def test_a_model_is_gone_when_nobody_holds_it():
    """Without a garbage collection, as a stock model: its memory is free at once."""
    model = strong_model(visibility="past")
    cache = _generate(model, random_ids(1, 21))[2]
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert cache.tokens == [21 + NEW - 1]


def test_detach_leaves_the_stock_generate():
    model = strong_model(visibility="past")
    assert PREPARE in vars(model)
    hici.detach(model)
    assert PREPARE not in vars(model)
    assert type(_generate(model, random_ids(1, 21))[2]) is DynamicCache
    hici.attach(model, small_config(visibility="past"))
    assert type(_generate(model, random_ids(1, 21))[2]) is HiCICache


def test_a_merged_model():
    config = tiny_model().config
    config.hici = {**small_config(visibility="past").to_dict(), "attention": "hici"}
    model = merged_class(config)._from_config(config, attn_implementation="hici").eval()
    randomise(model)
    assert type(_assert_as_recomputed(model, random_ids(2, 29))) is HiCICache
