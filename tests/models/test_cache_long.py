"""Thousands of tokens one by one: nothing grows, nothing drifts from one pass over all of them."""

import gc
from unittest import mock

import pytest
import torch

from helpers import assert_slots_matter, difference, logits, random_ids, relative, strong_model
from hici import HiCICache
from hici.core import broadcast
from hici.core.global_integration import cumulative_statistics, running_statistics, slot_statistics, statistics_of

LENGTHS = [pytest.param(3_000, id="3000"), pytest.param(20_000, id="20000", marks=pytest.mark.slow)]
S = 64


@pytest.fixture(scope="module")
def model():
    model = strong_model(
        visibility="past", segment_size=S, check=False, options={"max_position_embeddings": 32768}
    ).requires_grad_(False)
    assert_slots_matter(model, 3 * S + 5)
    return model


def _live_tensors():
    """(number, bytes) of all tensors that Python knows."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return len(alive), sum(x.nbytes for x in alive)


@torch.no_grad()
def _one_by_one(model, cache, ids):
    """Logits [T, V], and what was held after every quarter of the way: (cache's bytes, number of tensors, bytes)."""
    outs, held = torch.zeros(ids.shape[1], model.config.vocab_size), []
    for i in range(ids.shape[1]):
        outs[i] = model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0]
        if i % (ids.shape[1] // 4) == S:
            held.append((cache.nbytes, *_live_tensors()))
    return outs, held


def _local_slots(model, ids):
    """Local slots [1, N - 1, M, D] that one pass over the ids makes, of every layer."""
    made = []

    def recorded(local_BNMD):
        made.append(local_BNMD)
        return cumulative_statistics(local_BNMD)

    with mock.patch.object(broadcast, "cumulative_statistics", recorded):
        logits(model, ids)
    return made


def _assert_statistics(layer, local_BNMD):
    """Those of the layer are those of all finished segments."""
    m = local_BNMD.shape[2]
    expected = running_statistics(local_BNMD)
    for name, value in layer.state.statistics._asdict().items():
        assert relative(value, getattr(expected, name)[:, -1]) < 1e-4, name
    ours = statistics_of(layer.state.statistics, m)
    exact = slot_statistics(local_BNMD.double())
    assert exact[:, 3].min() > 1e-3  # something to compare
    assert relative(ours, exact) < 1e-4


@pytest.mark.parametrize("length", LENGTHS)
def test_nothing_grows_and_nothing_drifts(model, length):
    assert length % S  # a ragged tail
    ids, cache = random_ids(1, length), HiCICache(model)
    outs, held = _one_by_one(model, cache, ids)
    assert len(held) == 4
    assert len(set(held)) == 1, held
    assert difference(outs, logits(model, ids)[0]) < 1e-4
    locals_of_layers = _local_slots(model, ids)
    for layer, local_BNMD in zip(cache.layers, locals_of_layers, strict=True):
        assert local_BNMD.shape[1] == length // S
        _assert_statistics(layer, local_BNMD)
    one_pass = HiCICache(model)  # and what is held is what a whole prompt leaves
    with torch.no_grad():
        model(ids, past_key_values=one_pass)
    for ours, theirs in zip(cache.layers, one_pass.layers, strict=True):
        end = ours.num_slots + length % S
        assert difference(ours.state.keys[:, :, :end], theirs.state.keys[:, :, :end]) < 1e-4


def test_memory_is_that_of_one_segment(model):
    """Held: P slots and S tokens of keys and values, and stages 1 and 2; it is there after the first segment."""
    cache, sizes = HiCICache(model), []
    ids = random_ids(3, 5 * S + 3)
    with torch.no_grad():
        for begin in range(0, ids.shape[1], S // 2):
            model(ids[:, begin : begin + S // 2], past_key_values=cache)
            sizes.append(cache.nbytes)
    assert len(set(sizes[2:])) == 1, sizes
    state, config = cache.layers[0].state, model.config
    assert state.keys.shape == (3, config.num_key_value_heads, 5 + S, config.hidden_size // 4)
    assert cache.nbytes == sum(x.nbytes for layer in cache.layers for x in layer.state.tensors().values())
    assert cache.nbytes < 3 * 40_000


def test_a_long_prompt_leaves_no_more_than_a_short_one(model):
    sizes = []
    for length in (2 * S + 3, 40 * S + 3):
        cache = HiCICache(model)
        with torch.no_grad():
            model(random_ids(1, length), past_key_values=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1]
    tensors = [x for layer in cache.layers for x in layer.state.tensors().values()]
    assert sum(x.untyped_storage().nbytes() for x in tensors) == sizes[1]  # no view of something larger is kept
