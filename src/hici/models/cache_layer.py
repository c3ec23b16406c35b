"""One layer of a HiCICache: what it keeps, and how a call's tokens go through it.

Shapes: B batch, T new tokens, n tokens of a part, X kept tokens, G segments that end in a call, M and K slots,
P = M + K (those in use), H query heads, J key/value heads, E head dimension, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hici.attention import cached
from hici.config import HiCIConfig
from hici.core.broadcast import next_slots
from hici.core.global_integration import RunningStatistics, no_statistics
from hici.core.local_construction import RunningConstruction
from hici.models.cache_step import Part, Step

USE_DYNAMIC = "transformers.DynamicCache(config=model.config)"
NO_GRADIENTS = (
    "a HiCICache while gradients are recorded: it is written in place and keeps no graph; call the model under "
    "torch.no_grad(), or without a cache (use_cache=False)"
)


@dataclasses.dataclass
class LayerState:
    """What a layer keeps between calls. Batch first.

    Attributes:
        before: real tokens of every row so far.
        columns: tokens with padding so far.
        farthest: real tokens of the longest row that was read with these, which chose the rope.
        keys, values: [B, J, P + X, E]: the visible slots, then the unfinished segment's tokens (space for X of them).
        construction, statistics: see `hici.core`; None where no slots are in use.
    """

    before: list[int]
    columns: int = 0
    farthest: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    construction: RunningConstruction | None = None
    statistics: RunningStatistics | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """The same with every tensor changed."""
        return LayerState(
            list(self.before),
            self.columns,
            self.farthest,
            None if self.keys is None else function(self.keys),
            None if self.values is None else function(self.values),
            None if self.construction is None else RunningConstruction(*map(function, self.construction)),
            None if self.statistics is None else RunningStatistics(*map(function, self.statistics)),
        )

    def copy(self, num_slots: int, segment_size: int) -> LayerState:
        """Of its own tensors, without the space that is kept free."""
        end = num_slots + max((tokens % segment_size for tokens in self.before), default=0)
        keys, values = (None if x is None else x[:, :, :end] for x in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values).map(torch.clone)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        named = {"keys": self.keys, "values": self.values}
        for group in (self.construction, self.statistics):
            named |= {} if group is None else group._asdict()
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclasses.dataclass
class _Call:
    """The work of one call: what the state will be when its attention is done."""

    step: Step
    construction: RunningConstruction | None = None
    statistics: RunningStatistics | None = None
    slot_k_BGPJE: Tensor | None = None
    slot_v_BGPJE: Tensor | None = None


class HiCILayer(CacheLayerMixin):
    """A layer's part of a HiCICache.

    A call goes through it in three places: `construct` (the attention's pre-hook), `update` (the model, before its
    attention), `attend` (the registered attention function).
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots  # P
        self.state = LayerState([])
        self._queries_hMd: Tensor | None = None
        self._call: _Call | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a call began here and did not end."""
        return self._call is not None

    def construct(self, attention: Any, hidden_BTD: Tensor, step: Step) -> None:
        """Add the tokens to the local constructions, and make the slots of the segments that begin.

        Raises:
            ValueError: gradients would be recorded.
        """
        if hidden_BTD.requires_grad and torch.is_grad_enabled():
            raise ValueError(NO_GRADIENTS)
        call = self._call = _Call(step)
        if not self.num_slots:
            return
        finished = self._construct_local(attention.local_constructor, hidden_BTD, call)
        if not finished:
            return
        config: HiCIConfig = attention.hici_config
        before = self.state.statistics or no_statistics(len(step.new), hidden_BTD.shape[2], hidden_BTD.device)
        slots_BGPD, after = next_slots(
            torch.cat(finished, dim=1),
            before,
            attention.global_integrator,
            use_global=config.use_global,
            use_local=config.use_local,
        )
        call.statistics = RunningStatistics(
            *(_of_last_finished(x, old, step) for x, old in zip(after, before, strict=True))
        )
        segments = slots_BGPD.shape[1]
        keys, values = attention.hici_architecture.slot_keys_values(attention, slots_BGPD.flatten(1, 2))
        call.slot_k_BGPJE, call.slot_v_BGPJE = (x.unflatten(1, (segments, -1)) for x in (keys, values))

    def _construct_local(self, constructor: Any, hidden_BTD: Tensor, call: _Call) -> list[Tensor]:
        """Local slots [B, *, M, D] of the segments that end in the call, in order: the head's, those of the rest."""
        step, finished = call.step, []
        if self._queries_hMd is None:
            self._queries_hMd = constructor.queries()
        running = self.state.construction or constructor.start(len(step.new))
        if step.head.length:
            running = self._accumulate(constructor, running, hidden_BTD, step.head)
            if any(step.closes):
                finished.append(constructor.finish(running)[:, None])
                fresh = constructor.start(len(step.new))
                running = RunningConstruction(
                    *(_where_closed(new, old, step) for new, old in zip(fresh, running, strict=True))
                )
        if step.full:
            tokens = step.full * step.segment_size
            segments_BGSD = step.rest.take(hidden_BTD)[:, :tokens].unflatten(1, (step.full, -1))
            real_Bn = step.rest.real(hidden_BTD.device)
            real_BGS = None if real_Bn is None else real_Bn[:, :tokens].unflatten(1, (step.full, -1))
            finished.append(constructor(segments_BGSD, real_BGS))
        if step.tail.length:
            running = self._accumulate(constructor, running, hidden_BTD, step.tail)
        call.construction = running
        return finished

    def _accumulate(
        self, constructor: Any, running: RunningConstruction, hidden_BTD: Tensor, part: Part
    ) -> RunningConstruction:
        return constructor.accumulate(running, part.take(hidden_BTD), part.real(hidden_BTD.device), self._queries_hMd)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Gives the new keys and values back: `attend` keeps what is to be kept.

        Raises:
            ValueError: the attention is another one than "hici"; the model's dtype has changed.
        """
        if self._call is None:
            raise ValueError(
                "a HiCICache in an attention mode other than 'hici': it does not keep the keys of all tokens; pass "
                f"{USE_DYNAMIC}, or call model.set_attn_implementation('hici')"
            )
        kept = self.state.values
        if kept is not None and kept.dtype != value_states.dtype:
            self.abandon()
            raise ValueError(
                f"the HiCICache holds {kept.dtype}, but the model computes in {value_states.dtype}; make a new "
                f"HiCICache, or read on in {kept.dtype}"
            )
        return key_states, value_states

    def attend(
        self, attention: Any, q_BTHE: Tensor, k_BTJE: Tensor, v_BTJE: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        """[B, T, H, E]. The state is then what it is after the call."""
        call = self._call
        assert call is not None  # update
        step, parts = call.step, []
        keys, values = self._reserve(k_BTJE, v_BTJE, step)
        if step.head.length:
            self._write_head(keys, k_BTJE, step)
            self._write_head(values, v_BTJE, step)
            parts.append(self._attend_head(attention, q_BTHE, keys, values, step, scale=scale, dropout=dropout))
        if step.rest.length:
            slot_k = self._slots_of_rest(keys, call.slot_k_BGPJE, step)
            slot_v = self._slots_of_rest(values, call.slot_v_BGPJE, step)
            q, k, v = (step.rest.take(x) for x in (q_BTHE, k_BTJE, v_BTJE))
            size = min(step.segment_size, step.rest.length)
            parts.append(
                attention.hici_attend(q, k, v, slot_k, slot_v, segment_size=size, scale=scale, dropout=dropout)
            )
        self._keep(keys, k_BTJE, call.slot_k_BGPJE, step)
        self._keep(values, v_BTJE, call.slot_v_BGPJE, step)
        self.state = LayerState(
            [old + new for old, new in zip(step.before, step.new, strict=True)],
            self.state.columns + step.length,
            max(self.state.farthest, step.farthest),
            keys,
            values,
            call.construction,
            call.statistics if call.statistics is not None else self.state.statistics,
        )
        self._call = None
        return step.join(parts) if parts else torch.zeros_like(q_BTHE)

    def _reserve(self, k_BTJE: Tensor, v_BTJE: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values with space for what is written: doubled up to a segment.

        Ragged rows have one place more, the last, for what they throw away.
        """
        fixed = self.num_slots + (0 if step.rows is None else 1)
        needed, largest = fixed + max(step.head_end, step.tail.length), fixed + step.segment_size
        return _grown(self.state.keys, k_BTJE, needed, largest), _grown(self.state.values, v_BTJE, needed, largest)

    def _write_head(self, kept_BJXE: Tensor, new_BTJE: Tensor, step: Step) -> None:
        head_BJnE, begin = step.head.take(new_BTJE).transpose(1, 2), self.num_slots
        if step.rows is None:
            begin += step.phase
            kept_BJXE[:, :, begin : begin + step.head.length] = head_BJnE
            return
        # behind a row's own tokens: into places that are written again before they are seen, or into the last
        phase_B1 = step.rows_on(kept_BJXE.device).phase[:, None]
        place_Bn = phase_B1 + begin + _range(step.head.length, kept_BJXE)
        _scatter(kept_BJXE, place_Bn.clamp(max=kept_BJXE.shape[2] - 1), head_BJnE)

    def _attend_head(
        self, attention: Any, q_BTHE: Tensor, keys: Tensor, values: Tensor, step: Step, **options: Any
    ) -> Tensor:
        """Attention of the head's tokens [B, n, H, E] over the slots and the unfinished segment."""
        n, q_BnHE, end = step.head.length, step.head.take(q_BTHE), self.num_slots + step.head_end
        if step.rows is not None:
            rows = step.rows_on(keys.device)
            column_X = _range(end, keys) - self.num_slots
            visible_BnX = column_X <= rows.phase[:, None, None] + _range(n, keys)[:, None]
            visible_BnX &= rows.has_slots[:, None, None] | (column_X >= 0)
            return cached.attend(q_BnHE, keys[:, :, :end], values[:, :, :end], visible_BnX, **options)
        begin = 0 if step.has_slots else self.num_slots
        k_BJXE, v_BJXE = keys[:, :, begin:end], values[:, :, begin:end]
        earlier = end - begin - n
        if n == 1:
            return cached.attend(q_BnHE, k_BJXE, v_BJXE, None, **options)
        if earlier >= n:
            visible_nX = _range(end - begin, keys) <= _range(n, keys)[:, None] + earlier
            return cached.attend(q_BnHE, k_BJXE, v_BJXE, visible_nX[None], **options)
        # all that is seen by every token of the head may stand as its slots: causal kernels need no mask for them
        slots = (x[:, :, :earlier].transpose(1, 2)[:, None] for x in (k_BJXE, v_BJXE))
        head = (x[:, :, earlier:].transpose(1, 2) for x in (k_BJXE, v_BJXE))
        return attention.hici_attend(q_BnHE, *head, *slots, segment_size=n, **options)

    def _slots_of_rest(self, kept_BJXE: Tensor, slots_BGPJE: Tensor | None, step: Step) -> Tensor | None:
        """Slots [B, N', P, J, E] of the last N' segments of the rest (see `hici.attention`)."""
        segments = -(-step.rest.length // step.segment_size)
        if not self.num_slots:
            return None
        if step.head.length:  # the first segment of the rest follows the head's
            assert slots_BGPJE is not None
            return slots_BGPJE[:, :segments].to(kept_BJXE.dtype)
        slots = []
        if step.has_slots:
            slots.append(kept_BJXE[:, :, : self.num_slots].transpose(1, 2)[:, None])
        if segments > 1:
            assert slots_BGPJE is not None
            slots.append(slots_BGPJE[:, : segments - 1].to(kept_BJXE.dtype))
        return torch.cat(slots, dim=1) if slots else None

    def _keep(self, kept_BJXE: Tensor, new_BTJE: Tensor, slots_BGPJE: Tensor | None, step: Step) -> None:
        """Write what the unfinished segment needs: its tokens, and the slots of the last finished one."""
        tail_BJnE, begin = step.tail.take(new_BTJE).transpose(1, 2), self.num_slots
        if step.rows is None:
            kept_BJXE[:, :, begin : begin + step.tail.length] = tail_BJnE
        elif step.tail.length:
            column_n = _range(step.tail.length, kept_BJXE)
            own_Bn = column_n < step.rows_on(kept_BJXE.device).tail[:, None]
            _scatter(kept_BJXE, torch.where(own_Bn, column_n + begin, kept_BJXE.shape[2] - 1), tail_BJnE)
        if slots_BGPJE is not None:
            old_BPJE = kept_BJXE[:, :, :begin].transpose(1, 2)
            last_BPJE = _of_last_finished(slots_BGPJE.to(kept_BJXE.dtype), old_BPJE, step)
            kept_BJXE[:, :, :begin] = last_BPJE.transpose(1, 2)

    def abandon(self) -> None:
        """The call is refused, and nothing has changed here."""
        self._call = None

    def copy(self) -> HiCILayer:
        """One that shares nothing that is written to; interrupted where this one is."""
        copied = HiCILayer(self.num_slots)
        copied.state, copied._call = self.state.map(torch.clone), self._call
        return copied

    # ---- what transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first call makes what it needs."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: that of the new tokens, whatever is kept."""
        return query_length, self.state.columns

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.state.columns

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # the older name

    def reset(self) -> None:
        """Forget everything."""
        self.state, self._queries_hMd, self._call = LayerState([]), None, None

    def select(self, index_B: Tensor, rows: list[int]) -> None:
        """Rows of the batch in another order, more or fewer of them; `rows` is `index_B` on the host."""
        before = self.state.before
        self.state = self.state.map(lambda x: x.index_select(0, index_B.to(x.device)))
        self.state.before = [before[row] for row in rows]


def _grown(kept_BJXE: Tensor | None, new_BTJE: Tensor, needed: int, largest: int) -> Tensor:
    held = 0 if kept_BJXE is None else kept_BJXE.shape[2]
    if kept_BJXE is not None and held >= needed:
        # tensors of inference mode can be written to in that mode only
        outside = kept_BJXE.is_inference() and not torch.is_inference_mode_enabled()
        return kept_BJXE.clone() if outside else kept_BJXE
    b, _, j, e = new_BTJE.shape
    # zeros: what is masked has weight zero, and zero times an uninitialised NaN would come through
    grown = new_BTJE.new_zeros(b, j, max(needed, min(largest, 2 * held)), e)
    if kept_BJXE is not None:
        grown[:, :, :held] = kept_BJXE
    return grown


def _of_last_finished(x_BG: Tensor, old_B: Tensor, step: Step) -> Tensor:
    """Of x [B, G, ...] each row's value at the last segment that it finished in the call; `old` [B, ...] if none."""
    if step.rows is None:
        return x_BG[:, -1].clone()  # a view would keep all G of them
    finished_B = step.rows_on(x_BG.device).finished
    picked_B = x_BG[_range(len(finished_B), x_BG), (finished_B - 1).clamp(min=0)]
    return torch.where(_like(finished_B > 0, old_B), picked_B, old_B)


def _where_closed(a_B: Tensor, b_B: Tensor, step: Step) -> Tensor:
    """`a` for rows whose unfinished segment ends in the call."""
    return a_B if step.rows is None else torch.where(_like(step.rows_on(a_B.device).closes, a_B), a_B, b_B)


def _like(row_B: Tensor, x_B: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to go with x."""
    return row_B.reshape(-1, *[1] * (x_B.dim() - 1))


def _range(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)


def _scatter(kept_BJXE: Tensor, place_Bn: Tensor, new_BJnE: Tensor) -> None:
    """kept[b, :, place[b, i]] = new[b, :, i]."""
    index = place_Bn[:, None, :, None].expand(new_BJnE.shape)
    kept_BJXE.scatter_(2, index, new_BJnE.to(kept_BJXE.dtype))
