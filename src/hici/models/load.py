"""Loading a plain causal LM of transformers, completely."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from hici.models.architectures.base import is_hici_name


def load_plain_model(name: str, dtype: Any = None, device_map: Any = None) -> Any:
    """A complete causal LM of transformers in eval mode.

    Raises:
        ValueError: it cannot be loaded; weights are missing; it holds HiCI weights, which would be dropped.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", device_map=device_map, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(
            f"no model {name!r} ({first_line(error)}); give a directory with config.json and "
            "weights, or a hub name that this machine can reach"
        ) from error
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights or has them in another shape ({', '.join(sorted(missing)[:4])}); "
            "they would be random: give complete weights"
        )
    if any(is_hici_name(key) for key in info["unexpected_keys"]):
        raise ValueError(
            f"{name} holds HiCI modules inside a plain checkpoint, which would be dropped; give the directory that "
            "hici.save_pretrained wrote"
        )
    return model.requires_grad_(False).eval()


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
