"""Cutting into segments and compaction of padded rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hici.core.segments import count_segments, put_tokens, real_first, real_positions, take_tokens, to_segments


@given(st.integers(1, 40), st.integers(1, 12))
def test_segments_hold_every_token_once_and_zeros_behind(length, segment_size):
    hidden = torch.arange(1.0, 2 * length * 3 + 1).reshape(2, length, 3)
    segments = to_segments(hidden, segment_size)
    n = count_segments(length, segment_size)
    assert segments.shape == (2, n, segment_size, 3)
    assert (n - 1) * segment_size < length <= n * segment_size
    flat = segments.flatten(1, 2)
    assert torch.equal(flat[:, :length], hidden)
    assert not flat[:, length:].any()
    real = real_positions(length, n, segment_size, hidden.device)
    assert real.shape == (1, n, segment_size)
    assert torch.equal(real[0], segments[0, :, :, 0] != 0)


def test_whole_segments_are_a_view():
    hidden = torch.randn(2, 12, 3)
    assert to_segments(hidden, 4).data_ptr() == hidden.data_ptr()


masks = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 12).flatmap(
        lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b)
    )
)


@given(masks)
def test_compaction(rows):
    mask = torch.tensor(rows)
    order = real_first(mask)
    for row, permutation in zip(rows, order.tolist(), strict=True):
        real = [i for i, is_real in enumerate(row) if is_real]
        padding = [i for i, is_real in enumerate(row) if not is_real]
        assert permutation == real + padding


@given(masks, st.integers(0, 2))
def test_take_and_put_are_inverse(rows, extra_dimensions):
    mask = torch.tensor(rows)
    order = real_first(mask)
    x = torch.randn(*mask.shape, *(2, 3)[:extra_dimensions])
    taken = take_tokens(x, order)
    for b in range(len(rows)):
        assert torch.equal(taken[b], x[b][order[b]])
    assert torch.equal(put_tokens(taken, order), x)
    assert torch.equal(take_tokens(put_tokens(x, order), order), x)


@pytest.mark.parametrize("n_real", [0, 1, 4, 5, 8])
def test_real_positions_of_padded_rows(n_real):
    real = real_positions(torch.tensor([[n_real], [8]]), 2, 4, torch.device("cpu"))
    assert real.shape == (2, 2, 4)
    assert real[0].flatten().tolist() == [i < n_real for i in range(8)]
    assert real[1].all()
