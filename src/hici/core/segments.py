"""Cutting a batch into segments, with a ragged tail and with padding on either side.

Shapes: B batch, T tokens, N segments, S tokens in a segment, D width.

Segments are counted over real tokens: rows with padding are first compacted (real tokens to the left, in order), so
that padding on either side, or holes, move no segment border. After that every row is right-padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def count_segments(length: int, segment_size: int) -> int:
    """N = ceil(T / S)."""
    return -(-length // segment_size)


def to_segments(hidden_BTD: Tensor, segment_size: int) -> Tensor:
    """[B, T, D] -> [B, N, S, D]; a short last segment is filled with zeros (a view when T is a multiple of S)."""
    length = hidden_BTD.shape[1]
    n = count_segments(length, segment_size)
    if n * segment_size != length:
        hidden_BTD = F.pad(hidden_BTD, (0, 0, 0, n * segment_size - length))
    return hidden_BTD.unflatten(1, (n, segment_size))


def real_first(mask_BT: Tensor) -> Tensor:
    """The order [B, T] (int64) that puts each row's real tokens first, keeping their order; padding follows."""
    real = mask_BT.long()
    n_real = real.sum(1, keepdim=True)
    destination = torch.where(mask_BT, real.cumsum(1) - 1, n_real + (1 - real).cumsum(1) - 1)
    source = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(destination)
    return torch.empty_like(destination).scatter(1, destination, source)


def take_tokens(x_BT: Tensor, order_BU: Tensor) -> Tensor:
    """Tokens of x [B, T, ...] in the given order: out[b, u] = x[b, order[b, u]]."""
    index = order_BU.reshape(order_BU.shape + (1,) * (x_BT.dim() - 2)).expand(*order_BU.shape, *x_BT.shape[2:])
    return x_BT.gather(1, index)


def put_tokens(x_BT: Tensor, order_BT: Tensor) -> Tensor:
    """The inverse of `take_tokens`: out[b, order[b, t]] = x[b, t]."""
    index = order_BT.reshape(order_BT.shape + (1,) * (x_BT.dim() - 2)).expand_as(x_BT)
    return torch.empty_like(x_BT).scatter(1, index, x_BT)


def real_positions(n_real_B1: Tensor | int, n: int, segment_size: int, device: torch.device) -> Tensor:
    """Which positions of compacted segments hold real tokens: bool [B or 1, N, S]."""
    position = torch.arange(n * segment_size, device=device)
    return (position < n_real_B1).reshape(-1, n, segment_size)
