"""What a released directory must hold for a given base: names and shapes, without any weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hici.adapters.contents import PEFT_PREFIX, is_lora_name
from hici.adapters.file_names import PICKLED_LORA_FILE, TRAINABLE_FILE
from hici.adapters.plan import peft_tensors
from hici.config import HiCIConfig
from hici.models.architectures import get_architecture
from hici.models.attach import attach, hici_state_dict
from hici.models.load import meta_model
from hici.models.vocabulary import grow_vocabulary, vocabulary_size


def released_tensors(
    model_config: Any, config: HiCIConfig | None = None, *, lora_rank: int = 8, new_tokens: int = 1
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a released directory by file and name, on the meta device.

    Its training put LoRA on every module named like an attention projection, inside the HiCI modules too, and trained
    these modules, the embeddings and all norms whole.

    Args:
        model_config: a transformers config of the base.
        config: of the HiCI modules; None: the published one.
        lora_rank: r.
        new_tokens: entries that the training added to the base's vocabulary ([PAD]).
    """
    from peft import LoraConfig, get_peft_model

    architecture = get_architecture(model_config.model_type)
    model = meta_model(model_config)
    grow_vocabulary(model, vocabulary_size(model) + new_tokens)
    attach(model, config or HiCIConfig())
    modules = hici_state_dict(model)
    lora_config = LoraConfig(
        r=lora_rank,
        target_modules=list(architecture.lora_targets),
        modules_to_save=[architecture.embeddings, *architecture.norms],
    )
    with torch.device("meta"):
        wrapped = get_peft_model(model, lora_config, autocast_adapter_dtype=False)
    rest = peft_tensors(wrapped)
    return {
        PICKLED_LORA_FILE: {PEFT_PREFIX + name: tensor for name, tensor in rest.items() if is_lora_name(name)},
        TRAINABLE_FILE: {**modules, **{name: tensor for name, tensor in rest.items() if not is_lora_name(name)}},
    }
