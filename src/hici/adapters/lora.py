"""LoRA on the attention's own projections, with embeddings, norms and HiCI modules trained beside it."""

from __future__ import annotations

from typing import Any

from hici.models.architectures import get_architecture
from hici.models.architectures.base import is_hici_name
from hici.models.lookup import is_attached, is_peft


def add_lora(
    model: Any,
    *,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    embeddings: bool = True,
    norms: bool = True,
) -> Any:
    """Wrap an attached model in PEFT: LoRA on the projections of the attention (never inside the HiCI modules).

    Embeddings and norms train as PEFT's `modules_to_save`; tied embeddings stay tied. HiCI modules train as plain
    modules: PEFT neither wraps nor copies them. All other weights are frozen. New parameters have the base's dtype.

    Args:
        model: a causal LM after `hici.attach`.
        r, alpha, dropout: LoRA's rank, scale (alpha / r) and dropout.
        embeddings, norms: train them too.

    Returns:
        The PeftModel around the same model.

    Raises:
        ValueError: nothing is attached, or the model is a PEFT model already; tied embeddings that PEFT would untie.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import EMBEDDING_LAYER_NAMES

    if is_peft(model) or hasattr(model, "peft_config"):
        raise ValueError(f"{type(model).__name__} is a PEFT model already; give the model below it")
    if not is_attached(model):
        raise ValueError("HiCI is not attached to this model, and it goes below PEFT; call hici.attach(model) first")
    architecture = get_architecture(model.config.model_type)
    tied = embeddings and bool(model.config.tie_word_embeddings)
    if tied and architecture.embeddings not in EMBEDDING_LAYER_NAMES:
        raise ValueError(
            f"this {model.config.model_type} has its output layer tied to {architecture.embeddings}, which PEFT would "
            "train apart from it; give embeddings=False (`train_embeddings: false` in a recipe)"
        )
    to_save = [architecture.embeddings] * embeddings + list(architecture.norms) * norms
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=architecture.lora_regex(),
        modules_to_save=to_save or None,
        # without it PEFT trains a copy of the embeddings beside a head that stays as it was
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if is_hici_name(name):
            parameter.requires_grad_(True)
    return wrapped


def trainable_parameters(model: Any) -> tuple[list[Any], list[Any]]:
    """(HiCI parameters, all others) that train: the two groups with their own learning rate and gradient clip."""
    hici: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (hici if is_hici_name(name) else others).append(parameter)
    return hici, others
