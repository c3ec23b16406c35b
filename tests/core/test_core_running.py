"""What a cache keeps of stages 1 and 2: pieces in any split give what the whole gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import cut, difference, record_paths, relative
from hici.core.broadcast import build_slots, next_slots
from hici.core.global_integration import (
    GlobalIntegrator,
    RunningStatistics,
    no_statistics,
    running_statistics,
    slot_statistics,
    statistics_of,
)
from hici.core.local_construction import LocalConstructor

D, M, K, HEADS = 16, 3, 2, 4
PATHS = ("plain", "absorbed")


def _constructor(path="plain", bottleneck=8, seed=0):
    torch.manual_seed(seed)
    module = LocalConstructor(D, M, HEADS, bottleneck, absorb=path == "absorbed").requires_grad_(False)
    module._absorbing_is_cheaper = lambda tokens: True
    module.memory_slots.normal_()
    for linear in (module.q_proj, module.k_proj):
        linear.weight.mul_(3)  # scores far apart, so that the highest one moves
    return module


def _in_pieces(module, tokens_BTD, real_BT, pieces):
    running, queries = module.start(tokens_BTD.shape[0]), module.queries()
    for begin, end in pieces:
        real = None if real_BT is None else real_BT[:, begin:end]
        running = module.accumulate(running, tokens_BTD[:, begin:end], real, queries)
    return module.finish(running)


def _whole(module, tokens_BTD, real_BT=None):
    return module(tokens_BTD[:, None], None if real_BT is None else real_BT[:, None])[:, 0]


@pytest.mark.parametrize("bottleneck", [8, None], ids=["C8", "full"])
@pytest.mark.parametrize("path", PATHS)
@given(length=st.integers(1, 40), borders=st.lists(st.integers(1, 39), max_size=8), seed=st.integers(0, 10**6))
def test_construction_in_pieces(path, bottleneck, length, borders, seed):
    module = _constructor(path, bottleneck, seed)
    tokens = torch.randn(2, length, D)
    expected = _whole(module, tokens)
    assert expected.abs().max() > 0.01
    assert relative(_in_pieces(module, tokens, None, cut(length, borders)), expected) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@given(length=st.integers(1, 30), borders=st.lists(st.integers(1, 29), max_size=6), seed=st.integers(0, 10**6))
def test_construction_in_pieces_with_padding(path, length, borders, seed):
    module = _constructor(path, seed=seed)
    tokens = torch.randn(3, length, D)
    real = torch.rand(3, length) > 0.5
    real[2] = False
    expected = _whole(module, tokens, real)
    spoiled = torch.where(real[..., None], tokens, float("nan"))
    out = _in_pieces(module, spoiled, real, cut(length, borders))
    assert out.isfinite().all()
    assert difference(out, expected) <= 1e-5 * expected.abs().max().clamp(min=1e-3)
    assert torch.equal(out[2], torch.zeros_like(out[2]))


@pytest.mark.parametrize("path", PATHS)
def test_construction_takes_the_path(monkeypatch, path):
    taken = record_paths(monkeypatch)
    _in_pieces(_constructor(path), torch.randn(1, 5, D), None, [(0, 5)])
    assert taken == [path]


def test_construction_without_any_token_gives_zeros():
    module = _constructor()
    assert torch.equal(module.finish(module.start(2)), torch.zeros(2, M, D))


def test_construction_of_scores_far_apart():
    """exp of the plain scores overflows: 1000 times a token, later pieces far above and far below earlier ones."""
    module = _constructor()
    tokens = torch.randn(1, 12, D) * torch.tensor([1.0, 1000.0, 1.0, 300.0]).repeat_interleave(3)[None, :, None]
    scores, _ = module._scores(tokens, module.queries())
    assert scores.abs().max() > 100
    assert relative(_in_pieces(module, tokens, None, cut(12, [3, 6, 9])), _whole(module, tokens)) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_construction_in_bfloat16_keeps_float32_between_pieces(path):
    exact = _constructor(path)
    tokens = torch.randn(2, 64, D)
    module = _constructor(path).to(torch.bfloat16)
    running = module.start(2)
    for begin in range(64):
        running = module.accumulate(running, tokens[:, begin : begin + 1].bfloat16(), None, module.queries())
    assert {x.dtype for x in running} == {torch.float32}
    out = module.finish(running)
    assert out.dtype == torch.bfloat16
    assert relative(out, _whole(exact, tokens)) < 0.05


# ---- statistics


def _continued(local_BNMD, pieces):
    """Statistics [B, N, ...] of pieces, each with the last of those before it."""
    before, parts = None, []
    for begin, end in pieces:
        parts.append(running_statistics(local_BNMD[:, begin:end], before))
        before = RunningStatistics(*(x[:, -1] for x in parts[-1]))
    return RunningStatistics(*(torch.cat(x, dim=1) for x in zip(*parts, strict=True)))


@given(
    n=st.integers(1, 12),
    borders=st.lists(st.integers(1, 11), max_size=5),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_statistics_in_pieces(n, borders, offset, seed):
    torch.manual_seed(seed)
    local = offset + torch.randn(2, n, M, D)
    whole, pieces = running_statistics(local), _continued(local, cut(n, borders))
    for name in RunningStatistics._fields:
        assert relative(getattr(pieces, name), getattr(whole, name)) < 1e-5, name
    for i in range(n):
        expected = slot_statistics(local[:, : i + 1])
        assert relative(statistics_of(pieces, M)[:, i], expected) < 1e-5


def test_statistics_after_none_are_those_without():
    local = torch.randn(2, 4, M, D)
    none = no_statistics(2, D, local.device)
    for after, expected in zip(running_statistics(local, none), running_statistics(local), strict=True):
        assert torch.equal(after, expected)


def test_a_row_without_segments_beside_one_with_some():
    local = torch.randn(2, 3, M, D)
    first, none = running_statistics(local[:, :1]), no_statistics(2, D, local.device)
    mixed = RunningStatistics(*(torch.stack((a[0, -1], b[1])) for a, b in zip(first, none, strict=True)))
    out = statistics_of(running_statistics(local[:, 1:], mixed), M)
    assert relative(out[0], statistics_of(running_statistics(local[:1]), M)[0, 1:]) < 1e-5
    assert relative(out[1], statistics_of(running_statistics(local[1:, 1:]), M)[0]) < 1e-5


def test_huge_mean_and_small_variance_do_not_cancel():
    """1000 +- 0.1, 300 segments one at a time: E[x^2] - E[x]^2 in float32 would lose the standard deviation."""
    local = 1000 + 0.1 * torch.randn(1, 300, M, D)
    out = statistics_of(_continued(local, [(i, i + 1) for i in range(300)]), M)[0, -1]
    slots = local[0].flatten(0, 1)
    exact = slots.double()
    assert relative(out[3], exact.std(0, correction=0)) < 2e-3
    assert relative(out[0], exact.mean(0)) < 1e-6
    naive = (slots.square().mean(0) - slots.mean(0) ** 2).clamp(min=0).sqrt()
    assert relative(naive, exact.std(0, correction=0)) > 0.1  # what this test is there to refuse


# ---- both, as a cache does it


@pytest.mark.parametrize("kinds", ["G+L", "G", "L"])
@pytest.mark.parametrize("pieces", [[(0, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(0, 3), (3, 5)]], ids=str)
def test_next_slots_are_those_of_the_past(kinds, pieces):
    constructor = _constructor()
    integrator = GlobalIntegrator(D, K, HEADS, 8, 4).requires_grad_(False)
    torch.nn.init.normal_(integrator.expand.weight)
    switches = {"use_global": "G" in kinds, "use_local": "L" in kinds}
    segments = torch.randn(2, 6, 7, D)
    expected = build_slots(segments, None, constructor, integrator, visibility="past", **switches)
    before, slots = no_statistics(2, D, segments.device), []
    for begin, end in pieces:
        made, after = next_slots(constructor(segments[:, begin:end]), before, integrator, **switches)
        slots.append(made)
        before = RunningStatistics(*(x[:, -1] for x in after))
    assert relative(torch.cat(slots, dim=1), expected) < 1e-5
