"""HiCICache: any split of the input gives the logits of one pass over all of it."""

import functools

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import hici
from helpers import (
    ARCHITECTURES,
    SEGMENT,
    cut,
    difference,
    logits,
    padded,
    random_ids,
    randomise,
    read,
    relative,
    small_config,
    strong_model,
    tiny_model,
)
from hici import HiCICache, reconfigure

TOLERANCE = 1e-5
LONGEST = 6 * SEGMENT + 5
SPLITS = {
    "one-by-one": range(1, LONGEST),
    "uneven": [3, 4, 11, 30, 31, 47],
    "at-borders": [SEGMENT, 3 * SEGMENT, 4 * SEGMENT],
    "beside-borders": [SEGMENT - 1, SEGMENT + 1, 3 * SEGMENT - 1, 3 * SEGMENT + 1],
    "whole": [],
    "prompt-and-tokens": [2 * SEGMENT + 3, *range(2 * SEGMENT + 4, LONGEST)],
}


@functools.cache
def _model(architecture="llama"):
    return strong_model(architecture, visibility="past")


def _assert_equal(model, ids, pieces, mask=None, tolerance=TOLERANCE, **inputs):
    cache = HiCICache(model)
    out, expected = read(model, cache, ids, pieces, mask, **inputs), logits(model, ids, mask, **inputs)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert out.isfinite().all()
    assert difference(out[real], expected[real]) < tolerance
    assert cache.tokens == real.sum(1).tolist()
    assert cache.get_seq_length() == ids.shape[1]
    return cache


