"""Reading in pieces, and sessions that keep what was read."""

import pytest
import torch
from transformers import DynamicCache

from helpers import difference, logits, padded, random_ids, strong_model
from hici import HiCICache, prefill, reconfigure
from hici.models.session import Session

LONG = {"max_position_embeddings": 512}


@pytest.fixture(scope="module")
def bounded():
    return strong_model(visibility="past", options=LONG)


def _next_logits(model, ids, cache, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


@pytest.fixture
def by_segment(monkeypatch):
    """Pieces of one segment each, however short."""
    monkeypatch.setattr("hici.models.prefill.SMALL_PIECE", 1)


def test_short_segments_are_read_several_at_a_time(bounded, monkeypatch):
    monkeypatch.setattr("hici.models.prefill.SMALL_PIECE", 20)
    ends = []
    cache = prefill(bounded, random_ids(1, 5))
    prefill(bounded, random_ids(1, 50), cache, progress=lambda done, _: ends.append(5 + done))
    assert ends == [24, 48, 55]


def test_rows_at_different_places_are_read_in_whole_pieces(bounded, by_segment):
    ids, mask = padded([random_ids(1, length, seed=length)[0] for length in (45, 29, 8)], "left")
    seen = []
    prefill(bounded, ids, attention_mask=mask, progress=lambda done, _: seen.append(done))
    assert seen == [8, 16, 24, 32, 40, 45]


@pytest.mark.parametrize("piece_size", [None, 1, 5, 8, 100])
def test_pieces_of_any_size_equal_one_pass(bounded, piece_size, by_segment):
    ids = random_ids(2, 61)
    seen = []
    cache = prefill(
        bounded, ids[:, :-3], piece_size=piece_size, progress=lambda done, total: seen.append((done, total))
    )
    assert isinstance(cache, HiCICache)
    assert difference(_next_logits(bounded, ids[:, -3:], cache), logits(bounded, ids)[:, -3:]) < 1e-5
    assert [total for _, total in seen] == [58] * len(seen)
    assert seen[-1] == (58, 58)
    expected = {None: 8, 1: 58, 5: 12, 8: 8, 100: 1}[piece_size]
    assert len(seen) == expected


def test_pieces_end_at_borders_whatever_was_read_before(bounded, by_segment):
    ids = random_ids(1, 40)
    ends = []
    cache = prefill(bounded, ids[:, :5])
    prefill(bounded, ids[:, 5:], cache, progress=lambda done, _: ends.append(5 + done))
    assert ends == [8, 16, 24, 32, 40]


def test_padded_rows(bounded):
    rows = [random_ids(1, length, seed=length)[0] for length in (45, 29, 8)]
    ids, mask = padded(rows, "left")
    cache = prefill(bounded, ids[:, :-1], attention_mask=mask[:, :-1])
    out = _next_logits(bounded, ids[:, -1:], cache, mask)
    for i, row in enumerate(rows):
        assert difference(out[i], logits(bounded, row[None])[0, -1:]) < 1e-5


def test_full_attention_fills_the_models_own_cache(bounded):
    ids = random_ids(2, 61)
    bounded.set_attn_implementation("sdpa")
    try:
        cache = prefill(bounded, ids[:, :-3], piece_size=7)
        assert isinstance(cache, DynamicCache)
        assert difference(_next_logits(bounded, ids[:, -3:], cache), logits(bounded, ids)[:, -3:]) < 1e-5
    finally:
        bounded.set_attn_implementation("hici")


def test_only_a_piece_passes_through_the_model_at_a_time(bounded, by_segment):
    """Bounded activations: no call sees more than a segment, and none makes logits."""
    lengths = []
    hook = bounded.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    head = bounded.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits were made"))
    prefill(bounded, random_ids(1, 100))
    hook.remove()
    head.remove()
    assert max(lengths) == 8
    assert sum(lengths) == 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "there are no tokens to read; give at least one"),
        ({"piece_size": 0}, "piece_size=0 is below 1; give at least 1 token, or None"),
        (
            {"attention_mask": torch.ones(1, 8)},
            "attention_mask covers 8 tokens, but there are 9 with those",
        ),
        ({"attention_mask": torch.ones(1, 10)}, "attention_mask covers 10 tokens, but there are 9"),
        ({"input_ids": random_ids(1, 600)}, "600 tokens are more than the 512 positions"),
        ({"cache": DynamicCache()}, "a prefill in pieces with a DynamicCache in attention mode 'hici'"),
    ],
    ids=str,
)
def test_refusals_before_anything_is_read(bounded, arguments, message):
    cache = HiCICache(bounded)
    with pytest.raises(ValueError, match=message):
        prefill(bounded, **{"input_ids": random_ids(1, 9), "cache": cache, **arguments})
    assert cache.tokens == []


