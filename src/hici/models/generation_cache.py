"""Which cache a model with HiCI generates with when its caller gives none."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
import transformers

from hici.models.cache import HiCICache
from hici.models.cache_reader import check_rope
from hici.models.lookup import HICI, MODES, get_decoder, hici_config
from hici.models.refusals import check_cache, check_cache_implementation

logger = logging.getLogger(__name__)

# pieces of a prefill begin at position 0 there, whatever is cached
OLD_PREFILL = [int(x) for x in transformers.__version__.split(".")[:2]] < [5, 21]

PREPARE = "_prepare_cache_for_generation"  # what transformers' `generate` calls; `attach` puts a CacheChoice there


class CacheChoice:
    """Stands on one model in place of its `_prepare_cache_for_generation`; in other modes it changes nothing.

    In mode "hici" with visibility "past" (and decode "auto") the model gets a HiCICache unless a cache is given or
    asked for by name; else the cache of transformers, over whose raw keys it then decodes.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # else each would keep the other, and its memory, until a garbage collection

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy (deepcopy, torch.save) is of the copied model."""
        return CacheChoice, (self.model,)

    @property
    def model(self) -> Any:
        """The one that it stands on."""
        model = self._model()
        if model is None:
            raise ValueError("the model that HiCI was attached to is gone, and this is a shallow copy of it; use "
                             "copy.deepcopy for a model of its own")  # fmt: skip
        return model

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *rest: Any) -> Any:
        """As in transformers: puts a cache into `model_kwargs`.

        Raises:
            ValueError: what the mode cannot do: assisted decoding, static and quantised caches, a row of padding only,
                a prefill in pieces over raw keys; no fixed segment_size; more tokens than the rope represents.
        """
        mode = self.model.config._attn_implementation
        if mode in MODES:
            self._check(mode, generation_config, model_kwargs, str(getattr(generation_mode, "value", generation_mode)))
            chosen = self._choose(mode, generation_config, model_kwargs)
            if chosen is not None:
                model_kwargs["past_key_values"] = chosen
                return None
        return getattr(type(self.model), PREPARE)(self.model, generation_config, model_kwargs, generation_mode, *rest)

    def _check(self, mode: str, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: str) -> None:
        if generation_mode == "assisted_generation" or generation_config.is_assistant:
            raise ValueError(
                f"assisted decoding in attention mode {mode!r}: rejected tokens cannot be taken out of slots again; "
                "leave out assistant_model and prompt_lookup_num_tokens, or call model.set_attn_implementation('sdpa')"
            )
        check_cache_implementation(mode, generation_config.cache_implementation)
        given = model_kwargs.get("past_key_values")
        check_cache(mode, given)
        if generation_config.use_cache is None:
            raise ValueError(f"use_cache=None in attention mode {mode!r}: with a cache or without? give True or False")
        if isinstance(given, HiCICache) and not generation_config.use_cache:
            raise ValueError(
                f"use_cache={generation_config.use_cache} with a HiCICache: every step would read all tokens again "
                "behind those that it holds; drop one of the two"
            )
        filled = given is not None and given.get_seq_length() > 0
        if filled and generation_config.prefill_chunk_size is not None and OLD_PREFILL:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} with a filled cache, which transformers "
                f"{transformers.__version__} does not count; read the new tokens with hici.prefill, or use "
                "transformers >= 5.21"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] and not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"row {row} of the prompt is empty (padding only); leave it out, or give it a token")

    def _choose(self, mode: str, generation_config: Any, model_kwargs: dict[str, Any]) -> HiCICache | None:
        given = model_kwargs.get("past_key_values")
        if isinstance(given, HiCICache) or not generation_config.use_cache:
            return None
        if given is None and generation_config.cache_implementation is None and _is_bounded(mode, self.model):
            cache = HiCICache(self.model)
            self._check_length(generation_config, model_kwargs.get("position_ids"))
            _tell(self.model)
            return cache
        filled = given is not None and given.get_seq_length() > 0  # then no piece gets slots, nor would the whole
        if generation_config.prefill_chunk_size is not None and not filled:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} with decode over raw keys: only the first "
                "piece of the prompt would get slots; leave it out, or use visibility 'past' with a HiCICache"
            )
        return None

    def _check_length(self, generation_config: Any, position_ids: torch.Tensor | None) -> None:
        """Before any work: whether the prompt, and the tokens asked for behind it, have positions.

        A limit in the model's own settings (`max_length`) asks for nothing: most texts end before it.
        """
        if position_ids is not None and position_ids.numel():
            asked = generation_config.max_new_tokens or 1
            # the last token is not read
            check_rope(self.model.config, 0, int(position_ids.max()) + asked, beyond=False)


def cache_of_call(decoder: Any, mode: str, use_cache: bool | None) -> HiCICache | None:
    """For a call of the model itself that asks for a cache by use_cache=True: what it can go on with as it began."""
    if use_cache is not True or torch.is_grad_enabled() or not _is_bounded(mode, decoder):
        return None
    if hici_config(decoder).segment_size is None:  # the call itself needs none; going on is told to be over raw keys
        return None
    return _new_cache(decoder)


@torch.compiler.disable
def _new_cache(decoder: Any) -> HiCICache:
    _tell(decoder)
    return HiCICache(decoder)


def _is_bounded(mode: str, model: Any) -> bool:
    return mode == HICI and hici_config(model).bounded_decode


def _tell(model: Any) -> None:
    """Once a model."""
    attached = get_decoder(model).hici_attached
    if not attached.told_bounded:
        attached.told_bounded = True
        logger.info(
            "generation in bounded memory: a HiCICache (segments of %s tokens and their slots); for the published "
            "decode over raw keys: hici.reconfigure(model, decode='raw')",
            hici_config(model).segment_size,
        )
