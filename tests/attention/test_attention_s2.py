"""Shifted sparse attention against a mask written down from its definition."""

import pytest
import torch

from helpers import difference
from hici.attention import s2


def _group(position, segment_size, shifted):
    """Number of the group of a position: [0,S), [S,2S), ... or [0,S/2), [S/2,3S/2), ..."""
    if not shifted:
        return position // segment_size
    half = segment_size // 2
    return 0 if position < half else 1 + (position - half) // segment_size


def _oracle(q, k, v, segment_size, scale):
    length, heads = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k).double() * scale
    visible = torch.zeros(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        shifted = h >= heads // 2
        for t in range(length):
            for s in range(t + 1):
                visible[h, t, s] = _group(t, segment_size, shifted) == _group(s, segment_size, shifted)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v.double())


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 3), (3, 1), (1, 1)], ids=lambda x: f"H{x}")
@pytest.mark.parametrize(
    "length, segment_size",
    [(32, 8), (29, 8), (25, 5), (23, 7), (5, 8), (3, 8), (4, 8), (1, 8), (6, 1), (12, 12), (33, 8)],
    ids=lambda x: f"{x}",
)
def test_equals_the_mask(length, segment_size, heads, kv_heads):
    q = torch.randn(2, length, heads, 8)
    k, v = torch.randn(2, 2, length, kv_heads, 8)
    out = s2.attend(q, k, v, segment_size=segment_size, scale=0.4)
    assert difference(out, _oracle(q, k, v, segment_size, 0.4)) < 2e-6


def test_gradients():
    q, k, v = (torch.randn(1, 11, 2, 4, requires_grad=True) for _ in range(3))
    weight = torch.randn(1, 11, 2, 4)
    actual = torch.autograd.grad((s2.attend(q, k, v, segment_size=4, scale=0.5) * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((_oracle(q, k, v, 4, 0.5) * weight).sum(), (q, k, v))
    for a, b in zip(actual, expected, strict=True):
        assert difference(a, b) < 5e-6
