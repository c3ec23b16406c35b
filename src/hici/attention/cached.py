"""Attention of new tokens over the keys and values that a cache holds for their segment.

Shapes: B batch, T new tokens, X cached keys (slots, tokens of the segment, the new ones), H query heads, J key/value
heads, G = H / J query heads of a key/value head, E head dim. Cached tensors are head-major, as caches hold them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BTHE: Tensor,
    k_BJXE: Tensor,
    v_BJXE: Tensor,
    visible_BTX: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """[B, T, H, E]: query t attends to the keys x with visible[b, t, x] (broadcast over B); None: to all.

    The G heads that share a key/value head stand as rows of one query, so that keys and values are not repeated.
    """
    heads, groups = q_BTHE.shape[2], q_BTHE.shape[2] // k_BJXE.shape[1]
    q_BJTGE = q_BTHE.unflatten(2, (-1, groups)).transpose(1, 2)
    mask = None if visible_BTX is None else visible_BTX.repeat_interleave(groups, dim=1)[:, None]
    out_BJRE = F.scaled_dot_product_attention(
        q_BJTGE.flatten(2, 3), k_BJXE, v_BJXE, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return out_BJRE.unflatten(2, (-1, groups)).transpose(1, 2).reshape(*q_BTHE.shape[:2], heads, -1)
