"""Published generation in mode "hici" (decode "raw"): HiCI prefill, then decoding over all raw keys."""

import logging

import pytest
import torch
from transformers import DynamicCache

from helpers import ARCHITECTURES, difference, logits, padded, random_ids, stock_attention, strong_model, tiny_model

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def _greedy(model, ids, mask=None):
    """generate's tokens [B, NEW] and logits [B, NEW, V]. Without a mask generate takes pad_token_id for padding."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        result = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
    return result.sequences[:, ids.shape[1] :], torch.stack(result.logits, dim=1)


@torch.no_grad()
def _by_hand(model, ids, stock="sdpa"):
    """Prefill in mode "hici", then the *stock* attention over the cache it filled."""
    cache = DynamicCache(config=model.config)
    out = model(ids, past_key_values=cache, use_cache=True)
    tokens, steps = [], []
    model.set_attn_implementation(stock)
    for _ in range(NEW):
        steps.append(out.logits[:, -1])
        tokens.append(steps[-1].argmax(-1))
        out = model(tokens[-1][:, None], past_key_values=cache, use_cache=True)
    model.set_attn_implementation("hici")
    return torch.stack(tokens, 1), torch.stack(steps, 1)


@pytest.mark.parametrize("visibility", ["all", "past"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_prefill_and_stock_decode(architecture, visibility):
    model = strong_model(architecture, visibility=visibility, decode="raw")
    ids = random_ids(2, 29)
    tokens, steps = _greedy(model, ids)
    expected_tokens, expected_steps = _by_hand(model, ids, stock_attention(architecture))
    assert torch.equal(tokens, expected_tokens)
    assert difference(steps, expected_steps) < 2e-5
    assert difference(steps[:, 0], logits(model, ids)[:, -1]) < 1e-5
    model.set_attn_implementation(stock_attention(architecture))
    assert difference(_greedy(model, ids)[1][:, 0], steps[:, 0]) > 0.1  # not the stock model all along


def test_the_cache_holds_raw_keys_of_tokens_only():
    model = strong_model()
    cache = DynamicCache()
    ids = random_ids(1, 29)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 29
        stock = DynamicCache()
        tiny = tiny_model()
        tiny.load_state_dict({k: v for k, v in model.state_dict().items() if k in tiny.state_dict()})
        tiny(ids, past_key_values=stock)
    assert difference(cache.layers[0].keys, stock.layers[0].keys) < 1e-6  # layer 0 sees the same input in both


def test_several_tokens_at_once_on_a_filled_cache():
    model = strong_model()
    ids, more = random_ids(2, 21), random_ids(2, 5, seed=7)
    with torch.no_grad():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        block = model(more, past_key_values=cache).logits
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        one_by_one = torch.cat([model(more[:, i : i + 1], past_key_values=cache).logits for i in range(5)], dim=1)
    assert difference(block, one_by_one) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["hici", "hici_s2"])
def test_left_padded_batch_equals_single_rows(architecture, mode):
    model = strong_model(architecture, visibility="past", decode="raw")
    model.set_attn_implementation(mode)
    rows = [random_ids(1, length, seed=length)[0] for length in (29, 17, 9, 1)]
    ids, mask = padded(rows, "left")
    tokens, steps = _greedy(model, ids, mask)
    for i, row in enumerate(rows):
        expected_tokens, expected_steps = _greedy(model, row[None])
        assert torch.equal(tokens[i], expected_tokens[0]), i
        assert difference(steps[i], expected_steps[0]) < 2e-5, i


def test_decode_with_a_mask_and_no_positions():
    """A hand-written loop that passes the whole mask only: positions are derived with a filled cache too."""
    model = strong_model(visibility="past")
    rows = [random_ids(1, 29)[0], random_ids(1, 17)[0]]
    ids, mask = padded(rows, "left")
    new = random_ids(2, 3, seed=9)
    with torch.no_grad():
        cache = DynamicCache()
        model(ids, attention_mask=mask, past_key_values=cache)
        mask = torch.cat((mask, torch.ones(2, 3, dtype=torch.long)), dim=1)
        batched = model(new, attention_mask=mask, past_key_values=cache).logits
        for i, row in enumerate(rows):
            cache = DynamicCache()
            model(row[None], past_key_values=cache)
            assert difference(batched[i], model(new[i : i + 1], past_key_values=cache).logits[0]) < 1e-5


@pytest.mark.parametrize("visibility", ["all", "past"])
def test_beam_search(visibility):
    model = strong_model(visibility=visibility, decode="raw")
    ids, mask = padded([random_ids(1, 29)[0], random_ids(1, 17)[0]], "left")
    arguments = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, **arguments)
        assert out.shape == (2, 34)
        alone = model.generate(ids[1:, 12:], attention_mask=mask[1:, 12:], **arguments)
    assert torch.equal(out[1, 29:], alone[0, 17:])


WINDOWED = ("mistral", "phi3", "gemma2", "gemma3")


def _windowed(architecture):
    return strong_model(architecture, visibility="past", decode="raw", options={"sliding_window": 10})


@pytest.mark.parametrize("architecture", WINDOWED)
def test_sliding_window_in_decode(architecture):
    model = _windowed(architecture)
    ids = random_ids(2, 29)
    tokens, steps = _greedy(model, ids)
    expected_tokens, expected_steps = _by_hand(model, ids, stock_attention(architecture))
    assert torch.equal(tokens, expected_tokens)
    assert difference(steps, expected_steps) < 2e-5


@pytest.mark.parametrize("architecture", WINDOWED)
def test_sliding_window_of_several_tokens_on_a_cache_that_keeps_all_keys(architecture):
    model = _windowed(architecture)
    ids, more = random_ids(2, 29), random_ids(2, 5, seed=7)
    results = []
    for mode in ("hici", stock_attention(architecture)):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model.set_attn_implementation(mode)
            results.append(model(more, past_key_values=cache).logits)
            model.set_attn_implementation("hici")
    assert difference(*results) < 1e-5


@pytest.mark.parametrize("architecture", WINDOWED)
def test_sliding_window_with_left_padding(architecture):
    model = _windowed(architecture)
    rows = [random_ids(1, length, seed=length)[0] for length in (29, 17, 9, 1)]
    tokens, steps = _greedy(model, *padded(rows, "left"))
    for i, row in enumerate(rows):
        expected_tokens, expected_steps = _greedy(model, row[None])
        assert torch.equal(tokens[i], expected_tokens[0]), i
        assert difference(steps[i], expected_steps[0]) < 2e-5, i


def test_raw_decode_is_told_once(caplog):
    model = strong_model()
    with caplog.at_level(logging.INFO, logger="hici"):
        _greedy(model, random_ids(1, 21))
        _greedy(model, random_ids(1, 21))
    told = [r for r in caplog.records if "without segments and slots" in r.getMessage()]
    assert len(told) == 1