@pytest.mark.parametrize("mode", ["sdpa", "hici"])
def test_a_session_reads_only_what_is_new(bounded, mode):
    bounded.set_attn_implementation(mode)
    try:
        session = Session(bounded)
        ids = random_ids(1, 60)[0].tolist()
        other = [*ids[:20], *random_ids(1, 9, seed=4)[0].tolist()]
        assert session.read(ids[:20]) == 20
        session.keep()
        assert session.read(ids[:20]) == 0
        assert session.read(ids) == 40
        assert session.read(other) == 9  # back to the kept place, or cropped
        assert session.read(ids[:45]) == 25
        bounded_again = session.read(ids[:30])
        assert bounded_again == (10 if mode == "hici" else 0)
        out = _next_logits(bounded, torch.tensor([ids[30:33]]), session.cache)
        assert difference(out, logits(bounded, torch.tensor([ids[:33]]))[:, 30:]) < 1e-5
    finally:
        bounded.set_attn_implementation("hici")


def test_only_the_last_passing_place_is_kept(bounded):
    session = Session(bounded)
    ids = random_ids(1, 60)[0].tolist()
    for length, passing in ((10, False), (20, True), (30, False), (40, True), (50, True)):
        session.read(ids[:length])
        session.keep(passing=passing)
    assert [len(place.ids) for place in session._places] == [10, 30, 50]
    assert session.kept_bytes > 2 * session.cache_bytes > 0
    assert session.read(ids[:45]) == 15
    assert session.read(ids[:25]) == 15
    assert session.read(random_ids(1, 9, seed=8)[0].tolist()) == 9
    assert session.read(ids[:35]) == 5  # a place is there still, whatever was read in between


def test_a_place_that_is_kept_stays_kept(bounded):
    session = Session(bounded)
    ids = random_ids(1, 40)[0].tolist()
    session.read(ids[:20])
    session.keep()
    session.keep(passing=True)
    session.read(ids[:30])
    session.keep(passing=True)
    session.read(ids[:35])
    assert session.read([*ids[:20], 4]) == 1


@pytest.mark.parametrize("mode", ["sdpa", "hici"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_call_is_recovered_from(bounded, mode, error):
    bounded.set_attn_implementation(mode)
    try:
        session = Session(bounded)
        ids = random_ids(1, 40)[0].tolist()
        session.read(ids[:10])
        session.keep()

        def interrupted(*_):
            raise error

        hook = bounded.model.layers[1].register_forward_pre_hook(interrupted)
        with pytest.raises(error):
            session.read(ids[:30])
        hook.remove()
        assert session.read(ids[:37]) == 27  # what was read before is not read again
        out = _next_logits(bounded, torch.tensor([ids[37:]]), session.cache)
        assert difference(out, logits(bounded, torch.tensor([ids]))[:, 37:]) < 1e-5
    finally:
        bounded.set_attn_implementation("hici")


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_sliding_windows_in_full_attention(architecture):
    """Their caches have forgotten too much to be shortened: copies are gone back to."""
    model = strong_model(architecture, visibility="past", options={**LONG, "sliding_window": 16})
    model.set_attn_implementation("sdpa")
    session = Session(model)
    ids = random_ids(1, 60)[0].tolist()
    other = [*ids[:40], *random_ids(1, 9, seed=4)[0].tolist()]
    session.read(ids[:40])
    session.keep()
    assert session.kept_bytes > 0
    assert session.read(ids) == 20
    for expected in (9, 0):
        assert session.read(other) == expected
    out = _next_logits(model, torch.tensor([[5, 6]]), session.cache)
    assert difference(out, logits(model, torch.tensor([[*other, 5, 6]]))[:, -2:]) < 1e-5
    session.after_generation([*other, 5, 6])
    assert session.read(ids[:20]) == 20


def test_raw_decode_keeps_nothing():
    model = strong_model(visibility="all")
    session = Session(model)
    assert session.cache is None
    with pytest.raises(ValueError, match="reading ahead with decode over raw keys: a prompt must be read in one"):
        session.read([1, 2, 3])
    reconfigure(model, visibility="past", decode="raw")
    assert Session(model).cache is None


def test_more_tokens_than_the_rope_represents(bounded):
    ids = random_ids(1, 513)[0].tolist()
    with pytest.raises(ValueError, match="513 tokens are more than the 512 positions"):
        Session(bounded).read(ids)
    assert Session(bounded, allow_beyond_rope=True).read(ids) == 513
