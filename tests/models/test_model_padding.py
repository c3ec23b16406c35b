"""Padding, batch composition and length change nothing for real tokens (fixed segment_size)."""

import pytest
import torch

from helpers import ARCHITECTURES, SEGMENT, difference, logits, padded, random_ids, strong_model
from hici.models.attach import reconfigure

TOLERANCE = 1e-5
LONGEST = 3 * SEGMENT + SEGMENT // 2
WAYS = ("all", "current", "past", "s2")


def _model(architecture, way):
    model = strong_model(architecture, visibility="all" if way == "s2" else way)
    if way == "s2":
        model.set_attn_implementation("hici_s2")
    return model


def _rows():
    """One row of every length from 1 to three and a half segments."""
    return [random_ids(1, length, seed=length)[0] for length in range(1, LONGEST + 1)]


def _real(out, row, side):
    return out[: len(row)] if side == "right" else out[len(out) - len(row) :]


@pytest.mark.parametrize("total", [LONGEST, LONGEST + 5], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_length_on_either_side(architecture, way, total):
    model = _model(architecture, way)
    rows = _rows()
    alone = [logits(model, row[None])[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side, total)
        out = logits(model, ids, mask)
        assert out.isfinite().all()
        for row, expected, batched in zip(rows, alone, out, strict=True):
            assert difference(_real(batched, row, side), expected) < TOLERANCE, (side, len(row))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_inputs_embeds(architecture, way):
    model = _model(architecture, way)
    rows = _rows()[::5]
    for side in ("left", "right"):
        ids, mask = padded(rows, side, LONGEST + 3)
        embeds = model.get_input_embeddings()(ids).detach()
        embeds = torch.where(mask[..., None].bool(), embeds, 3.0)  # padding may hold anything
        with torch.no_grad():
            out = model(inputs_embeds=embeds, attention_mask=mask).logits
        for row, batched in zip(rows, out, strict=True):
            assert difference(_real(batched, row, side), logits(model, row[None])[0]) < TOLERANCE


@pytest.mark.parametrize("way", WAYS)
def test_batch_composition(way):
    model = _model("llama", way)
    ids = random_ids(3, 29)
    together = logits(model, ids)
    for i in range(3):
        assert difference(together[i], logits(model, ids[i : i + 1])[0]) < TOLERANCE
    ids, mask = padded([ids[0], ids[1, :11]], "left")
    assert difference(logits(model, ids, mask)[0], together[0]) < TOLERANCE


@pytest.mark.parametrize("way", WAYS)
def test_holes_are_skipped(way):
    model = _model("llama", way)
    row = random_ids(1, 30)
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, [0, 5, 6, 13, 29]] = 0
    out = logits(model, row, mask)
    real = mask[0].bool()
    assert difference(out[0, real], logits(model, row[:, real])[0]) < TOLERANCE


@pytest.mark.parametrize("way", WAYS)
def test_a_row_of_padding_only_is_harmless(way):
    model = _model("llama", way)
    ids, mask = padded([random_ids(1, 21)[0], random_ids(1, 0)[0]], "right")
    assert mask[1].sum() == 0
    out = model(ids, attention_mask=mask).logits
    assert out.isfinite().all()
    assert difference(out[0], logits(model, ids[:1])[0]) < TOLERANCE
    out[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("visibility", ["all", "current", "past"])
def test_num_segments_counts_the_padded_batch(visibility, side):
    """31 tokens in 4 segments: 8 tokens each, for the shorter rows too."""
    model = reconfigure(strong_model(visibility=visibility), num_segments=4)
    rows = [random_ids(1, 31)[0], random_ids(1, 20, seed=4)[0], random_ids(1, 3, seed=5)[0]]
    ids, mask = padded(rows, side)
    out = logits(model, ids, mask)
    reconfigure(model, segment_size=8)
    for row, batched in zip(rows, out, strict=True):
        assert difference(_real(batched, row, side), logits(model, row[None])[0]) < TOLERANCE


@pytest.mark.parametrize("way", ["past", "s2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_gives_the_same_as_the_whole(architecture, way):
    model = _model(architecture, way)
    ids = random_ids(1, LONGEST)
    whole = logits(model, ids)
    for length in range(1, LONGEST):
        assert difference(logits(model, ids[:, :length]), whole[:, :length]) < TOLERANCE, length


def test_a_mask_of_ones_is_no_mask():
    model = strong_model()
    ids = random_ids(2, 29)
    assert torch.equal(logits(model, ids, torch.ones_like(ids)), logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32], ids=str)
def test_mask_dtypes(dtype):
    model = strong_model()
    ids, mask = padded([random_ids(1, 29)[0], random_ids(1, 9)[0]], "left")
    assert torch.equal(logits(model, ids, mask.to(dtype)), logits(model, ids, mask))


@pytest.mark.parametrize("way", WAYS)
def test_positions_of_the_caller_are_honoured(way):
    model = _model("llama", way)
    row = random_ids(1, 29)
    shifted = torch.arange(29)[None] * 3 + 7
    out = logits(model, row, position_ids=shifted)
    assert logits(model, row, position_ids=torch.arange(29)[None]).equal(logits(model, row))
    assert difference(out, logits(model, row)) > 0.1  # not replaced by 0, 1, 2, ...
    ids, mask = padded([row[0], row[0, :13]], "left")
    positions = torch.stack((shifted[0], torch.cat((torch.zeros(16, dtype=torch.long), shifted[0, :13]))))
    batched = logits(model, ids, mask, position_ids=positions)
    assert difference(batched[0], out[0]) < TOLERANCE
    expected = logits(model, row[:, :13], position_ids=shifted[:, :13])
    assert difference(batched[1, 16:], expected[0]) < TOLERANCE


def test_slots_see_absolute_positions():
    """Slots carry no RoPE: why left padding must not shift the positions. Stock numbering would change the logits."""
    model = strong_model(visibility="past")
    row = random_ids(1, 29)
    moved = logits(model, row, position_ids=torch.arange(29)[None] + 11)
    assert difference(moved[:, :SEGMENT], logits(model, row)[:, :SEGMENT]) < 1e-4  # no slots: relative only
    assert difference(moved, logits(model, row)) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_decoder_called_with_positional_arguments(architecture):
    model = strong_model(architecture)
    decoder = model.base_model
    ids, mask = padded([random_ids(1, 29)[0], random_ids(1, 9)[0]], "left")
    embeds = model.get_input_embeddings()(ids).detach()
    places = [None, mask, None, None, None]
    places[3 if architecture == "gpt_neox" else 4] = embeds  # before or behind past_key_values
    with torch.no_grad():
        by_name = decoder(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(decoder(ids, mask).last_hidden_state, by_name)
        assert torch.equal(decoder(*places).last_hidden_state, by_name)
