"""What a HiCICache holds: rows moved, taken back, copied, interrupted."""

import copy

import pytest
import torch

from helpers import cut, difference, logits, padded, random_ids, read, strong_model
from hici import HiCICache

TOLERANCE = 1e-5
DOCUMENT = 29  # inside of a segment
ROWS = (29, 17, 8, 1)


@pytest.fixture(scope="module")
def model():
    return strong_model(visibility="past")


def _ragged():
    return padded([random_ids(1, length, seed=length)[0] for length in ROWS], "left")


def _uniform():
    ids = random_ids(4, DOCUMENT)
    return ids, torch.ones_like(ids)


def _filled(model, ids, mask=None):
    cache = HiCICache(model)
    read(model, cache, ids, cut(ids.shape[1], [5, 20]), mask)
    return cache


def _assert_goes_on(model, cache, ids, mask=None, length=21, seed=7):
    """More tokens after what the cache has read (ids, mask): as one pass over both."""
    new = random_ids(ids.shape[0], length, seed)
    begin, ids = ids.shape[1], torch.cat((ids, new), dim=1)
    mask = None if mask is None else torch.cat((mask, torch.ones_like(new)), dim=1)
    pieces = [(begin + a, begin + b) for a, b in cut(length, [1, 2, 6])]
    out = read(model, cache, ids, pieces, mask)
    assert difference(out, logits(model, ids, mask)[:, begin:]) < TOLERANCE


def _assert_is(model, cache, ids, mask=None, **options):
    """The cache has read these ids; it is as before afterwards."""
    _assert_goes_on(model, copy.deepcopy(cache), ids, mask, **options)


# ---- rows

SELECTIONS = {
    "other-order": torch.tensor([2, 0, 3, 1]),
    "twice": torch.tensor([1, 1, 3, 0]),
    "fewer": torch.tensor([3, 1]),
    "more": torch.tensor([0, 3, 2, 2, 1, 0]),
    "one": torch.tensor([1]),
}


@pytest.mark.parametrize("batch", [_uniform, _ragged], ids=["uniform", "ragged"])
@pytest.mark.parametrize("index", SELECTIONS.values(), ids=SELECTIONS)
def test_select_rows(model, batch, index):
    ids, mask = batch()
    for act in ("reorder_cache", "batch_select_indices"):
        cache = _filled(model, ids, mask)
        before = cache.tokens
        getattr(cache, act)(index)
        assert cache.tokens == [before[i] for i in index.tolist()]
        _assert_goes_on(model, cache, ids[index], mask[index])


@pytest.mark.parametrize("batch", [_uniform, _ragged], ids=["uniform", "ragged"])
def test_select_rows_by_bool(model, batch):
    ids, mask = batch()
    cache = _filled(model, ids, mask)
    kept = torch.tensor([True, False, True, False])
    cache.batch_select_indices(kept)
    assert cache.tokens == mask.sum(1)[kept].tolist()
    _assert_goes_on(model, cache, ids[kept], mask[kept])


@pytest.mark.parametrize("batch", [_uniform, _ragged], ids=["uniform", "ragged"])
def test_repeat_rows(model, batch):
    ids, mask = batch()
    cache = _filled(model, ids, mask)
    cache.batch_repeat_interleave(3)
    _assert_goes_on(model, cache, ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))


def test_rows_do_not_share_what_is_written(model):
    """Two beams of one row, then different tokens."""
    ids = random_ids(1, DOCUMENT)
    cache = _filled(model, ids)
    cache.batch_repeat_interleave(2)
    _assert_goes_on(model, cache, ids.expand(2, -1))


def test_rows_of_an_empty_cache(model):
    cache = HiCICache(model)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.tokens == []
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert repr(cache) == "HiCICache(tokens=[], segment_size=8, nbytes=0)"


# ---- going back


@pytest.mark.parametrize("batch", [_uniform, _ragged], ids=["uniform", "ragged"])
def test_reset(model, batch):
    ids, mask = batch()
    cache = _filled(model, random_ids(2, 13))
    cache.reset()
    assert (cache.tokens, cache.get_seq_length(), cache.nbytes) == ([], 0, 0)
    read(model, cache, ids, [(0, ids.shape[1])], mask)
    _assert_goes_on(model, cache, ids, mask)


