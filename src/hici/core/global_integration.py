"""Stage 2, global integration: local slots -> five statistics -> K global slots.

Shapes: B batch, N segments, M local slots, K global slots, D model width, C integrator width, R shared compressor's
width, 5 statistics (mean, max, min, std, L2-normalised mean), ... any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_STATISTICS = 5
EPSILON = 1e-6  # published lower bound of the standard deviation and of the mean's norm


def slot_statistics(local_BNMD: Tensor, real_BN: Tensor | None = None) -> Tensor:
    """Statistics over all slots of all segments that hold real tokens: [B, 5, D], float32.

    `real_BN` (bool, broadcast over B): segments that count. A row without any gives zeros and the clamped std.
    """
    local_BNMD = local_BNMD.float()
    if real_BN is None:
        slots_BXD = local_BNMD.flatten(1, 2)
        variance, mean = torch.var_mean(slots_BXD, dim=1, correction=0)
        return _stack(mean, slots_BXD.amax(1), slots_BXD.amin(1), variance)
    real_BN11 = real_BN[:, :, None, None]
    count = (real_BN.sum(1) * local_BNMD.shape[2]).clamp(min=1)[:, None]
    mean = torch.where(real_BN11, local_BNMD, 0.0).sum((1, 2)) / count
    variance = torch.where(real_BN11, local_BNMD - mean[:, None, None], 0.0).square().sum((1, 2)) / count
    some = real_BN.any(1)[:, None]
    highest = torch.where(some, torch.where(real_BN11, local_BNMD, -math.inf).amax((1, 2)), 0.0)
    lowest = torch.where(some, torch.where(real_BN11, local_BNMD, math.inf).amin((1, 2)), 0.0)
    return _stack(mean, highest, lowest, variance)


class RunningStatistics(NamedTuple):
    """What the statistics over finished segments are made of; ... leading dimensions, float32.

    Attributes:
        segments_1: number of segments, [..., 1]. Each has M slots.
        mean_D, squares_D: mean, and sum of squared deviations from it (M2), [..., D].
        highest_D, lowest_D: extremes, [..., D].
    """

    segments_1: Tensor
    mean_D: Tensor
    squares_D: Tensor
    highest_D: Tensor
    lowest_D: Tensor


def no_statistics(batch: int, width: int, device: torch.device) -> RunningStatistics:
    """Those of no segment at all, [B, D]."""
    zeros = torch.zeros(batch, width, device=device)
    return RunningStatistics(zeros[:, :1], zeros, zeros, zeros - math.inf, zeros + math.inf)


def running_statistics(local_BNMD: Tensor, before: RunningStatistics | None = None) -> RunningStatistics:
    """After each of N more segments: [B, N, ...]. `before`, [B, ...]: those of all segments so far; None: none.

    The squared deviations M2 grow by Chan's merge, M2 += m2_i + delta_i^2 c M / (c + M): a sum of terms that are
    never negative, so nothing cancels (E[x^2] - E[x]^2 would). Segments without real tokens are at the end of a row
    (see `segments`) and later statistics never reach an earlier segment, so they need no mask here.
    """
    local_BNMD = local_BNMD.float()
    n, m = local_BNMD.shape[1:3]
    new_variance_BND, new_mean_BND = torch.var_mean(local_BNMD, dim=2, correction=0)
    highest_BND = local_BNMD.amax(2).cummax(1).values
    lowest_BND = local_BNMD.amin(2).cummin(1).values
    if before is None:
        before = no_statistics(local_BNMD.shape[0], local_BNMD.shape[3], local_BNMD.device)
    else:
        highest_BND = torch.maximum(highest_BND, before.highest_D[:, None])
        lowest_BND = torch.minimum(lowest_BND, before.lowest_D[:, None])
    more_N1 = torch.arange(1, n + 1, device=local_BNMD.device, dtype=torch.float32)[:, None]
    segments_BN1 = before.segments_1[:, None] + more_N1
    mean_BND = ((before.mean_D * before.segments_1)[:, None] + new_mean_BND.cumsum(1)) / segments_BN1
    earlier_BND = torch.cat((before.mean_D[:, None], mean_BND[:, :-1]), dim=1)
    growth_BND = (new_mean_BND - earlier_BND).square() * (m * (segments_BN1 - 1) / segments_BN1)
    squares_BND = before.squares_D[:, None] + (new_variance_BND * m + growth_BND).cumsum(1)
    return RunningStatistics(segments_BN1, mean_BND, squares_BND, highest_BND, lowest_BND)


def statistics_of(running: RunningStatistics, num_slots: int) -> Tensor:
    """[..., 5, D] of what `running_statistics` counted over segments of M = `num_slots` slots."""
    variance_D = running.squares_D / (num_slots * running.segments_1)
    return _stack(running.mean_D, running.highest_D, running.lowest_D, variance_D)


def cumulative_statistics(local_BNMD: Tensor) -> Tensor:
    """Statistics over the slots of segments 1..i, for every i: [B, N, 5, D], float32."""
    return statistics_of(running_statistics(local_BNMD), local_BNMD.shape[2])


def _stack(mean: Tensor, highest: Tensor, lowest: Tensor, variance: Tensor) -> Tensor:
    # the variance is clamped, not its root: the root's gradient at zero is infinite
    std = variance.clamp(min=EPSILON**2).sqrt()
    direction = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp(min=EPSILON)
    return torch.stack((mean, highest, lowest, std, direction), dim=-2)


class GlobalIntegrator(nn.Module):
    """Learned queries attend to the compressed statistics.

    Args:
        hidden_size: D.
        num_global_slots: K.
        num_heads: h; divides `width`.
        width: C.
        compress_dim: R of the one shared compressor (R == C: nothing expands behind it); None: five independent
            compressors D -> C.
    """

    def __init__(
        self,
        hidden_size: int,
        num_global_slots: int,
        num_heads: int,
        width: int,
        compress_dim: int | None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.global_queries = nn.Parameter(torch.empty(num_global_slots, width, **factory))
        # [1] and not []: FSDP2 shards dimension 0; files hold the published [] (hooks below)
        self.expand_scale_param = nn.Parameter(torch.empty(1, **factory))
        self.shared_compressor: nn.Module | None = None
        self.stat_expand: nn.Module | None = None
        self.stat_compressors: nn.ModuleList | None = None
        if compress_dim is None:
            self.stat_compressors = nn.ModuleList(
                _compressor(hidden_size, width, factory) for _ in range(NUM_STATISTICS)
            )
        else:
            self.shared_compressor = _compressor(hidden_size, compress_dim, factory)
            self.stat_expand = nn.Identity() if compress_dim == width else _compressor(compress_dim, width, factory)
        self.q_proj = nn.Linear(width, width, bias=False, **factory)
        self.k_proj = nn.Linear(width, width, bias=False, **factory)
        self.v_proj = nn.Linear(width, width, bias=False, **factory)
        self.o_proj = nn.Linear(width, width, bias=False, **factory)
        self.expand = nn.Linear(width, hidden_size, bias=False, **factory)
        self.register_state_dict_post_hook(_write_scalar_gate)
        self.register_load_state_dict_pre_hook(_read_scalar_gate)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed_rows_KD: Tensor | None = None) -> None:
        """Published initial values (compressors keep torch's default).

        `seed_rows_KD`: the K embedding rows of largest norm, which become the queries through the compressor (the
        mean's, where there are five); None: Xavier uniform.
        """
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.expand.weight, std=0.02 / math.sqrt(self.expand.in_features))
        self.expand_scale_param.fill_(math.log(math.expm1(0.1)))  # softplus of it is 0.1
        if self.global_queries.numel() == 0:
            return
        if seed_rows_KD is None:
            nn.init.xavier_uniform_(self.global_queries)
        else:
            rows = seed_rows_KD.to(self.expand.weight)
            self.global_queries.copy_(self._compress_one(rows, 0))

    def forward(self, statistics_5D: Tensor) -> Tensor:
        """Global slots [..., K, D] of statistics [..., 5, D]."""
        compressed_5C = self.compress(statistics_5D.to(self.expand.weight.dtype))
        q_hKd = self._heads(self.q_proj(self.global_queries))
        k_h5d = self._heads(self.k_proj(compressed_5C))
        v_h5d = self._heads(self.v_proj(compressed_5C))
        scale = 1.0 / math.sqrt(q_hKd.shape[-1])
        weights_hK5 = ((q_hKd * scale) @ k_h5d.mT).float().softmax(-1).to(v_h5d.dtype)
        context_KC = (weights_hK5 @ v_h5d).transpose(-3, -2).flatten(-2)
        return self.expand(self.o_proj(context_KC)) * F.softplus(self.expand_scale_param)

    def compress(self, statistics_5D: Tensor) -> Tensor:
        """[..., 5, D] -> [..., 5, C]."""
        if self.stat_compressors is None:
            return self._compress_one(statistics_5D, 0)
        return torch.stack(
            [self._compress_one(row, i) for i, row in enumerate(statistics_5D.unbind(-2))],
            dim=-2,
        )

    def _compress_one(self, x_D: Tensor, statistic: int) -> Tensor:
        if self.stat_compressors is not None:
            return self.stat_compressors[statistic](x_D)
        assert self.shared_compressor is not None
        assert self.stat_expand is not None
        return self.stat_expand(self.shared_compressor(x_D))

    def _heads(self, x_C: Tensor) -> Tensor:
        """[..., X, C] -> [..., h, X, d]."""
        return x_C.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def _compressor(in_dim: int, out_dim: int, factory: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, out_dim, bias=False, **factory), nn.LayerNorm(out_dim, **factory))


def _write_scalar_gate(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """state_dict writes the gate as the published []. A sharded parameter stays as it is until it is gathered."""
    gate = state.get(prefix + "expand_scale_param")
    if type(gate) is Tensor and gate.numel():  # empty: partitioned by ZeRO-3
        state[prefix + "expand_scale_param"] = gate.reshape(())


def _read_scalar_gate(module: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """load_state_dict accepts the gate as [] and as [1]."""
    gate = state.get(prefix + "expand_scale_param")
    if gate is not None and gate.shape in ((), (1,)):
        state[prefix + "expand_scale_param"] = gate.reshape(module.expand_scale_param.shape)
