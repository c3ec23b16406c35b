"""Architecture numbers of well-known models, one JSON file each: a transformers config, without any weights."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from hici.registry import suggest


def preset_names() -> list[str]:
    """All presets, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load_preset(name: str) -> dict[str, Any]:
    """The fields of the preset's transformers config, `model_type` among them.

    Raises:
        ValueError: no such preset, with the nearest known one.
    """
    known = preset_names()
    if name not in known:
        remedy = "Or give a model's directory, whose config.json says the same."
        raise ValueError(suggest(name, known, "preset", remedy))
    return json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))["config"]
