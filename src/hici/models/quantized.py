"""A base whose frozen weights are held in 8 or 4 bits (bitsandbytes), to be trained with LoRA on top (QLoRA).

Quantised are the linear layers of the decoder. Embeddings, norms and the output layer stay whole, and what is made
afterwards (HiCI modules, LoRA) has `dtype`: `hici train` keeps all that trains in float32. Saving such a model writes
what was trained and nothing of the base, as always; the directory loads on the quantised base and on the whole one,
whose weights differ by the rounding: losses do too.
"""

from __future__ import annotations

from typing import Any

import torch

from hici.models.load import load_config, load_plain_model
from hici.registry import suggest

NONE = "none"
QUANTIZATIONS = (NONE, "8bit", "4bit")


def load_quantized(name: str, quantization: str, *, dtype: torch.dtype, device_map: Any = None) -> Any:
    """A complete causal LM in eval mode, as `load_plain_model`, its linear layers quantised.

    Args:
        quantization: "none"; "8bit" (LLM.int8: int8 with outlier columns in `dtype`); "4bit" (NF4, its scales quantised
            again, products in `dtype`).
        dtype: of all that is not quantised.

    Raises:
        ValueError: an unknown quantization; bitsandbytes is not installed; the base is quantised already; all that
            `load_plain_model` refuses.
    """
    return load_plain_model(name, dtype, device_map, quantization_config(name, quantization, dtype))


def quantization_config(name: str, quantization: str, dtype: torch.dtype) -> Any:
    """transformers' BitsAndBytesConfig of that base; None for "none". Raises ValueError as `load_quantized`."""
    if quantization not in QUANTIZATIONS:
        raise ValueError(suggest(quantization, QUANTIZATIONS, "quantization"))
    if quantization == NONE:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"quantization={quantization!r} needs bitsandbytes ({error}); pip install 'hici[quantization]', or give "
            "'none'"
        ) from error
    own = getattr(load_config(name), "quantization_config", None)
    if own is not None:
        method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
        raise ValueError(
            f"quantization={quantization!r}, but the weights of {name} are quantised already ({method}); give 'none' "
            "(they stay as they are), or the model that they were made of"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
