"""Attention over a cache's keys, against a plain softmax, one query at a time."""

import pytest
import torch

from helpers import difference, relative
from hici.attention.cached import attend

# B, T, X, H, J, E
SHAPES = {
    "one-group": (2, 5, 11, 4, 4, 16),
    "two-groups": (2, 5, 11, 4, 2, 16),
    "three-groups": (1, 4, 9, 9, 3, 16),
    "one-key-head": (2, 3, 7, 4, 1, 8),
    "one-token": (2, 1, 13, 4, 2, 16),
    "one-key": (1, 1, 1, 2, 1, 8),
    "head-dim-24": (2, 5, 11, 4, 2, 24),
    "head-dim-7": (1, 3, 5, 2, 1, 7),
}
MASKS = ("none", "shared", "rows")


def _id(name):
    b, t, x, h, j, e = SHAPES[name]
    return f"B{b}-T{t}-X{x}-H{h}-J{j}-E{e}-{name}"


def _inputs(shape, dtype=torch.float32):
    b, t, x, h, j, e = shape
    generator = torch.Generator().manual_seed(3)
    sizes = ((b, t, h, e), (b, j, x, e), (b, j, x, e))
    return [torch.randn(*size, generator=generator).to(dtype) for size in sizes]


def _mask(kind, shape):
    b, t, x = shape[:3]
    if kind == "none":
        return None
    if kind == "shared":  # the last tokens of the keys are the new ones
        return _causal(t, x)[None]
    mask = torch.rand(b, t, x, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[:, :, 0] = True
    return mask


def _causal(t, x):
    return torch.arange(x) <= torch.arange(t)[:, None] + (x - t)


def _oracle(q, k, v, visible, scale):
    out = torch.zeros_like(q, dtype=torch.float64)
    groups = q.shape[2] // k.shape[1]
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).reshape(-1, 3).tolist():
        seen = slice(None) if visible is None else visible[b % len(visible), t]
        keys, values = k[b, h // groups, seen].double(), v[b, h // groups, seen].double()
        out[b, t, h] = (keys @ q[b, t, h].double() * scale).softmax(0) @ values
    return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=map(_id, SHAPES))
def test_equals_the_definition(shape, mask):
    tensors, visible = _inputs(shape), _mask(mask, shape)
    out = attend(*tensors, visible, scale=0.3)
    assert out.shape == tensors[0].shape
    assert difference(out, _oracle(*tensors, visible, 0.3)) < 2e-6


@pytest.mark.parametrize("mask", MASKS)
def test_bfloat16(mask):
    shape = SHAPES["two-groups"]
    tensors, visible = _inputs(shape, torch.bfloat16), _mask(mask, shape)
    out = attend(*tensors, visible, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert relative(out, _oracle(*tensors, visible, 0.3)) < 0.03


def test_the_mask_counts():
    shape = SHAPES["two-groups"]
    tensors = _inputs(shape)
    outs = [attend(*tensors, _mask(mask, shape), scale=0.3) for mask in MASKS]
    assert min(difference(outs[0], outs[1]), difference(outs[1], outs[2]), difference(outs[0], outs[2])) > 0.1


def test_slices_of_a_larger_cache():
    """As a layer gives them: views with space behind the keys."""
    q, k, v = _inputs(SHAPES["two-groups"])
    wide = [torch.cat((x, torch.full_like(x, 7.0)), dim=2)[:, :, : x.shape[2]] for x in (k, v)]
    assert not wide[0].is_contiguous()
    assert difference(attend(q, *wide, None, scale=0.3), attend(q, k, v, None, scale=0.3)) < 1e-6


def test_dropout_drops():
    tensors = _inputs(SHAPES["two-groups"])
    kept, dropped = (attend(*tensors, None, scale=0.3, dropout=p) for p in (0.0, 0.5))
    assert dropped.isfinite().all()
    assert difference(kept, dropped) > 0.1
