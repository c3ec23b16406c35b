"""Shares of the reference's weights against a dense softmax written here, and against the outputs of `attend`."""

import pytest
import torch

from hici.attention import reference

# B, T, S, P, segments with slots (relative to N: 0, -1, or None for no slots), H, J, E
SHAPES = {
    "whole": (2, 24, 8, 3, 0, 4, 2, 16),
    "ragged": (2, 29, 8, 3, 0, 4, 2, 16),
    "ragged-by-one": (1, 25, 8, 5, 0, 2, 2, 8),
    "past-ragged": (2, 29, 8, 3, -1, 6, 2, 16),
    "past-two-segments": (2, 9, 8, 1, -1, 4, 4, 16),
    "no-slots-ragged": (2, 29, 8, 0, None, 4, 1, 16),
    "shorter-than-a-segment": (2, 5, 8, 3, 0, 4, 2, 16),
    "one-token": (1, 1, 8, 2, 0, 2, 1, 8),
    "one-token-segments": (1, 5, 1, 2, -1, 2, 1, 8),
    "more-slots-than-tokens": (2, 12, 4, 12, 0, 2, 2, 8),
}
SCALE = 0.3


def _inputs(shape, dtype=torch.float32):
    """q, k, slot_k with scores that are far from equal."""
    b, t, s, p, slotted, h, j, e = shape
    generator = torch.Generator().manual_seed(2)
    q, k = (2 * torch.randn(b, t, heads, e, generator=generator) for heads in (h, j))
    slot_k = None if slotted is None else 2 * torch.randn(b, -(-t // s) + slotted, p, j, e, generator=generator)
    return [None if x is None else x.to(dtype) for x in (q, k, slot_k)]


def _dense(q, k, slot_k, segment_size):
    """(slots [B, N, H, P], tokens [B, N, H], first token [B, N, H]) from one softmax over all keys, in float64."""
    batch, length, heads, width = q.shape
    segment = torch.arange(length) // segment_size
    n = int(segment[-1]) + 1
    rows, slots = (0, 0) if slot_k is None else slot_k.shape[1:3]
    keys = k if slot_k is None else torch.cat((slot_k.reshape(batch, rows * slots, -1, width), k), dim=1)
    keys = keys.double()[:, :, torch.arange(heads) // (heads // k.shape[2])]
    scores = torch.einsum("bthe,bxhe->bhtx", q.double(), keys) * SCALE
    sees_slot = segment[:, None] == (torch.arange(rows).repeat_interleave(slots) + n - rows)[None, :]
    sees_token = (segment[:, None] == segment[None, :]) & torch.ones(length, length).tril().bool()
    weights = scores.masked_fill(~torch.cat((sees_slot, sees_token), dim=1), -torch.inf).softmax(-1)
    of_slots, of_tokens, of_first = (torch.zeros(batch, n, heads, *shape).double() for shape in ((slots,), (), ()))
    for i in range(n):
        mean = weights[:, :, segment == i].mean(2)
        if i >= n - rows:
            begin = (i - (n - rows)) * slots
            of_slots[:, i] = mean[..., begin : begin + slots]
        of_tokens[:, i] = mean[..., rows * slots :].sum(-1)
        of_first[:, i] = mean[..., rows * slots + i * segment_size]
    return of_slots, of_tokens, of_first


@pytest.mark.parametrize("at_a_time", [1, 97, 2**24])  # one query at a time, ragged blocks, a whole segment
@pytest.mark.parametrize("name", SHAPES)
def test_shares_are_those_of_a_dense_softmax(name, at_a_time):
    q, k, slot_k = _inputs(SHAPES[name])
    size = SHAPES[name][2]
    found = reference.shares(q, k, slot_k, segment_size=size, scale=SCALE, at_a_time=at_a_time)
    for actual, expected in zip(found, _dense(q, k, slot_k, size), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=5e-7)
    total = found.slots_BNHP.sum(-1) + found.tokens_BNH
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert (found.first_token_BNH <= found.tokens_BNH + 1e-7).all()


def test_lower_precision_is_computed_in_float32():
    q, k, slot_k = _inputs(SHAPES["ragged"], torch.bfloat16)
    found = reference.shares(q, k, slot_k, segment_size=8, scale=SCALE)
    for actual, expected in zip(found, _dense(q, k, slot_k, 8), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", ["ragged", "past-ragged", "more-slots-than-tokens"])
def test_shares_are_of_what_attend_computes(name):
    """Values that are unit vectors, one for each key of a segment, make the output the weights themselves."""
    b, t, s, p, _, _, j, _ = SHAPES[name]
    q, k, slot_k = _inputs(SHAPES[name])
    axes = torch.eye(p + s)
    v = axes[p + torch.arange(t) % s][None, :, None].expand(b, t, j, p + s)
    slot_v = axes[:p][None, None, :, None].expand(*slot_k.shape[:2], p, j, p + s)
    weights = reference.attend(q, k, v, slot_k, slot_v, segment_size=s, scale=SCALE)  # [B, T, H, P + S]
    found = reference.shares(q, k, slot_k, segment_size=s, scale=SCALE)
    for i, mean in enumerate(part.mean(1).double() for part in weights.split(s, dim=1)):
        torch.testing.assert_close(found.slots_BNHP[:, i], mean[..., :p], rtol=0, atol=5e-7)
        torch.testing.assert_close(found.tokens_BNH[:, i], mean[..., p:].sum(-1), rtol=0, atol=5e-7)
        torch.testing.assert_close(found.first_token_BNH[:, i], mean[..., p], rtol=0, atol=5e-7)


def test_no_more_weights_than_said_are_held(monkeypatch):
    held, original = [], reference._weights

    def counted(*args):
        weights = original(*args)
        held.append(weights.numel())
        return weights

    monkeypatch.setattr(reference, "_weights", counted)
    q, k, slot_k = _inputs(SHAPES["ragged"])
    reference.shares(q, k, slot_k, segment_size=8, scale=SCALE, at_a_time=200)
    assert max(held) <= 200
    # a query has 2 x 4 x 11 weights, so two go in a block; 2 x 4 x 8 in the last segment (5 tokens), so three
    assert len(held) == 3 * 4 + 2
