"""A recipe's keys about data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hici.data.cache import default_cache
from hici.data.prepare import DataOptions, PreparedData, prepare
from hici.processes import one_at_a_time
from hici.train.recipe import Recipe


def prepare_data(recipe: Recipe, tokenizer: Any, vocab_size: int, *, progress: bool = False) -> PreparedData:
    """The recipe's data, tokenised, split and packed (`hici.data.prepare`).

    Of several processes, one after the other: the first one tokenises, and each other one reads the sources again and
    finds their tokens in the cache.
    """
    cache = default_cache() if recipe.token_cache is None else Path(recipe.token_cache).expanduser()
    with one_at_a_time(cache):
        return prepare(data_options(recipe), tokenizer, vocab_size=vocab_size, progress=progress)


def data_options(recipe: Recipe) -> DataOptions:
    """What `prepare` needs of a recipe."""
    return DataOptions(
        sources=recipe.data,
        length=recipe.context_length,
        seed=recipe.seed,
        data_format=recipe.data_format,
        text_key=recipe.text_key,
        packing=recipe.packing,
        prompt=recipe.prompt,
        overlong=recipe.overlong,
        heldout_sources=recipe.heldout_data,
        heldout_fraction=recipe.heldout_fraction,
        heldout_windows=recipe.heldout_windows,
        hub_split=recipe.hub_split,
        hub_config=recipe.hub_config,
        streaming=recipe.streaming,
        max_documents=recipe.max_documents,
        token_cache=recipe.token_cache,
        workers=recipe.data_workers,
    )
