"""Language-model loss that never holds [T, vocabulary] logits.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hici.models.architectures import get_architecture
from hici.models.attach import get_causal_lm, get_decoder

IGNORE = -100
_CHUNK_ELEMENTS = 2**25  # logits held at a time: 128 MiB in float32


def token_losses(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Cross entropy of each token, [T] in float32 nats, 0 where the target is -100.

    The logits of one chunk of tokens exist at a time; in the backward pass they are computed again.
    """
    chunk = max(1, _CHUNK_ELEMENTS // weight_VD.shape[0])
    parts = []
    for hidden, targets in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_losses, hidden, weight_VD, targets, bias_V, use_reentrant=False))
        else:
            parts.append(_chunk_losses(hidden, weight_VD, targets, bias_V))
    return torch.cat(parts)


def _chunk_losses(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None) -> Tensor:
    if not torch.is_autocast_enabled(hidden_TD.device.type):
        hidden_TD = hidden_TD.to(weight_VD.dtype)
    logits_TV = F.linear(hidden_TD, weight_VD, bias_V).float()
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="none")


def next_token_losses(model: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Losses [B, T-1] of predicting token t+1 from tokens 0..t, for a causal LM (also inside PEFT).

    `inputs` go to the decoder (attention_mask, ...). Targets under a zero of `attention_mask`, and targets whose
    query is padding, count 0.

    Raises:
        ValueError: a model whose head may do more than a matrix product (scale, cap, LoRA), which would be left out.
    """
    head = _linear_head(model)
    hidden_BTD = get_decoder(model)(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    # a device_map may end on another device than it began
    hidden_BTD, targets = hidden_BTD.to(head.weight.device), input_ids[:, 1:].to(head.weight.device)
    mask = inputs.get("attention_mask")
    if mask is not None:
        padding = (mask[:, 1:] == 0) | (mask[:, :-1] == 0)
        targets = targets.masked_fill(padding.to(targets.device), IGNORE)
    losses = token_losses(hidden_BTD[:, :-1].flatten(0, 1), head.weight, targets.flatten(), head.bias)
    return losses.view(targets.shape)


def _linear_head(model: Any) -> Any:
    """The output layer, known to be a matrix product and nothing else."""
    lm = get_causal_lm(model)
    get_architecture(lm.config.model_type)  # its heads are plain; other types may scale or cap their logits
    head = lm.get_output_embeddings()
    inner = getattr(head, "modules_to_save", {"default": head})  # PEFT's trained copy of a tied head
    if not all(type(layer) is nn.Linear for layer in inner.values()):
        raise ValueError(
            f"the output layer is a {type(head).__name__}, and the loss without full logits needs a plain Linear; take "
            "LoRA or quantisation off the output layer"
        )
    return head