@pytest.mark.parametrize("batch", [_uniform, _ragged], ids=["uniform", "ragged"])
def test_questions_about_one_document(model, batch):
    ids, mask = batch()
    cache = _filled(model, ids, mask)
    document = cache.snapshot()
    for i, length in enumerate((3, 30, 1, 8)):
        _assert_goes_on(model, cache, ids, mask, length=length, seed=i)
        cache.restore(document)
        assert cache.get_seq_length() == ids.shape[1]
    cache.reset()
    cache.restore(document)
    _assert_goes_on(model, cache, ids, mask)


@pytest.mark.parametrize("length", [8, 16, 3])
def test_questions_about_whole_segments(model, length):
    """Nothing but slots is in the snapshot, and whole segments write nothing but slots."""
    ids = random_ids(2, 24)
    cache = _filled(model, ids)
    document = cache.snapshot()
    for seed in range(3):
        read(model, cache, random_ids(2, length, seed), [(0, length)])
        cache.restore(document)
    _assert_goes_on(model, cache, ids)


def test_a_snapshot_of_nothing(model):
    cache = HiCICache(model)
    nothing = cache.snapshot()
    read(model, cache, random_ids(2, 13), [(0, 13)])
    cache.restore(nothing)
    assert cache.tokens == []
    _assert_goes_on(model, cache, random_ids(1, 0))


def test_crop(model):
    ids = random_ids(2, 40)
    cache = _filled(model, ids[:, :29])
    snapshot = cache.snapshot()
    read(model, cache, ids, [(29, 35)])
    cache.crop(0)
    assert cache.get_seq_length() == 35
    _assert_is(model, cache, ids[:, :35])
    cache.crop(-6)
    assert cache.get_seq_length() == 29
    _assert_is(model, cache, ids[:, :29])
    read(model, cache, ids, [(29, 40)])
    cache.crop(-11)
    _assert_is(model, cache, ids[:, :29])
    cache.crop(-29)
    assert cache.tokens == []
    del snapshot
    _assert_goes_on(model, cache, ids[:, :0])


@pytest.mark.parametrize(
    "tokens, message",
    [
        (-3, r"crop\(-3\) of a HiCICache: tokens that are folded into slots cannot be taken out; take a snapshot\(\) "
             r"at token 26 while it is there, or reset\(\) and read them again"),
        (1, r"crop\(1\) of a HiCICache with 29 tokens; give a number from -29 to 0"),
        (-30, r"crop\(-30\) of a HiCICache with 29 tokens; give a number from -29 to 0"),
    ],
)  # fmt: skip
def test_crop_elsewhere(model, tokens, message):
    ids = random_ids(2, 29)
    cache = _filled(model, ids)
    with pytest.raises(ValueError, match=message):
        cache.crop(tokens)
    _assert_goes_on(model, cache, ids)


def test_a_snapshot_that_is_gone_is_no_place_to_crop_to(model):
    ids = random_ids(1, 29)
    cache = _filled(model, ids[:, :25])
    cache.snapshot()
    read(model, cache, ids, [(25, 29)])
    with pytest.raises(ValueError, match=r"crop\(-4\) of a HiCICache: tokens that are folded"):
        cache.crop(-4)


def test_crop_after_restore_knows_the_way_to_there_only(model):
    """A tree: document, then two continuations with snapshots in each."""
    document, one, two = random_ids(1, 10, seed=2), random_ids(1, 5, seed=3), random_ids(1, 5, seed=4)
    cache = HiCICache(model)
    read(model, cache, document, [(0, 10)])
    at_document = cache.snapshot()
    read(model, cache, one, [(0, 5)])
    at_one = cache.snapshot()
    cache.restore(at_document)
    read(model, cache, two, [(0, 2)])
    in_two = cache.snapshot()
    read(model, cache, two, [(2, 5)])
    read(model, cache, two, [(0, 2)])
    with pytest.raises(ValueError, match="take a snapshot"):
        cache.crop(-2)  # at_one has as many tokens, but others
    cache.restore(at_one)
    with pytest.raises(ValueError, match="take a snapshot"):
        cache.crop(-3)  # in_two stands there
    read(model, cache, two, [(0, 3)])
    cache.crop(-3)
    _assert_is(model, cache, torch.cat((document, one), dim=1))
    cache.crop(-5)
    _assert_is(model, cache, document)
    cache.restore(in_two)
    _assert_is(model, cache, torch.cat((document, two[:, :2]), dim=1))
    cache.crop(-2)
    _assert_is(model, cache, document)


