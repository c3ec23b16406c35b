"""Growing a vocabulary by the published rule: a new row is the mean of the old ones, in the output layer too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hici.models.fingerprint import base_fingerprint
from hici.models.lookup import get_causal_lm, get_decoder, is_attached, is_peft


def vocabulary_size(model: Any) -> int:
    """Rows of the input embeddings."""
    return int(get_causal_lm(model).get_input_embeddings().weight.shape[0])


def grow_vocabulary(model: Any, size: int) -> Any:
    """Give the embeddings and the output layer of a plain causal LM `size` rows, in place.

    New rows are the mean of the old ones, as the published training makes them. What the base was before is
    remembered, so that an adapter saved later still knows its base.

    Raises:
        ValueError: fewer rows than there are; a PEFT model, or one with HiCI attached (both come after it).
    """
    if is_peft(model) or hasattr(model, "peft_config") or is_attached(model):
        raise ValueError("the vocabulary grows first, then comes hici.attach, then PEFT; give the plain base model")
    return grow_rows(model, size)


@torch.no_grad()
def grow_rows(model: Any, size: int) -> Any:
    """`grow_vocabulary`, also on an attached model (whose base must then be remembered anew)."""
    rows = vocabulary_size(model)
    if size < rows:
        raise ValueError(f"a vocabulary of {size} entries for a model with {rows}: entries would be lost; give the "
                         "base that the adapter was made on")  # fmt: skip
    if size == rows:
        return model
    decoder = get_decoder(model)
    if not hasattr(decoder, "hici_base_fingerprint"):
        decoder.hici_base_fingerprint = base_fingerprint(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight
    _grow(embeddings, size)
    if tied:
        model.tie_weights()
        if head is not None:
            _set_rows(head, size)
    else:
        _grow(head, size)
    _tell_size(model, size)
    return model


def shrink_vocabulary(model: Any, weights: list[tuple[nn.Module, nn.Parameter]]) -> None:
    """Undo `grow_vocabulary` with what `vocabulary_weights` gave before it."""
    for module, weight in weights:
        module.weight = weight
        _set_rows(module, weight.shape[0])
    _tell_size(model, weights[0][1].shape[0])
    decoder = get_decoder(model)
    if hasattr(decoder, "hici_base_fingerprint"):
        del decoder.hici_base_fingerprint


def vocabulary_weights(model: Any) -> list[tuple[nn.Module, nn.Parameter]]:
    """The modules that have a row for every entry, and their weights."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [(module, module.weight) for module in modules if module is not None]


@torch.no_grad()
def grown_rows(weight: Tensor, size: int) -> Tensor:
    """`weight` [rows, D] with new rows up to `size`: the mean of the old ones, in their own dtype, as published."""
    mean = weight.mean(dim=0, keepdim=True).expand(size - weight.shape[0], -1)
    return torch.cat([weight, mean])


def _grow(module: Any, size: int) -> None:
    old = module.weight
    if getattr(module, "bias", None) is not None:
        raise ValueError("the output layer has a bias, for which the published rule has no new entries; resize the "
                         "base's vocabulary first (model.resize_token_embeddings) and save it")  # fmt: skip
    module.weight = nn.Parameter(grown_rows(old, size), requires_grad=old.requires_grad)
    _set_rows(module, size)


def _set_rows(module: Any, size: int) -> None:
    name = "num_embeddings" if hasattr(module, "num_embeddings") else "out_features"
    setattr(module, name, size)


def _tell_size(model: Any, size: int) -> None:
    for config in {id(c): c for c in (model.config, get_decoder(model).config)}.values():
        config.vocab_size = size
    for module in (model, get_decoder(model)):
        if hasattr(module, "vocab_size"):
            module.vocab_size = size
