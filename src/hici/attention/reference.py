"""The specification: a plain loop over segments in float32, the oracle of every other backend.

Shapes: B batch, T tokens, N segments, S tokens in a segment, R queries in a row of them, P slots, X = P + S keys of a
segment, H query heads, J key/value heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hici.attention import Backend

_WEIGHTS_AT_A_TIME = 2**22  # of `shares`: 16 MiB in float32


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
    outputs = []
    for tokens, row in _segments(q_BTHE.shape[1], segment_size, slot_k_BNPJE):
        k_BXJE, v_BXJE = _seen(k_BTJE, slot_k_BNPJE, tokens, row), _seen(v_BTJE, slot_v_BNPJE, tokens, row)
        weights_BHSX = _weights(q_BTHE[:, tokens], k_BXJE, scale)
        v_BXHE = v_BXJE.repeat_interleave(q_BTHE.shape[2] // v_BXJE.shape[2], dim=2)
        outputs.append(torch.einsum("bhsx,bxhe->bshe", F.dropout(weights_BHSX, dropout), v_BXHE))
    return torch.cat(outputs, dim=1).to(q_BTHE.dtype)


class Shares(NamedTuple):
    """Where the attention of each segment's queries goes: mean weights over them, float64, on the CPU.

    Attributes:
        slots_BNHP: each slot's weight; 0 in segments without slots (P is 0 when there are none at all).
        tokens_BNH: what the tokens of the segment get together; with the slots it is 1.
        first_token_BNH: the part of it that the segment's first token gets.
    """

    slots_BNHP: Tensor
    tokens_BNH: Tensor
    first_token_BNH: Tensor


@torch.no_grad()
def shares(
    q_BTHE: Tensor,
    k_BTJE: Tensor,
    slot_k_BNPJE: Tensor | None,
    *,
    segment_size: int,
    scale: float,
    at_a_time: int = _WEIGHTS_AT_A_TIME,
) -> Shares:
    """Shares of the weights that `attend` computes.

    At most `at_a_time` weights are held, or those of one query of each head where these are more.
    """
    batch, length, heads, _ = q_BTHE.shape
    num_slots = 0 if slot_k_BNPJE is None else slot_k_BNPJE.shape[2]
    found = []
    for tokens, row in _segments(length, segment_size, slot_k_BNPJE):
        k_BXJE = _seen(k_BTJE, slot_k_BNPJE, tokens, row)
        size, in_front = tokens.stop - tokens.start, num_slots if row is not None else 0
        sums_BHX = torch.zeros(batch, heads, num_slots + 2, dtype=torch.float64)  # slots, all tokens, the first one
        step = max(1, at_a_time // (batch * heads * k_BXJE.shape[1]))
        for first in range(0, size, step):
            last = min(first + step, size)
            q_BRHE = q_BTHE[:, tokens.start + first : tokens.start + last]
            weights_BHRX = _weights(q_BRHE, k_BXJE[:, : in_front + last], scale)  # no query sees the keys behind
            sums_BHX[..., :in_front] += _summed(weights_BHRX[..., :in_front])
            sums_BHX[..., -2] += _summed(weights_BHRX[..., in_front:].sum(-1, keepdim=True))[..., 0]
            sums_BHX[..., -1] += _summed(weights_BHRX[..., in_front : in_front + 1])[..., 0]
        found.append(sums_BHX / size)
    shares_BNHX = torch.stack(found, dim=1)
    return Shares(shares_BNHX[..., :-2], shares_BNHX[..., -2], shares_BNHX[..., -1])


def _segments(length: int, segment_size: int, slots_BNPJE: Tensor | None) -> Iterator[tuple[slice, int | None]]:
    """(its tokens, the row of its slots) of each segment; None: it has none. The last N' segments have slots."""
    starts = range(0, length, segment_size)
    without_slots = len(starts) - (0 if slots_BNPJE is None else slots_BNPJE.shape[1])
    for i, start in enumerate(starts):
        yield slice(start, min(start + segment_size, length)), i - without_slots if i >= without_slots else None


def _seen(x_BTJE: Tensor, slots_BNPJE: Tensor | None, tokens: slice, row: int | None) -> Tensor:
    """Keys or values of one segment in float32, slots in front: [B, X, J, E]."""
    x_BSJE = x_BTJE[:, tokens].float()
    return x_BSJE if slots_BNPJE is None or row is None else torch.cat((slots_BNPJE[:, row].float(), x_BSJE), dim=1)


def _weights(q_BRHE: Tensor, k_BXJE: Tensor, scale: float) -> Tensor:
    """[B, H, R, X] in float32: the last query sees all keys, each one before it one key less."""
    k_BXHE = k_BXJE.repeat_interleave(q_BRHE.shape[2] // k_BXJE.shape[2], dim=2)
    scores_BHRX = torch.einsum("brhe,bxhe->bhrx", q_BRHE.float(), k_BXHE) * scale
    queries, keys = scores_BHRX.shape[-2:]
    visible_RX = torch.ones(queries, keys, dtype=torch.bool, device=q_BRHE.device).tril(keys - queries)
    return scores_BHRX.masked_fill(~visible_RX, -torch.inf).softmax(-1)


def _summed(weights_BHRX: Tensor) -> Tensor:
    """Over the queries, in float64 (on the CPU: not every device has it)."""
    return weights_BHRX.sum(-2).cpu().double()


BACKEND = Backend(name="reference", attend=attend, absorbed=False, priority=0)
