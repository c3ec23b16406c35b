"""Stage 3, broadcast: which slots each segment gets, and the three stages in a row.

Shapes: B batch, N segments, S tokens in a segment, M local slots, K global slots, P slots of a segment, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hici.core.global_integration import (
    GlobalIntegrator,
    RunningStatistics,
    cumulative_statistics,
    running_statistics,
    slot_statistics,
    statistics_of,
)
from hici.core.local_construction import LocalConstructor


def visible_slots(
    global_D: Tensor | None, local_BNMD: Tensor | None, visibility: str, num_segments: int
) -> Tensor | None:
    """Slots [B, N', P, D] of the last N' segments; the segments before them have none. None: no segment has any.

    `global_D` is [B, K, D] for "all" (shared), else [B, N, K, D] (segment i: over 1..i). For "past", segment i gets
    G over 1..i-1 and L_(i-1), so both come without their last segment and N' = N - 1.
    """
    kinds = []
    if global_D is not None:
        kinds.append(global_D[:, None].expand(-1, num_segments, -1, -1) if visibility == "all" else global_D)
    if local_BNMD is not None:
        kinds.append(local_BNMD)
    if not kinds:
        return None
    return torch.cat([kind.to(kinds[0].dtype) for kind in kinds], dim=2)


def build_slots(
    segments_BNSD: Tensor,
    real_BNS: Tensor | None,
    local_constructor: LocalConstructor,
    global_integrator: GlobalIntegrator,
    *,
    visibility: str,
    use_global: bool,
    use_local: bool,
) -> Tensor | None:
    """Construct, integrate, broadcast: slots [B, N', P, D] of the last N' segments, or None.

    `segments_BNSD` are compacted segments, `real_BNS` (bool, broadcast over B) their real tokens, None: all.
    """
    num_segments = segments_BNSD.shape[1]
    if visibility == "past":
        # the last segment's summary is seen by nobody
        segments_BNSD = segments_BNSD[:, :-1]
        real_BNS = None if real_BNS is None else real_BNS[:, :-1]
    if segments_BNSD.shape[1] == 0 or not (use_global or use_local):
        return None
    local_BNMD = local_constructor(segments_BNSD, real_BNS)
    global_D = None
    if use_global:
        if visibility == "all":
            statistics = slot_statistics(local_BNMD, None if real_BNS is None else real_BNS.any(-1))
        else:
            statistics = cumulative_statistics(local_BNMD)
        global_D = global_integrator(statistics)
    return visible_slots(global_D, local_BNMD if use_local else None, visibility, num_segments)


def next_slots(
    local_BNMD: Tensor,
    before: RunningStatistics,
    global_integrator: GlobalIntegrator,
    *,
    use_global: bool,
    use_local: bool,
) -> tuple[Tensor, RunningStatistics]:
    """Integrate and broadcast as segments finish, for visibility "past".

    `local_BNMD` are the local slots of N more finished segments, `before` the statistics of those before them. Returns
    the slots [B, N, P, D] that the segment behind each of them sees, and the statistics after each, [B, N, ...].
    """
    after = running_statistics(local_BNMD, before)
    global_BNKD = global_integrator(statistics_of(after, local_BNMD.shape[2])) if use_global else None
    slots_BNPD = visible_slots(global_BNKD, local_BNMD if use_local else None, "past", local_BNMD.shape[1])
    assert slots_BNPD is not None  # one of the two kinds is in use
    return slots_BNPD, after
