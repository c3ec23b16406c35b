"""Shifted sparse attention (S2-Attn, LongLoRA): the baseline, in its half-group variant without wrap-around.

Shapes: B batch, T tokens, H query heads, J key/value heads, E head dim. Groups are the config's segments (S tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hici.attention.sdpa import causal, causal_segments, repeat_heads


def attend(
    q_BTHE: Tensor, k_BTJE: Tensor, v_BTJE: Tensor, *, segment_size: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """[B, T, H, E]: heads 0..H//2-1 in groups [0,S), [S,2S), ...; the others in [0,S/2), [S/2,3S/2), ..."""
    heads = q_BTHE.shape[2]
    half_heads, half_group = heads // 2, segment_size // 2
    q, k, v = q_BTHE, repeat_heads(k_BTJE, heads), repeat_heads(v_BTJE, heads)
    plain = [x[:, :, :half_heads] for x in (q, k, v)]
    shifted = [x[:, :, half_heads:] for x in (q, k, v)]
    parts = []
    if half_heads:
        parts.append(causal_segments(*plain, segment_size=segment_size, scale=scale, dropout=dropout))
    first = [x[:, :half_group] for x in shifted]
    rest = [x[:, half_group:] for x in shifted]
    pieces = []
    if first[0].shape[1]:
        pieces.append(causal(*first, scale=scale, dropout=dropout))
    if rest[0].shape[1]:
        pieces.append(causal_segments(*rest, segment_size=segment_size, scale=scale, dropout=dropout))
    parts.append(torch.cat(pieces, dim=1))
    return torch.cat(parts, dim=2)
