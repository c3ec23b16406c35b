"""Every backend against the reference: outputs and gradients, on many shapes. And the reference against a mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import difference, relative
from hici.attention import backends

BACKENDS = sorted(set(backends()) - {"reference"})
REFERENCE = backends()["reference"].attend
NAMES = ("q", "k", "v", "slot_k", "slot_v")

# B, T, S, P, segments with slots (relative to N: 0, -1, or None for no slots), H, J, E
SHAPES = {
    "whole": (2, 24, 8, 3, 0, 4, 2, 16),
    "ragged": (2, 29, 8, 3, 0, 4, 2, 16),
    "ragged-by-one": (1, 25, 8, 5, 0, 2, 2, 8),
    "past": (2, 24, 8, 3, -1, 4, 2, 16),
    "past-ragged": (2, 29, 8, 3, -1, 4, 4, 16),
    "past-two-segments": (2, 9, 8, 3, -1, 4, 4, 16),
    "no-slots": (2, 24, 8, 0, None, 4, 2, 16),
    "no-slots-ragged": (2, 29, 8, 0, None, 4, 1, 16),
    "shorter-than-a-segment": (2, 5, 8, 3, 0, 4, 2, 16),
    "shorter-no-slots": (2, 5, 8, 0, None, 4, 2, 16),
    "one-token": (1, 1, 8, 2, 0, 2, 1, 8),
    "one-token-segments": (1, 5, 1, 2, -1, 2, 1, 8),
    "one-slot": (2, 16, 4, 1, 0, 2, 2, 8),
    "more-slots-than-tokens": (2, 12, 4, 12, 0, 2, 2, 8),
    "three-groups": (1, 13, 4, 3, 0, 9, 3, 16),
    "head-dim-24": (1, 13, 4, 3, 0, 4, 2, 24),
    "head-dim-40": (1, 13, 4, 3, -1, 2, 2, 40),
    "head-dim-7": (1, 13, 4, 3, 0, 2, 1, 7),
}
M_K = {3: "M2-K1", 5: "M3-K2", 2: "M1-K1", 1: "M1-K0", 12: "M8-K4", 0: "M0-K0"}


def _id(name):
    b, t, s, p, _, h, j, e = SHAPES[name]
    return f"B{b}-T{t}-S{s}-{M_K[p]}-H{h}-J{j}-E{e}-{name}"


def _inputs(shape, dtype=torch.float32, seed=0, transposed=False):
    b, t, s, p, slotted, h, j, e = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        if transposed:  # heads first in memory, as the model makes them
            sizes = [*sizes[:-3], sizes[-2], sizes[-3], sizes[-1]]
        x = torch.randn(*sizes, generator=generator).to(dtype)
        return (x.transpose(-3, -2) if transposed else x).detach().requires_grad_()

    tensors = [draw(b, t, h, e), draw(b, t, j, e), draw(b, t, j, e)]
    if slotted is None:
        return [*tensors, None, None]
    n = -(-t // s) + slotted
    return [*tensors, draw(b, n, p, j, e), draw(b, n, p, j, e)]


def _run(attend, tensors, segment_size, weight_seed=9):
    """Output and gradients of a fixed random weighting."""
    out = attend(*tensors, segment_size=segment_size, scale=0.3)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(weight_seed))
    used = [x for x in tensors if x is not None]
    return out, dict(zip(NAMES, torch.autograd.grad((out.float() * weight).sum(), used), strict=False))


def _compare(backend, shape, dtype, bound, transposed=False):
    tensors = _inputs(shape, dtype, transposed=transposed)
    expected, expected_gradients = _run(REFERENCE, tensors, shape[2])
    out, gradients = _run(backends()[backend].attend, tensors, shape[2])
    assert out.shape == tensors[0].shape
    assert out.dtype == dtype
    assert difference(out, expected) < bound
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative(gradients[name], gradient) < bound, name


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 0.03)], ids=["float32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=map(_id, SHAPES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend, shape, dtype, bound):
    _compare(backend, shape, dtype, bound)


@pytest.mark.parametrize("name", ["whole", "past-ragged", "no-slots-ragged", "shorter-than-a-segment", "head-dim-24"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, name):
    _compare(backend, SHAPES[name], torch.float32, 2e-6, transposed=True)


shapes = st.tuples(
    st.integers(1, 2),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([0, -1, None]),
    st.integers(1, 2),  # groups
    st.integers(1, 3),
    st.sampled_from([4, 8, 12]),
)


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=shapes)
def test_random_shapes(backend, shape):
    b, t, s, p, slotted, groups, j, e = shape
    if slotted == -1 and t <= s:
        slotted = None  # one segment and none with slots: the caller passes None
    _compare(backend, (b, t, s, p, slotted, groups * j, j, e), torch.float32, 5e-6)


def _oracle(q, k, v, slot_k, slot_v, segment_size, scale):
    """One query at a time, from the definition, in float64: shares nothing with the backends."""
    batch, length, heads, _ = q.shape
    n = -(-length // segment_size)
    groups = heads // k.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            segment = t // segment_size
            for h in range(heads):
                keys = [k[b, s, h // groups] for s in range(segment * segment_size, t + 1)]
                values = [v[b, s, h // groups] for s in range(segment * segment_size, t + 1)]
                row = segment - (n - slot_k.shape[1]) if slot_k is not None else -1
                if row >= 0:
                    keys += list(slot_k[b, row, :, h // groups])
                    values += list(slot_v[b, row, :, h // groups])
                weights = (torch.stack(keys).double() @ q[b, t, h].double() * scale).softmax(0)
                out[b, t, h] = weights @ torch.stack(values).double()
    return out


@pytest.mark.parametrize("name", ["ragged-by-one", "past-two-segments", "three-groups", "no-slots-ragged", "one-token"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_definition(backend, name):
    with torch.no_grad():
        tensors = _inputs(SHAPES[name])
        segment_size = SHAPES[name][2]
        out = backends()[backend].attend(*tensors, segment_size=segment_size, scale=0.3)
        assert difference(out, _oracle(*tensors, segment_size, 0.3)) < 2e-6


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dropout_drops(backend):
    tensors = _inputs(SHAPES["whole"])
    attend = backends()[backend].attend
    kept = attend(*tensors, segment_size=8, scale=0.3)
    dropped = attend(*tensors, segment_size=8, scale=0.3, dropout=0.5)
    assert difference(kept, dropped) > 0.1
    assert dropped.isfinite().all()
