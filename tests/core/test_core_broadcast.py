"""Stage 3: which slots each segment gets, for every visibility."""

import pytest
import torch

from helpers import difference
from hici.core.broadcast import build_slots, visible_slots
from hici.core.global_integration import GlobalIntegrator, slot_statistics
from hici.core.local_construction import LocalConstructor

B, N, S, M, K, D = 2, 4, 5, 3, 2, 8


def _kinds(visibility, use_global, use_local):
    available = N - 1 if visibility == "past" else N
    shape = (B, K, D) if visibility == "all" else (B, available, K, D)
    return (
        torch.randn(*shape) if use_global else None,
        torch.randn(B, available, M, D) if use_local else None,
    )


@pytest.mark.parametrize("kinds", ["G+L", "G", "L", "neither"])
@pytest.mark.parametrize("visibility", ["all", "current", "past"])
def test_visible_slots(visibility, kinds):
    global_D, local = _kinds(visibility, "G" in kinds, "L" in kinds)
    slots = visible_slots(global_D, local, visibility, N)
    if kinds == "neither":
        assert slots is None
        return
    rows = N - 1 if visibility == "past" else N
    assert slots.shape == (B, rows, K * ("G" in kinds) + M * ("L" in kinds), D)
    for i in range(rows):  # row i: of segment i, or of segment i + 1 in "past"
        expected = []
        if global_D is not None:
            expected.append(global_D if visibility == "all" else global_D[:, i])
        if local is not None:
            expected.append(local[:, i])
        assert torch.equal(slots[:, i], torch.cat(expected, dim=1))


def _modules():
    constructor, integrator = LocalConstructor(D, M, 2, 4), GlobalIntegrator(D, K, 2, 4, 3)
    torch.nn.init.normal_(constructor.memory_slots)
    torch.nn.init.normal_(integrator.expand.weight)
    return constructor, integrator


def _seen(visibility, segment):
    """(segments in G, segment of L) that the design's table gives to a segment, or None."""
    if visibility == "all":
        return range(N), segment
    if visibility == "current":
        return range(segment + 1), segment
    return (range(segment), segment - 1) if segment else None


@pytest.mark.parametrize("visibility", ["all", "current", "past"])
def test_stages_in_a_row(visibility):
    constructor, integrator = _modules()
    x = torch.randn(B, N, S, D)
    slots = build_slots(x, None, constructor, integrator, visibility=visibility, use_global=True, use_local=True)
    start = N - slots.shape[1]
    assert start == (1 if visibility == "past" else 0)
    for segment in range(N):
        seen = _seen(visibility, segment)
        if seen is None:
            assert segment < start
            continue
        summarised, own = seen
        local = constructor(x[:, list(summarised)])
        expected = torch.cat((integrator(slot_statistics(local)), constructor(x[:, [own]])[:, 0]), dim=1)
        assert difference(slots[:, segment - start], expected) < 1e-5


@pytest.mark.parametrize("visibility", ["all", "current", "past"])
@pytest.mark.parametrize("full_segments, tail", [(2, 0), (1, 3), (0, 1)])
def test_empty_segments_enter_nothing(visibility, full_segments, tail):
    constructor, integrator = _modules()
    x = torch.randn(1, N, S, D)
    real = (torch.arange(N * S) < full_segments * S + tail).reshape(1, N, S)
    switches = {"visibility": visibility, "use_global": True, "use_local": True}
    slots = build_slots(torch.where(real[..., None], x, 1e3), real, constructor, integrator, **switches)
    used = full_segments + (tail > 0)
    short = build_slots(x[:, :used], real[:, :used], constructor, integrator, **switches)
    compared = used - (visibility == "past")
    if compared == 0:
        assert short is None
    else:
        assert difference(slots[:, :compared], short) < 1e-5
    assert slots.isfinite().all()


@pytest.mark.parametrize("visibility, n", [("past", 1), ("all", 2)])
def test_no_slots(visibility, n):
    constructor, integrator = _modules()
    on = visibility == "past"
    switches = {"visibility": visibility, "use_global": on, "use_local": on}
    assert build_slots(torch.randn(B, n, S, D), None, constructor, integrator, **switches) is None
