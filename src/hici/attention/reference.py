"""The specification: a plain loop over segments in float32, the oracle of every other backend.

Shapes: B batch, T tokens, N segments, S tokens in a segment, P slots, H query heads, J key/value heads, E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hici.attention import Backend


def attend(
    q_BTHE: Tensor,
    k_BTJE: Tensor,
    v_BTJE: Tensor,
    slot_k_BNPJE: Tensor | None,
    slot_v_BNPJE: Tensor | None,
    *,
    segment_size: int,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Broadcast attention, [B, T, H, E], in q's dtype; computed in float32, one segment at a time."""
    length = q_BTHE.shape[1]
    starts = range(0, length, segment_size)
    without_slots = len(starts) - (0 if slot_k_BNPJE is None else slot_k_BNPJE.shape[1])
    outputs = []
    for i, start in enumerate(starts):
        tokens = slice(start, min(start + segment_size, length))
        k, v, num_slots = k_BTJE[:, tokens].float(), v_BTJE[:, tokens].float(), 0
        if slot_k_BNPJE is not None and slot_v_BNPJE is not None and i >= without_slots:
            num_slots = slot_k_BNPJE.shape[2]
            k = torch.cat((slot_k_BNPJE[:, i - without_slots].float(), k), dim=1)
            v = torch.cat((slot_v_BNPJE[:, i - without_slots].float(), v), dim=1)
        outputs.append(_attend_one(q_BTHE[:, tokens].float(), k, v, num_slots, scale, dropout))
    return torch.cat(outputs, dim=1).to(q_BTHE.dtype)


def _attend_one(q_BSHE: Tensor, k_BXJE: Tensor, v_BXJE: Tensor, num_slots: int, scale: float, dropout: float) -> Tensor:
    """One segment: token s sees all slots and the tokens 0..s. X = P + S."""
    groups = q_BSHE.shape[2] // k_BXJE.shape[2]
    k_BXHE = k_BXJE.repeat_interleave(groups, dim=2)
    v_BXHE = v_BXJE.repeat_interleave(groups, dim=2)
    scores_BHSX = torch.einsum("bshe,bxhe->bhsx", q_BSHE, k_BXHE) * scale
    visible_SX = torch.ones(scores_BHSX.shape[-2:], dtype=torch.bool, device=q_BSHE.device).tril(num_slots)
    weights_BHSX = scores_BHSX.masked_fill(~visible_SX, -torch.inf).softmax(-1)
    return torch.einsum("bhsx,bxhe->bshe", F.dropout(weights_BHSX, dropout), v_BXHE)


BACKEND = Backend(name="reference", attend=attend, absorbed=False, priority=0)