lengths = st.integers(1, LONGEST)
borders = st.one_of(st.lists(st.integers(1, LONGEST - 1), max_size=8), st.just(list(range(1, LONGEST))))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@given(length=lengths, borders=borders, batch=st.integers(1, 2), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_random_splits(architecture, length, borders, batch, seed):
    _assert_equal(_model(architecture), random_ids(batch, length, seed), cut(length, borders))


def _random_mask(rows, length, kind, seed):
    """Rows of random lengths, padded on one side or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, length + 1, (rows, 1), generator=generator)
    column = torch.arange(length)
    if kind == "right":
        return (column < counts).long()
    if kind == "left":
        return (column >= length - counts).long()
    mask = (torch.rand(rows, length, generator=generator) > 0.3).long()
    mask[:, -1 if kind == "holes" else 0] = 1
    return mask


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@given(
    length=lengths,
    borders=borders,
    kind=st.sampled_from(["left", "right", "holes", "holes-at-the-end"]),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_random_splits_with_padding(architecture, length, borders, kind, rows, seed):
    mask = _random_mask(rows, length, kind, seed)
    _assert_equal(_model(architecture), random_ids(rows, length, seed), cut(length, borders), mask)


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_rows_of_different_lengths_in_every_call(lengths, seed):
    """Each call has another padding: some rows have no token in it."""
    rows = 3
    masks = [_random_mask(rows, n, "holes", seed + i) for i, n in enumerate(lengths) if n]
    for i, mask in enumerate(masks):
        mask[i % rows] = 0
    mask = torch.cat([torch.ones(rows, 1, dtype=torch.long), *masks], dim=1)
    ends = torch.tensor([1, *(m.shape[1] for m in masks)]).cumsum(0).tolist()
    _assert_equal(_model(), random_ids(rows, mask.shape[1], seed), cut(mask.shape[1], ends), mask)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, split):
    model = _model(architecture)
    pieces = cut(LONGEST, SPLITS[split])
    _assert_equal(model, random_ids(2, LONGEST), pieces)
    rows = [random_ids(1, length, seed=length)[0] for length in (LONGEST, 2 * SEGMENT, SEGMENT + 3, 1)]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        _assert_equal(model, ids, pieces, mask)


def test_rows_are_what_they_are_alone():
    rows = [random_ids(1, length, seed=length)[0] for length in (LONGEST, 2 * SEGMENT, SEGMENT + 3, 1)]
    ids, mask = padded(rows, "left")
    out = read(_model(), HiCICache(_model()), ids, cut(LONGEST, SPLITS["uneven"]), mask)
    for row, batched in zip(rows, out, strict=True):
        assert difference(batched[-len(row) :], logits(_model(), row[None])[0]) < TOLERANCE


CONFIGS = {
    "global": {"use_local": False},
    "local": {"use_global": False},
    "no-slots": {"use_global": False, "use_local": False},
    "independent": {"compress_dim": None, "integrator_dim": 24},
    "no-bottleneck": {"bottleneck_dim": None, "integrator_dim": 32},
    "reference": {"backend": "reference"},
    "S1": {"segment_size": 1},
    "S5": {"segment_size": 5},
    "S-beyond-the-text": {"segment_size": 100},
    "plain": {"num_local_slots": 9},  # M * h > bottleneck
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_config(changes):
    model = strong_model(visibility="past", check=changes.get("segment_size") != 100, **changes)
    ids, mask = padded([random_ids(1, length, seed=length)[0] for length in (LONGEST, SEGMENT + 3, 1)], "left")
    for split in ("one-by-one", "uneven", "at-borders", "whole"):
        _assert_equal(model, ids[:1], cut(LONGEST, SPLITS[split]))
        _assert_equal(model, ids, cut(LONGEST, SPLITS[split]), mask)


@pytest.mark.parametrize("architecture", ["mistral", "phi3", "gemma2", "gemma3"])
def test_a_sliding_window_of_a_segment(architecture):
    model = strong_model(architecture, visibility="past", options={"sliding_window": SEGMENT})
    _assert_equal(model, random_ids(2, LONGEST), cut(LONGEST, SPLITS["uneven"]))


def _lora(model, kind):
    if kind == "add_lora":
        return hici.add_lora(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]  # plain PEFT finds them inside the HiCI modules too
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names))


@pytest.mark.parametrize("kind", ["add_lora", "inside"])
def test_lora(kind):
    model = hici.attach(tiny_model(), small_config(visibility="past"))
    wrapped = _lora(model, kind).eval()
    inside = [name for name, _ in wrapped.named_parameters() if "local_constructor" in name and "lora_" in name]
    assert bool(inside) == (kind == "inside")
    randomise(wrapped)
    _assert_equal(wrapped, random_ids(2, LONGEST), cut(LONGEST, SPLITS["uneven"]))
    with wrapped.disable_adapter():
        _assert_equal(wrapped, random_ids(2, LONGEST), cut(LONGEST, SPLITS["uneven"]))


@pytest.mark.parametrize("split", ["one-by-one", "uneven", "whole"])
def test_positions_of_the_caller(split):
    model, ids = _model(), random_ids(2, LONGEST)
    positions = torch.arange(LONGEST)[None].expand(2, -1) * 2 + 7
    _assert_equal(model, ids, cut(LONGEST, SPLITS[split]), position_ids=positions)
    assert difference(logits(model, ids, position_ids=positions), logits(model, ids)) > 0.1


def test_embeddings_instead_of_ids():
    model, ids = _model(), random_ids(2, LONGEST)
    embeds, cache = model.get_input_embeddings()(ids).detach(), HiCICache(model)
    with torch.no_grad():
        outs = [model(inputs_embeds=embeds[:, a:b], past_key_values=cache).logits for a, b in cut(LONGEST, [5, 20])]
    assert difference(torch.cat(outs, dim=1), logits(model, ids)) < TOLERANCE


def _errors(out, other, exact):
    """Relative distances from the exact logits: of the cache, of one pass."""
    return relative(out, exact), relative(other, exact)


@pytest.mark.parametrize("split", ["one-by-one", "uneven"])
def test_bfloat16(split):
    """Rounding comes at other places: no further from the float32 logits than one pass is."""
    ids = random_ids(2, LONGEST)
    exact = logits(_model(), ids)
    model = strong_model(visibility="past").to(torch.bfloat16)
    out = read(model, HiCICache(model), ids, cut(LONGEST, SPLITS[split]))
    ours, one_pass = _errors(out, logits(model, ids), exact)
    assert ours < max(1.5 * one_pass, 0.03)


@pytest.mark.parametrize("split", ["one-by-one", "uneven"])
def test_autocast(split):
    model, ids = _model(), random_ids(2, LONGEST)
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = read(model, HiCICache(model), ids, cut(LONGEST, SPLITS[split]))
        ours, one_pass = _errors(out, logits(model, ids), exact)
    assert ours < max(1.5 * one_pass, 0.03)


def test_decode_over_raw_keys_is_something_else():
    """The comparison has power: without segments and slots the same tokens give other logits."""
    model = strong_model(visibility="past", decode="raw")
    ids = random_ids(2, LONGEST)
    raw = read(model, DynamicCache(config=model.config), ids, cut(LONGEST, [LONGEST - 9]))
    reconfigure(model, decode="auto")
    assert difference(raw[:, -9:], logits(model, ids)[:, -9:]) > 0.1
    _assert_equal(model, ids, cut(LONGEST, [LONGEST - 9]))


def test_tokens_of_far_segments_still_matter():
    """Through slots alone: the first segment's tokens are long gone."""
    model, ids = _model(), random_ids(1, LONGEST)
    other = ids.clone()
    other[:, :SEGMENT] = random_ids(1, SEGMENT, seed=8)
    outs = [read(model, HiCICache(model), x, cut(LONGEST, [LONGEST - 1])) for x in (ids, other)]
    assert difference(outs[0][:, -1], outs[1][:, -1]) > 1e-3
