"""Loading a plain causal LM of transformers, completely; its shape alone; and how its files name its weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hici.models.architectures.base import is_hici_name


def load_plain_model(
    name: str,
    dtype: Any = None,
    device_map: Any = None,
    quantization_config: Any = None,
    *,
    drop_modules: bool = False,
) -> Any:
    """A complete causal LM of transformers in eval mode.

    `drop_modules`: HiCI modules in its files are left out (others are to come in their place).

    Raises:
        ValueError: it cannot be loaded; weights are missing or damaged; it holds HiCI weights, which would be dropped;
            the library for `quantization_config` is not installed.
    """
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    with read_errors(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype or "auto",
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are errors, but ours
            **options,
        )
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights or has them in another shape ({', '.join(sorted(missing)[:4])}); "
            "they would be random: give complete weights"
        )
    if not drop_modules and any(is_hici_name(key) for key in info["unexpected_keys"]):
        raise ValueError(
            f"{name} holds HiCI modules inside a plain checkpoint, which would be dropped; load it with "
            "hici.from_pretrained, or give the plain base model"
        )
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def read_errors(name: Any) -> Iterator[None]:
    """Context: what transformers raises over a model's files becomes a ValueError that names the model."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{name} could not be loaded ({first_line(error)}); install what it asks for") from error
    except OSError as error:
        raise ValueError(
            f"no model {str(name)!r} ({first_line(error)}); give a directory with config.json and weights, or a hub "
            "name that this machine can reach"
        ) from error
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError, EOFError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            raise
        raise ValueError(
            f"the files of {name} could not be read ({type(error).__name__}: {first_line(error)}); they may be "
            "damaged, or a failed download: copy them again"
        ) from error


def load_config(name: str) -> Any:
    """The transformers config of a directory or hub name. Raises ValueError when there is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
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


def name_translator(model: Any) -> Callable[[str], str]:
    """transformers' own translation of names in files that are older than the model's class."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, converters)[0]


def tokenizer_size(directory: str | Path) -> int:
    """Entries of the tokenizer in a directory. Raises ValueError when its files cannot be read."""
    try:
        return len(AutoTokenizer.from_pretrained(str(directory)))
    except Exception as error:
        raise ValueError(f"its files cannot be read ({first_line(error)}); copy them again") from error


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name; None for None and "auto". Raises ValueError for what no model computes in."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype of a model; give float32, bfloat16 or float16")
    return found


def stable_name(name: str | Path) -> str:
    """A local model by its absolute path, so that it is found from any working directory; a hub name as it is."""
    return str(Path(name).resolve()) if str(name) and Path(name).is_dir() else str(name)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
