"""Attention of new tokens over all raw keys of a cache: the published decode.

Shapes: B batch, T new tokens, X cached and new tokens, H query heads, J key/value heads, E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hici.attention.sdpa import repeat_heads


def attend(
    q_BTHE: Tensor,
    k_BXJE: Tensor,
    v_BXJE: Tensor,
    real_BX: Tensor | None,
    *,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[B, T, H, E]: causal and aligned bottom-right (query t is token X - T + t), padding (`real_BX` False) unseen."""
    new, total = q_BTHE.shape[1], k_BXJE.shape[1]
    visible = None
    if new > 1 or real_BX is not None or (window is not None and total > window):
        query = torch.arange(total - new, total, device=q_BTHE.device)[:, None]
        key = torch.arange(total, device=q_BTHE.device)
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        if real_BX is not None:
            # a padded query sees itself, so that no softmax is over nothing
            visible = visible & real_BX[:, None, None, :] | (key == query)
    out_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        repeat_heads(k_BXJE, q_BTHE.shape[2]).transpose(1, 2),
        repeat_heads(v_BXJE, q_BTHE.shape[2]).transpose(1, 2),
        attn_mask=visible,
        dropout_p=dropout,
        scale=scale,
    )
    return out_BHTE.transpose(1, 2)
