"""Stage 1, local construction: a segment of tokens -> M local slots.

    L_i = softmax(E Wq (X_i Wk)^T / sqrt(d)) X_i Wv Wo

Shapes: B batch, N segments, S tokens in a segment, M local slots, D model width, C bottleneck width, h heads,
d = C / h.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class LocalConstructor(nn.Module):
    """Learnable slots query a segment through a bottleneck.

    Args:
        hidden_size: D.
        num_local_slots: M.
        num_heads: h; divides the bottleneck's width.
        bottleneck_dim: C; None: C = D and no output projection.
        absorb: allow the absorbed projections where they are exact and cheaper.
    """

    def __init__(
        self,
        hidden_size: int,
        num_local_slots: int,
        num_heads: int,
        bottleneck_dim: int | None,
        *,
        absorb: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = hidden_size if bottleneck_dim is None else bottleneck_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.absorb = absorb
        self.memory_slots = nn.Parameter(torch.empty(num_local_slots, hidden_size, **factory))
        self.q_proj = nn.Linear(hidden_size, width, bias=False, **factory)
        self.k_proj = nn.Linear(hidden_size, width, bias=False, **factory)
        self.v_proj = nn.Linear(hidden_size, width, bias=False, **factory)
        if bottleneck_dim is not None:
            self.o_proj: nn.Module | None = nn.Linear(width, hidden_size, bias=False, **factory)
        else:
            self.o_proj = None
        self.reset_slots()

    @torch.no_grad()
    def reset_slots(self) -> None:
        """memory_slots ~ N(0, 1/D); the projections keep torch's default initialisation."""
        nn.init.normal_(self.memory_slots, std=1.0 / math.sqrt(self.memory_slots.shape[1]))

    def forward(self, segments_BNSD: Tensor, real_BNS: Tensor | None = None) -> Tensor:
        """Local slots [B, N, M, D] of segments [B, N, S, D].

        `real_BNS` (bool, broadcast over B) marks real tokens; a segment without any gives zeros.
        """
        use_absorbed = self.absorb and self._can_absorb() and self._absorbing_is_cheaper()
        construct = self._construct_absorbed if use_absorbed else self._construct_plain
        context_BNMC = construct(segments_BNSD, real_BNS)
        local_BNMD = context_BNMC if self.o_proj is None else self.o_proj(context_BNMC)
        if real_BNS is not None:
            # where, not a product: whatever the padding held must not come through
            local_BNMD = torch.where(real_BNS.any(-1)[..., None, None], local_BNMD, 0.0)
        return local_BNMD

    def _can_absorb(self) -> bool:
        """Absorbing reads weights directly: exact only for plain, resident Linear layers without LoRA or offload."""
        return all(
            type(linear) is nn.Linear
            and not hasattr(linear, "_hf_hook")
            and not linear._forward_hooks
            and not linear._forward_pre_hooks
            for linear in (self.k_proj, self.v_proj)
        )

    def _absorbing_is_cheaper(self) -> bool:
        """Multiply-adds per token: plain 2 D C, absorbed 2 D M h."""
        return self.memory_slots.shape[0] * self.num_heads < self.k_proj.weight.shape[0]

    def _construct_plain(self, segments_BNSD: Tensor, real_BNS: Tensor | None) -> Tensor:
        q_hMd = self._heads(self.q_proj(self.memory_slots))
        k_BNhSd = self._heads(self.k_proj(segments_BNSD))
        v_BNhSd = self._heads(self.v_proj(segments_BNSD))
        scale = 1.0 / math.sqrt(q_hMd.shape[-1])
        scores_BNhMS = (q_hMd * scale) @ k_BNhSd.mT
        weights_BNhMS = _softmax_over_real(scores_BNhMS, real_BNS).to(v_BNhSd.dtype)
        return (weights_BNhMS @ v_BNhSd).transpose(-3, -2).flatten(-2)

    def _construct_absorbed(self, segments_BNSD: Tensor, real_BNS: Tensor | None) -> Tensor:
        """Wk moves into the queries and Wv behind the weighted sum: no [S, C] keys or values are made or kept.

        A_h = (E Wq)_h Wk[h] / sqrt(d) is [M, D]; scores are A_h X^T; the context is (softmax(scores) X) Wv[h].
        """
        q_hMd = self._heads(self.q_proj(self.memory_slots))
        h, m, d = q_hMd.shape
        wk_hdD = self.k_proj.weight.unflatten(0, (h, d))
        wv_hdD = self.v_proj.weight.unflatten(0, (h, d))
        a_rD = ((q_hMd * (1.0 / math.sqrt(d))) @ wk_hdD.to(q_hMd.dtype)).flatten(0, 1)  # r = (h, M)
        scores_BNrS = a_rD.to(segments_BNSD.dtype) @ segments_BNSD.mT
        scores_BNhMS = scores_BNrS.unflatten(-2, (h, m))
        weights_BNhMS = _softmax_over_real(scores_BNhMS, real_BNS).to(segments_BNSD.dtype)
        sums_BNhMD = (weights_BNhMS.flatten(-3, -2) @ segments_BNSD).unflatten(-2, (h, m))
        context_BNhMd = sums_BNhMD @ wv_hdD.mT.to(sums_BNhMD.dtype)
        return context_BNhMd.transpose(-3, -2).flatten(-2)

    def _heads(self, x_C: Tensor) -> Tensor:
        """[..., X, C] -> [..., h, X, d]."""
        return x_C.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def _softmax_over_real(scores_BNhMS: Tensor, real_BNS: Tensor | None) -> Tensor:
    """Softmax in float32 over the real tokens. A segment without any stays finite (uniform), and is zeroed later."""
    scores_BNhMS = scores_BNhMS.float()
    if real_BNS is not None:
        lowest = torch.finfo(scores_BNhMS.dtype).min
        scores_BNhMS = scores_BNhMS.masked_fill(~real_BNS[:, :, None, None, :], lowest)
    return scores_BNhMS.softmax(-1)
