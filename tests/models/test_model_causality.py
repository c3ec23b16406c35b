"""Visibility "past" is causal bit for bit; "all" and "current" are not, and the tests see it."""

import pytest
import torch

from helpers import ARCHITECTURES, SEGMENT, VOCAB, difference, logits, padded, random_ids, strong_model

LENGTHS = (3 * SEGMENT, 3 * SEGMENT + 5, 2 * SEGMENT + 1, 4 * SEGMENT - 1)


def _changed(ids, position, *, rest):
    """The ids with the token at `position` (and all behind it, `rest`) replaced by others."""
    ids = ids.clone()
    places = slice(position, None) if rest else slice(position, position + 1)
    ids[:, places] = (ids[:, places] + 1 + position) % VOCAB
    return ids


@pytest.mark.parametrize("rest", [False, True], ids=["one-token", "all-behind"])
@pytest.mark.parametrize("length", LENGTHS, ids=lambda t: f"T{t}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_past_is_causal_bit_for_bit(architecture, length, rest):
    model = strong_model(architecture, visibility="past")
    ids = random_ids(1, length)
    expected = logits(model, ids)
    for position in range(1, length):
        out = logits(model, _changed(ids, position, rest=rest))
        assert torch.equal(out[:, :position], expected[:, :position]), position
        assert difference(out[:, position], expected[:, position]) > 1e-3, position


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("switches", [(True, False), (False, True)], ids=["G", "L"])
def test_past_is_causal_with_one_kind_of_slot(switches, backend):
    model = strong_model(visibility="past", use_global=switches[0], use_local=switches[1], backend=backend)
    ids = random_ids(1, 29)
    expected = logits(model, ids)
    for position in range(1, 29, 3):
        assert torch.equal(logits(model, _changed(ids, position, rest=True))[:, :position], expected[:, :position])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_past_is_causal_bit_for_bit_with_padding(architecture, side):
    model = strong_model(architecture, visibility="past")
    rows = [random_ids(1, 29)[0], random_ids(1, 19, seed=2)[0]]
    ids, mask = padded(rows, side, total=31)
    expected = logits(model, ids, mask)
    for i, row in enumerate(rows):
        start = 31 - len(row) if side == "left" else 0
        for position in range(start + 1, start + len(row)):
            changed = ids.clone()
            changed[i] = _changed(ids[i : i + 1], position, rest=True)[0]
            out = logits(model, changed, mask)
            assert torch.equal(out[i, start:position], expected[i, start:position]), (i, position)
            assert difference(out[i, position], expected[i, position]) > 1e-3
            assert torch.equal(out[1 - i], expected[1 - i])  # and the other row does not notice


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_all_leaks_into_earlier_segments(architecture):
    model = strong_model(architecture, visibility="all")
    ids = random_ids(1, 29)
    out, expected = logits(model, _changed(ids, 28, rest=True)), logits(model, ids)
    assert difference(out[:, :SEGMENT], expected[:, :SEGMENT]) > 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_current_leaks_inside_the_segment_only(architecture):
    model = strong_model(architecture, visibility="current")
    ids = random_ids(1, 29)
    expected = logits(model, ids)
    for last in (15, 28):
        segment = last - last % SEGMENT
        out = logits(model, _changed(ids, last, rest=True))
        assert difference(out[:, segment:last], expected[:, segment:last]) > 0.1
        assert torch.equal(out[:, :segment], expected[:, :segment])


def test_shifted_sparse_attention_is_causal():
    model = strong_model(check=False)
    model.set_attn_implementation("hici_s2")
    ids = random_ids(1, 29)
    expected = logits(model, ids)
    for position in range(1, 29):
        out = logits(model, _changed(ids, position, rest=True))
        assert torch.equal(out[:, :position], expected[:, :position]), position
