"""HiCICache: what a HiCI model must keep to go on reading and writing, in memory that does not grow.

For visibility "past" a token needs the slots of its segment and the tokens of its segment, nothing else. Each layer
(`cache_layer`) keeps

* the slot keys and values that are now visible, and the keys and values of the unfinished segment's tokens,
* the local construction of the unfinished segment, as an online softmax,
* the running statistics over the finished segments' local slots.

When a segment fills, its local slots are finished, the statistics and the visible slots move on, and its keys are
dropped. Any split of the input gives what one pass over all of it gives.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hici.config import HiCIConfig
from hici.models.cache_layer import NO_GRADIENTS, USE_DYNAMIC, HiCILayer, LayerState
from hici.models.cache_reader import Reader, check_rope, check_window, fingerprint_of
from hici.models.cache_step import Step, make_step
from hici.models.lookup import attention_modules, get_decoder, hici_config, is_attached


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A HiCICache as it was. Cheap: the cache is small whatever it has read."""

    columns: int
    states: tuple[LayerState, ...]
    lineage: object
    earlier: weakref.WeakSet[Snapshot]  # those on the way to it

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for state in self.states for x in state.tensors().values())


class HiCICache(Cache):
    """The cache for generation in bounded memory, with visibility "past" and a fixed `segment_size`.

    For `model.generate(..., past_key_values=HiCICache(model))` and for calls of the model. Greedy, sampling and beam
    search, batches with padding, any split of the input. Keys and values of all but the unfinished segment are
    dropped; what is folded into slots cannot be taken out again, so `crop` goes back to the beginning or to a
    `snapshot` only.

    Args:
        model: a causal LM with HiCI attached (also below PEFT); not kept alive.
        allow_beyond_rope: read more tokens than the model's rope settings represent. Inside of segments distances stay
            small, but slots are compared with positions that were never seen.

    Raises:
        ValueError: nothing attached; visibility "all" or "current", whose tokens see more than the past; no fixed
            `segment_size`; decode="raw".
    """

    layers: list[HiCILayer]

    def __init__(self, model: Any, *, allow_beyond_rope: bool = False) -> None:
        if not is_attached(model):
            raise ValueError(
                "a HiCICache for a model without HiCI modules; call hici.attach(model, HiCIConfig(...)) first, or pass "
                + USE_DYNAMIC
            )
        self.config = hici_config(model)
        check_bounded(self.config)
        self.allow_beyond_rope = allow_beyond_rope
        self.step: Step | None = None  # of the call that goes on
        self._begun = 0  # columns before it
        self._same_config = self.config
        self._reader = Reader(get_decoder(model))
        self._lineage = object()  # of this cache and its copies
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        super().__init__(layers=[HiCILayer(self.config.slots_in_use) for _ in attention_modules(model)])

    # ---- what it holds

    @property
    def tokens(self) -> list[int]:
        """Real tokens of every row so far; empty before the first call."""
        return list(self.layers[0].state.before)

    @property
    def segment_size(self) -> int:
        """S."""
        assert self.config.segment_size is not None  # check_bounded
        return self.config.segment_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for layer in self.layers for x in layer.state.tensors().values())

    def __repr__(self) -> str:
        return f"HiCICache(tokens={self.tokens}, segment_size={self.config.segment_size}, nbytes={self.nbytes})"

    # ---- calls of the model

    def begin(self, decoder: Any, tokens: Tensor, mask_BX: Tensor | None) -> Tensor | None:
        """Before a call with `tokens` [B, T, ...]: check it, and plan it for all layers.

        Args:
            mask_BX: real tokens, of those so far and the new ones together; None: all new ones are real.

        Returns:
            Positions [B, T] of the new tokens; None where they count on from the columns so far.

        Raises:
            ValueError: another model or config than the cache was made for; gradients would be recorded; rows or mask
                that do not go with what it holds; more tokens than the rope represents; an earlier call that stopped
                in its middle.
        """
        before, new, real_BT = self.check(decoder, tokens, mask_BX)
        length, columns = tokens.shape[1], self.get_seq_length()
        self.step = make_step(before, new, length, self.segment_size, real_BT, tokens.device)
        self._begun = columns
        if real_BT is None and all(old == columns for old in before):
            return None
        first_B1 = torch.tensor(before, device=tokens.device)[:, None]
        if real_BT is None:
            return first_B1 + torch.arange(length, device=tokens.device)
        return first_B1 + (real_BT.to(tokens.device).long().cumsum(1) - 1).clamp(min=0)

    def end(self) -> None:
        """Behind a call: it has gone through the whole decoder."""
        self.step = None

    def check(self, decoder: Any, tokens: Tensor, mask_BX: Tensor | None) -> tuple[list[int], list[int], Tensor | None]:
        """The refusals of `begin`. Returns real tokens of every row so far, those in the call, and which: [B, T]."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (tokens, *decoder.parameters())):
            raise ValueError(NO_GRADIENTS)
        if decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers):
            raise ValueError(
                "a HiCICache with gradient checkpointing in training mode, in which transformers drops caches; call "
                "model.eval() before generating"
            )
        if not self.tokens:
            self._reader.renew()
        self._reader.check(decoder)
        self._check_config(hici_config(decoder))
        self._check_whole()
        batch, length = tokens.shape[:2]
        before = self.tokens or [0] * batch
        if len(before) != batch:
            raise ValueError(
                f"the HiCICache holds {len(before)} rows, but the input has {batch}; give as many, or change the cache "
                f"with batch_repeat_interleave or batch_select_indices (for beams: before generate)"
            )
        new, real_BT = [length] * batch, None
        if mask_BX is not None:
            new, real_BT = self._new_mask(mask_BX, before, length)
        total = max(old + more for old, more in zip(before, new, strict=True))
        check_rope(decoder.config, self.layers[0].state.farthest, total, beyond=self.allow_beyond_rope)
        self._check_windows(decoder, total)
        return before, new, real_BT

    def _new_mask(self, mask_BX: Tensor, before: list[int], length: int) -> tuple[list[int], Tensor | None]:
        """Real tokens of every row among the new ones, and which they are: [B, T]; None: all."""
        columns = self.get_seq_length()
        counts = torch.stack((mask_BX[:, :columns].long().sum(1), mask_BX[:, columns:].long().sum(1))).tolist()
        for row, (said, held) in enumerate(zip(counts[0], before, strict=True)):
            if said != held:
                raise ValueError(
                    f"attention_mask has {said} real tokens of row {row} before the new ones, but the HiCICache has "
                    f"read {held}; give the mask that the tokens were read with, and the new tokens' behind it"
                )
        return counts[1], None if min(counts[1]) == length else mask_BX[:, columns:].to(torch.bool)

    def _check_windows(self, decoder: Any, farthest: int) -> None:
        """Here, before any layer has changed; the attention function looks again in calls without a cache."""
        for attention in attention_modules(decoder):
            own = hasattr(attention, "sliding_window")
            window = attention.sliding_window if own else getattr(decoder.config, "sliding_window", None)
            check_window(window, min(self.segment_size, farthest))

    def _check_config(self, now: HiCIConfig) -> None:
        if now is self._same_config:
            return
        ours, theirs = self.config.to_dict(), now.to_dict()
        for name in ours:
            if name not in ("backend", "num_segments") and ours[name] != theirs[name]:  # segment_size says it
                raise ValueError(
                    f"the HiCICache was made for {name}={ours[name]!r}, but the model now has {theirs[name]!r}; make a "
                    "new HiCICache, or reconfigure the model back"
                )
        self._same_config = now

    def _check_whole(self) -> None:
        columns = {layer.state.columns for layer in self.layers}
        # a call that has begun and not ended may have failed before the layers (nothing has changed) or behind them
        behind = self.step is not None and columns != {self._begun}
        if behind or len(columns) > 1 or any(layer.interrupted for layer in self.layers):
            raise ValueError(
                "the last call with this HiCICache stopped in its middle, so its layers hold different tokens; call "
                "its restore(snapshot) or reset(), or make a new one"
            )

    # ---- going back

    def snapshot(self) -> Snapshot:
        """The cache as it is now, to `restore` it later: questions about one document, a turn that is taken back."""
        self._check_whole()
        states = tuple(layer.state.copy(layer.num_slots, self.segment_size) for layer in self.layers)
        snapshot = Snapshot(self.get_seq_length(), states, self._lineage, weakref.WeakSet(self._snapshots))
        self._snapshots.add(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, or of one that this is a copy of. It can be used again and again.

        Raises:
            ValueError: a snapshot of another model's cache, or with other slots.
        """
        slots = [layer.num_slots for layer in self.layers]
        if snapshot.lineage is not self._lineage or len(snapshot.states) != len(slots):
            raise ValueError("the snapshot is of another HiCICache; restore the cache that made it")
        for layer, state in zip(self.layers, snapshot.states, strict=True):
            layer.reset()
            layer.state = state.map(torch.clone)
        self.step = None
        # others, later or of another continuation, hold what is not read now
        self._snapshots = weakref.WeakSet([*snapshot.earlier, snapshot])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.step = None
        self._snapshots = weakref.WeakSet()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens out again (a number <= 0, as in transformers): all of them, or back to a snapshot.

        Raises:
            ValueError: any other place.
        """
        columns = self.get_seq_length()
        if tokens_to_remove > 0 or -tokens_to_remove > columns:
            raise ValueError(f"crop({tokens_to_remove}) of a HiCICache with {columns} tokens; give a number from "
                             f"{-columns} to 0")  # fmt: skip
        if tokens_to_remove == 0:
            return
        target = columns + tokens_to_remove
        kept = next((x for x in self._snapshots if x.columns == target), None)
        if target == 0:
            self.reset()
        elif kept is not None:
            self.restore(kept)
        else:
            raise ValueError(
                f"crop({tokens_to_remove}) of a HiCICache: tokens that are folded into slots cannot be taken out; take "
                f"a snapshot() at token {target} while it is there, or reset() and read them again"
            )

    # ---- rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order (beam search)."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows only."""
        self._select(torch.arange(len(self.tokens))[indices.cpu()])

    def _select(self, index_B: Tensor) -> None:
        before = self.tokens
        if not before:
            return
        alike = len(set(before)) == 1  # then the rows need not be known here, and nothing waits for the device
        rows = [0] * len(index_B) if alike else index_B.tolist()
        for layer in self.layers:
            layer.select(index_B, rows)
        self._snapshots = weakref.WeakSet()

    # ---- files

    def save(self, path: str | Path, *, about: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
        """Write it to a file; see `hici.models.cache_file.save`."""
        from hici.models.cache_file import save

        return save(self, path, about=about, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, model: Any, *, allow_beyond_rope: bool = False) -> HiCICache:
        """Read it from a file, for the model that it was made with; see `hici.models.cache_file.load`."""
        from hici.models.cache_file import load

        return load(cls(model, allow_beyond_rope=allow_beyond_rope), path)

    def model_fingerprint(self) -> str:
        """Of the model that it was made for."""
        return fingerprint_of(self._reader.decoder())

    def placements(self) -> list[tuple[torch.device, torch.dtype]]:
        """Device and dtype of every layer of that model."""
        slots = [attention.local_constructor.memory_slots for attention in attention_modules(self._reader.decoder())]
        return [(x.device, x.dtype) for x in slots]

    def __deepcopy__(self, memo: dict[int, Any]) -> HiCICache:
        copied = copy.copy(self)  # config and step never change
        memo[id(self)] = copied
        copied._reader = self._reader.copy()
        copied.layers = [layer.copy() for layer in self.layers]
        copied._snapshots = weakref.WeakSet(self._snapshots)
        return copied


def check_bounded(config: HiCIConfig) -> None:
    """Raise ValueError when a config does not allow generation in bounded memory."""
    remedy = f"pass {USE_DYNAMIC} for the published decode over raw keys (decode='raw' in the config, --decode raw)"
    if config.visibility != "past":
        raise ValueError(
            f"visibility={config.visibility!r} with a HiCICache: tokens of a segment see a summary of what comes after "
            f"them, so they cannot be read one after another; call hici.reconfigure(model, visibility='past') if the "
            f"model was trained so, or {remedy}"
        )
    if config.segment_size is None:
        raise ValueError(
            f"num_segments={config.num_segments} with a HiCICache: the segments would change with every token; call "
            f"hici.reconfigure(model, segment_size=S) with the segments' length in training (--segment-size S), or "
            + remedy
        )
    if config.decode != "auto":
        raise ValueError(
            f"decode={config.decode!r} with a HiCICache, which decodes from slots; call "
            f"hici.reconfigure(model, decode='auto'), or {remedy}"
        )
