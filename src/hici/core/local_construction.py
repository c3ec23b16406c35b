"""Stage 1, local construction: a segment of tokens -> M local slots.

    L_i = softmax(E Wq (X_i Wk)^T / sqrt(d)) X_i Wv Wo

Shapes: B batch, N segments, S tokens in a segment, T tokens of an unfinished one, M local slots, D model width,
C bottleneck width, h heads, d = C / h.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_LOWEST = torch.finfo(torch.float32).min  # finite: differences of it are no NaN


class RunningConstruction(NamedTuple):
    """Local construction of an unfinished segment: the softmax over its tokens so far, as an online softmax.

    Attributes:
        highest_BhM: largest score.
        total_BhM: sum of exp(score - highest).
        context_BhMd: sum of exp(score - highest) times the token's value.
    """

    highest_BhM: Tensor
    total_BhM: Tensor
    context_BhMd: Tensor


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
        self.width = width
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
        scores_BNhMS, weigh = self._scores(segments_BNSD, self.queries())
        weights_BNhMS = _softmax_over_real(scores_BNhMS, real_BNS).to(segments_BNSD.dtype)
        local_BNMD = self._output(weigh(weights_BNhMS))
        if real_BNS is not None:
            # where, not a product: whatever the padding held must not come through
            local_BNMD = torch.where(real_BNS.any(-1)[..., None, None], local_BNMD, 0.0)
        return local_BNMD

    def queries(self) -> Tensor:
        """E Wq / sqrt(d), [h, M, d]."""
        q_hMd = self._heads(self.q_proj(self.memory_slots))
        return q_hMd * (1.0 / math.sqrt(q_hMd.shape[-1]))

    def start(self, batch: int) -> RunningConstruction:
        """The construction of `batch` segments that hold no token yet."""
        weight = self.memory_slots
        m, h, d = weight.shape[0], self.num_heads, self.width // self.num_heads
        factory: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        return RunningConstruction(
            torch.full((batch, h, m), _LOWEST, **factory),
            torch.zeros(batch, h, m, **factory),
            torch.zeros(batch, h, m, d, **factory),
        )

    def accumulate(
        self, running: RunningConstruction, tokens_BTD: Tensor, real_BT: Tensor | None, queries_hMd: Tensor
    ) -> RunningConstruction:
        """The construction after T more tokens (`real_BT`, bool, marks the real ones); `queries()` never change."""
        if real_BT is not None:  # whatever the padding holds must not come through: 0 times NaN is NaN
            tokens_BTD = tokens_BTD.masked_fill(~real_BT[:, :, None], 0.0)
        scores_BhMT, weigh = self._scores(tokens_BTD, queries_hMd)
        scores_BhMT = scores_BhMT.float()
        if real_BT is not None:
            scores_BhMT = scores_BhMT.masked_fill(~real_BT[:, None, None, :], _LOWEST)
        highest_BhM = torch.maximum(running.highest_BhM, scores_BhMT.amax(-1))
        weights_BhMT = (scores_BhMT - highest_BhM[..., None]).exp()
        if real_BT is not None:  # with no real token so far the lowest score is the highest
            weights_BhMT = weights_BhMT.masked_fill(~real_BT[:, None, None, :], 0.0)
        kept_BhM = (running.highest_BhM - highest_BhM).exp()
        return RunningConstruction(
            highest_BhM,
            running.total_BhM * kept_BhM + weights_BhMT.sum(-1),
            running.context_BhMd * kept_BhM[..., None] + weigh(weights_BhMT.to(tokens_BTD.dtype)).float(),
        )

    def finish(self, running: RunningConstruction) -> Tensor:
        """Local slots [B, M, D] of the tokens so far; zeros where there are none."""
        context_BhMd = running.context_BhMd / running.total_BhM.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return self._output(context_BhMd.to(self.memory_slots.dtype))

    def _scores(self, x_SD: Tensor, q_hMd: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Scores [..., h, M, S] of tokens [..., S, D], and the function from weights to the context [..., h, M, d]."""
        absorbed = self.absorb and self._can_absorb() and self._absorbing_is_cheaper(x_SD.shape[-2])
        return self._absorbed(x_SD, q_hMd) if absorbed else self._plain(x_SD, q_hMd)

    def _can_absorb(self) -> bool:
        """Absorbing reads weights directly: exact only for plain, resident Linear layers without LoRA or offload."""
        return all(
            type(linear) is nn.Linear
            and not hasattr(linear, "_hf_hook")
            and not linear._forward_hooks
            and not linear._forward_pre_hooks
            for linear in (self.k_proj, self.v_proj)
        )

    def _absorbing_is_cheaper(self, tokens: int) -> bool:
        """Multiply-adds over 2 D: plain C a token, absorbed M h a token and M C once."""
        m, width = self.memory_slots.shape[0], self.width
        return m * self.num_heads * tokens + m * width < width * tokens

    def _plain(self, x_SD: Tensor, q_hMd: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        k_hSd = self._heads(self.k_proj(x_SD))
        v_hSd = self._heads(self.v_proj(x_SD))
        return q_hMd.to(k_hSd.dtype) @ k_hSd.mT, lambda weights_hMS: weights_hMS.to(v_hSd.dtype) @ v_hSd

    def _absorbed(self, x_SD: Tensor, q_hMd: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Wk moves into the queries and Wv behind the weighted sum: no [S, C] keys or values are made or kept.

        A_h = (E Wq)_h Wk[h] / sqrt(d) is [M, D]; scores are A_h X^T; the context is (weights X) Wv[h].
        """
        h, m, d = q_hMd.shape
        wk_hdD = self.k_proj.weight.unflatten(0, (h, d))
        wv_hdD = self.v_proj.weight.unflatten(0, (h, d))
        a_rD = (q_hMd @ wk_hdD.to(q_hMd.dtype)).flatten(0, 1)  # r = (h, M)
        scores_rS = a_rD.to(x_SD.dtype) @ x_SD.mT

        def weigh(weights_hMS: Tensor) -> Tensor:
            sums_hMD = (weights_hMS.flatten(-3, -2) @ x_SD).unflatten(-2, (h, m))
            return sums_hMD @ wv_hdD.mT.to(sums_hMD.dtype)

        return scores_rS.unflatten(-2, (h, m)), weigh

    def _output(self, context_hMd: Tensor) -> Tensor:
        """[..., h, M, d] -> [..., M, D]."""
        context_MC = context_hMd.transpose(-3, -2).flatten(-2)
        return context_MC if self.o_proj is None else self.o_proj(context_MC)

    def _heads(self, x_C: Tensor) -> Tensor:
        """[..., X, C] -> [..., h, X, d]."""
        return x_C.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def _softmax_over_real(scores_BNhMS: Tensor, real_BNS: Tensor | None) -> Tensor:
    """Softmax in float32 over the real tokens. A segment without any stays finite (uniform), and is zeroed later."""
    scores_BNhMS = scores_BNhMS.float()
    if real_BNS is not None:
        scores_BNhMS = scores_BNhMS.masked_fill(~real_BNS[:, :, None, None, :], _LOWEST)
    return scores_BNhMS.softmax(-1)
