"""One small file an architecture; a module of this package with an `ARCHITECTURE` is supported."""

from __future__ import annotations

from hici.models.architectures.base import Architecture
from hici.registry import entries, suggest


def architectures() -> dict[str, Architecture]:
    """All supported architectures by transformers' `config.model_type`."""
    return {model_type: entry for entry in entries(__name__, "ARCHITECTURE") for model_type in entry.model_types}


def get_architecture(model_type: str) -> Architecture:
    """The architecture of that model type.

    Raises:
        ValueError: no file for it; names the supported types, the nearest one, and what to add.
    """
    known = architectures()
    if model_type not in known:
        remedy = "Use a model of a known type, or add a file to hici/models/architectures."
        raise ValueError(suggest(model_type, known, "model type", remedy))
    return known[model_type]
