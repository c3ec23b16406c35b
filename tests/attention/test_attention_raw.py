"""Decode over all raw keys against a plain loop, with padding and a sliding window."""

import pytest
import torch

from helpers import difference
from hici.attention import raw


def _oracle(q, k, v, real, scale, window):
    """[B, T, H, E] in float64; padded queries are left at zero (nobody reads them)."""
    batch, new, heads, _ = q.shape
    total, groups = k.shape[1], heads // k.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(batch):
        for t in range(new):
            position = total - new + t
            if real is not None and not real[b, position]:
                continue
            seen = [
                x
                for x in range(position + 1)
                if (real is None or real[b, x]) and (window is None or x > position - window)
            ]
            for h in range(heads):
                weights = (k[b, seen, h // groups].double() @ q[b, t, h].double() * scale).softmax(0)
                out[b, t, h] = weights @ v[b, seen, h // groups].double()
    return out


@pytest.mark.parametrize("padding", [None, "left", "right", "hole"])
@pytest.mark.parametrize("window", [None, 1, 4, 50], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("new, total", [(1, 9), (1, 1), (3, 9), (9, 9), (40, 45)])
def test_equals_the_loop(new, total, window, padding):
    q = torch.randn(2, new, 4, 8)
    k, v = torch.randn(2, 2, total, 2, 8)
    real = None
    if padding is not None:
        real = torch.ones(2, total, dtype=torch.bool)
        place = {"left": slice(0, total // 3), "right": slice(total - total // 3, total), "hole": slice(3, 5)}[padding]
        real[1, place] = False
    out = raw.attend(q, k, v, real, scale=0.4, window=window)
    assert out.isfinite().all()
    expected = _oracle(q, k, v, real, 0.4, window)
    if real is not None:
        out = out.masked_fill(~real[:, total - new :, None, None], 0)
    assert difference(out, expected) < 2e-6