def test_a_snapshot_does_not_see_other_rows_afterwards(model):
    ids = random_ids(4, 29)
    cache = _filled(model, ids)
    snapshot = cache.snapshot()
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    read(model, cache, ids.flip(0), [(20, 29)])
    with pytest.raises(ValueError, match=r"crop\(-9\)"):  # it would bring the rows back in their old order
        cache.crop(-9)
    cache.restore(snapshot)
    _assert_goes_on(model, cache, ids)


def test_restore_another_cache_s_snapshot(model):
    cache, other = _filled(model, random_ids(1, 9)), HiCICache(model)
    with pytest.raises(ValueError, match="the snapshot is of another HiCICache; restore the cache that made it"):
        other.restore(cache.snapshot())
    _assert_goes_on(model, cache, random_ids(1, 9))


# ---- copies


@pytest.mark.parametrize("batch", [_uniform, _ragged], ids=["uniform", "ragged"])
def test_deepcopy(model, batch):
    ids, mask = batch()
    cache = _filled(model, ids, mask)
    kept = cache.snapshot()
    twin = copy.deepcopy(cache)
    assert (twin.tokens, twin.nbytes) == (cache.tokens, cache.nbytes)
    _assert_goes_on(model, twin, ids, mask, seed=11)
    _assert_goes_on(model, cache, ids, mask)
    twin.restore(kept)  # of one that it is a copy of
    twin.reset()
    assert cache.get_seq_length() == ids.shape[1] + 21
    cache.crop(-21)
    _assert_goes_on(model, cache, ids, mask)


# ---- calls


@pytest.mark.parametrize("batch", [_uniform, _ragged], ids=["uniform", "ragged"])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_inference_mode_and_no_grad_in_turn(model, batch, first):
    ids, mask = batch()
    ids, mask = torch.cat((ids, random_ids(4, 19, seed=3)), dim=1), torch.cat((mask, mask.new_ones(4, 19)), dim=1)
    others = {torch.inference_mode: torch.no_grad, torch.no_grad: torch.inference_mode}
    cache, context, outs = HiCICache(model), first, []
    for begin, end in cut(ids.shape[1], [1, 2, 6, 7, 16, 30, 31, 32, 33, 40]):
        with context():
            outs.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        context = others[context]
    real = mask.bool()
    assert difference(torch.cat(outs, dim=1).clone()[real], logits(model, ids, mask)[real]) < TOLERANCE


def test_a_frozen_model_needs_no_context():
    model = strong_model(visibility="past").requires_grad_(False)
    ids = random_ids(1, 29)
    cache = HiCICache(model)
    outs = [model(ids[:, a:b], past_key_values=cache).logits for a, b in cut(29, [3, 4, 20])]
    assert difference(torch.cat(outs, dim=1), logits(model, ids)) < TOLERANCE


def _fail(*args, **kwargs):
    raise RuntimeError("out of memory")


STOPPED = (
    r"the last call with this HiCICache stopped in its middle, so its layers hold different tokens; call its "
    r"restore\(snapshot\) or reset\(\), or make a new one"
)


@pytest.mark.parametrize("mend", ["restore", "reset"])
@pytest.mark.parametrize(
    "layer, part, name", [(0, "mlp", "forward"), (0, "self_attn", "hici_attend"), (1, "self_attn", "hici_attend")]
)
def test_a_call_that_stops_in_its_middle(monkeypatch, model, mend, layer, part, name):
    ids, more = random_ids(2, 29), random_ids(2, 11, seed=4)
    cache = _filled(model, ids)
    snapshot = cache.snapshot()
    with monkeypatch.context() as patched:
        patched.setattr(getattr(model.model.layers[layer], part), name, _fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            read(model, cache, more, [(0, 11)])
    for act in (lambda: read(model, cache, more, [(0, 11)]), cache.snapshot):
        with pytest.raises(ValueError, match=STOPPED):
            act()
    if mend == "restore":
        cache.restore(snapshot)
        _assert_goes_on(model, cache, ids)
    else:
        cache.reset()
        _assert_goes_on(model, cache, ids[:, :0])
