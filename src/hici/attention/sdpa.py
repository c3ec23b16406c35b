"""Broadcast attention on torch's scaled_dot_product_attention, without a mask.

Shapes: B batch, T tokens, N segments, S tokens in a segment, P slots, H query heads, J key/value heads, E head dim.

SDPA's `is_causal` is aligned top-left. With P zero rows in front of the queries and the P slot rows in front of the
keys, the square causal kernel computes exactly the broadcast: row P + s sees the P slots and the tokens 0..s. The
first P output rows are dropped. A ragged tail is filled with zeros *behind* its tokens, where causality hides them.
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
    """Broadcast attention, [B, T, H, E]; see the package for the meaning of the arguments."""
    if slot_k_BNPJE is None or slot_v_BNPJE is None:
        return causal_segments(q_BTHE, k_BTJE, v_BTJE, segment_size=segment_size, scale=scale, dropout=dropout)
    num_segments = -(-q_BTHE.shape[1] // segment_size)
    start = (num_segments - slot_k_BNPJE.shape[1]) * segment_size
    slotted = _causal_segments_with_slots(
        q_BTHE[:, start:],
        k_BTJE[:, start:],
        v_BTJE[:, start:],
        slot_k_BNPJE,
        slot_v_BNPJE,
        segment_size=segment_size,
        scale=scale,
        dropout=dropout,
    )
    if start == 0:
        return slotted
    bare = causal_segments(
        q_BTHE[:, :start],
        k_BTJE[:, :start],
        v_BTJE[:, :start],
        segment_size=segment_size,
        scale=scale,
        dropout=dropout,
    )
    return torch.cat((bare, slotted), dim=1)


def causal_segments(
    q_BTHE: Tensor, k_BTJE: Tensor, v_BTJE: Tensor, *, segment_size: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Causal attention inside segments of S tokens, no slots: [B, T, H, E]."""
    batch, length = q_BTHE.shape[:2]
    segment_size = min(segment_size, length)
    q, k, v = (_cut(x, segment_size).flatten(0, 1) for x in (q_BTHE, k_BTJE, v_BTJE))
    out = causal(q, k, v, scale=scale, dropout=dropout)
    return out.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]


def _causal_segments_with_slots(
    q_BTHE: Tensor,
    k_BTJE: Tensor,
    v_BTJE: Tensor,
    slot_k_BNPJE: Tensor,
    slot_v_BNPJE: Tensor,
    *,
    segment_size: int,
    scale: float,
    dropout: float,
) -> Tensor:
    batch, length, heads, dim = q_BTHE.shape
    n, p = slot_k_BNPJE.shape[1:3]
    rows = q_BTHE.new_zeros(batch, n, p, heads, dim)
    q = torch.cat((rows, _cut(q_BTHE, segment_size)), dim=2).flatten(0, 1)
    k = torch.cat((slot_k_BNPJE, _cut(k_BTJE, segment_size)), dim=2).flatten(0, 1)
    v = torch.cat((slot_v_BNPJE, _cut(v_BTJE, segment_size)), dim=2).flatten(0, 1)
    out = causal(q, k, v, scale=scale, dropout=dropout)[:, p:]
    return out.unflatten(0, (batch, n)).flatten(1, 2)[:, :length]


def causal(q_BTHE: Tensor, k_BTJE: Tensor, v_BTJE: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Square causal attention, [B, T, H, E]."""
    k_BTHE, v_BTHE = repeat_heads(k_BTJE, q_BTHE.shape[2]), repeat_heads(v_BTJE, q_BTHE.shape[2])
    out_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BTHE.transpose(1, 2),
        v_BTHE.transpose(1, 2),
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
    )
    return out_BHTE.transpose(1, 2)


def repeat_heads(x_BTJE: Tensor, heads: int) -> Tensor:
    """[B, T, J, E] -> [B, T, H, E]: query head h uses key/value head h // (H / J)."""
    groups = heads // x_BTJE.shape[2]
    if groups == 1:
        return x_BTJE
    return x_BTJE[:, :, :, None].expand(-1, -1, -1, groups, -1).flatten(2, 3)


def _cut(x_BT: Tensor, segment_size: int) -> Tensor:
    """[B, T, X, E] -> [B, N, S, X, E], zeros behind a short last segment."""
    length = x_BT.shape[1]
    n = -(-length // segment_size)
    if n * segment_size != length:
        x_BT = F.pad(x_BT, (0, 0, 0, 0, 0, n * segment_size - length))
    return x_BT.unflatten(1, (n, segment_size))


BACKEND = Backend(name="sdpa", attend=attend, absorbed=True, priority=10)
