"""Loading a plain causal LM of transformers, completely; and its shape alone, without any weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hici.models.architectures.base import is_hici_name


def load_plain_model(name: str, dtype: Any = None, device_map: Any = None, quantization_config: Any = None) -> Any:
    """A complete causal LM of transformers in eval mode.

    Raises:
        ValueError: it cannot be loaded; weights are missing; it holds HiCI weights, which would be dropped; the
            library for `quantization_config` is not installed.
    """
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", device_map=device_map, output_loading_info=True, **options
        )
    except ImportError as error:
        raise ValueError(f"{name} could not be loaded ({first_line(error)}); install what it asks for") from error
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
            f"{name} holds HiCI modules inside a plain checkpoint, which would be dropped; load it with "
            "hici.from_pretrained, or give the plain base model"
        )
    return model.requires_grad_(False).eval()


def load_config(name: str) -> Any:
    """The transformers config of a directory or hub name. Raises ValueError when there is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no config of {name!r} ({first_line(error)}); give a directory with config.json, or a hub name that this "
            "machine can reach"
        ) from error


def meta_model(model_config: Any) -> Any:
    """The plain causal LM of a transformers config on the meta device: names and shapes, no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
    model.config.name_or_path = model_config.name_or_path
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
