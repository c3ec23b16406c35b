"""Language-model loss that never holds [T, vocabulary] logits.

Two ways to one number: `token_losses` gives every token's loss and no gradient (evaluation); `summed_loss` gives their
sum and makes its gradient while each chunk's logits exist, so that the backward pass needs no second product with
the head (training). torch's own `linear_cross_entropy` (2.13) takes 1.6 times as long on two CPU cores (4,096 x 576 x
49,152, bfloat16 autocast, forward and backward).

Shapes: T tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hici.models.architectures import get_architecture
from hici.models.lookup import get_causal_lm, get_decoder

IGNORE = -100
_CHUNK_ELEMENTS = 2**25  # logits held at a time: 128 MiB in float32


@torch.no_grad()
def token_losses(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Cross entropy of each token, [T] in float32 nats, 0 where the target is -100. Without gradient.

    `cap` c: the logits are c tanh(x / c) of the head's x (Gemma 2).
    """
    weight_VD = weight_VD.to(_head_dtype(weight_VD))
    losses = [
        F.cross_entropy(_logits(hidden_CD, weight_VD, bias_V, cap), targets_C, ignore_index=IGNORE, reduction="none")
        for hidden_CD, targets_C in _chunks(hidden_TD, targets_T, weight_VD)
    ]
    return torch.cat(losses)


def summed_loss(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Sum of the cross entropies of all tokens whose target is not -100: a float32 scalar, in nats.

    `cap` as in `token_losses`. Differentiable once in hidden states, weight and bias. The weight's gradient is summed
    over the chunks in float32, and lives from the forward to the backward pass.
    """
    inputs = (hidden_TD, weight_VD, bias_V)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return token_losses(hidden_TD, weight_VD, targets_T, bias_V, cap).sum()
    counted_T = targets_T != IGNORE
    if not counted_T.all():  # the others need no logits
        hidden_TD, targets_T = hidden_TD[counted_T], targets_T[counted_T]
    return _SummedLoss.apply(hidden_TD, weight_VD, targets_T, bias_V, cap)


class _SummedLoss(torch.autograd.Function):
    """loss = sum_t -log softmax(z_t)[y_t], z = h W' + b, so with G = softmax(z) - onehot(y): dh = G W, dW = G' h.

    Capped logits z = c tanh(x / c) of x = h W' + b: G times dz/dx = 1 - (z / c)^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        bias_V: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        hidden_grad, weight_grad, _, bias_grad, _ = ctx.needs_input_grad
        lower_VD = weight_VD.to(_head_dtype(weight_VD))
        d_hidden_TD = torch.empty_like(hidden_TD) if hidden_grad else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_grad else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_grad and bias_V is not None else None
        loss, start = torch.zeros((), device=hidden_TD.device), 0
        for hidden_CD, targets_C in _chunks(hidden_TD, targets_T, lower_VD):
            logits_CV = _logits(hidden_CD, lower_VD, bias_V, cap)
            slope_CV = None if cap is None else 1 - (logits_CV / cap) ** 2
            grad_CV, chunk_loss = _loss_and_gradient(logits_CV, targets_C)
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            loss += chunk_loss
            lower_CV = grad_CV.to(lower_VD.dtype)
            if d_hidden_TD is not None:
                d_hidden_TD[start : start + len(targets_C)] = lower_CV @ lower_VD
            if d_weight_VD is not None:
                d_weight_VD += lower_CV.T @ hidden_CD
            if d_bias_V is not None:
                d_bias_V += grad_CV.sum(0)
            start += len(targets_C)
            del logits_CV, slope_CV, grad_CV, lower_CV  # or they would still be held while the next chunk's are made
        ctx.gradients = (d_hidden_TD, d_weight_VD, d_bias_V)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated before, and its gradients are gone; compute it again")
        # in place: they are this node's own, and the weight's may be half a gigabyte
        d_hidden, d_weight, d_bias = (
            None if gradient is None else gradient.mul_(d_loss).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return d_hidden, d_weight, None, d_bias, None


def _loss_and_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax(logits) - onehot(targets), summed loss); the gradient takes the logits' memory."""
    target_C1 = targets_C[:, None]
    largest_C1 = logits_CV.max(dim=-1, keepdim=True).values
    target_logits_C1 = logits_CV.gather(1, target_C1)
    weights_CV = logits_CV.sub_(largest_C1).exp_()
    total_C1 = weights_CV.sum(dim=-1, keepdim=True)
    loss = (total_C1.log() + largest_C1 - target_logits_C1).sum()
    gradient_CV = weights_CV.div_(total_C1)
    return gradient_CV.scatter_add_(1, target_C1, torch.full_like(total_C1, -1.0)), loss


def _chunks(hidden_TD: Tensor, targets_T: Tensor, weight_VD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden states in the weight's dtype [C, D], targets [C])."""
    size = max(1, _CHUNK_ELEMENTS // len(weight_VD))
    for hidden_CD, targets_C in zip(hidden_TD.split(size), targets_T.split(size), strict=True):
        yield hidden_CD.to(weight_VD.dtype), targets_C


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, cap: float | None) -> Tensor:
    """[C, V] in float32; bias added, and capped, in the weight's dtype, as the model does."""
    bias_V = None if bias_V is None else bias_V.to(weight_VD.dtype)
    logits_CV = F.linear(hidden_CD, weight_VD, bias_V)
    if cap is not None:
        logits_CV = torch.tanh(logits_CV / cap) * cap
    return logits_CV.float()


def _head_dtype(weight_VD: Tensor) -> torch.dtype:
    """What the head would compute in: autocast's dtype, else the weight's."""
    device = weight_VD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype


def next_token_losses(model: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Losses [B, T-1] of predicting token t+1 from tokens 0..t, for a causal LM (also inside PEFT); no gradient.

    `inputs` go to the decoder (attention_mask, ...). Targets under a zero of `attention_mask`, and targets whose
    query is padding, count 0.

    Raises:
        ValueError: a model whose head may do more than a matrix product and its architecture's cap (scale, LoRA), which
            would be left out.
    """
    with torch.no_grad():
        head, hidden_TD, targets = _predictions(model, input_ids, input_ids, inputs)
        losses_T = token_losses(hidden_TD, head.weight, targets.flatten(), head.bias, _logit_cap(model))
        return losses_T.view(targets.shape)


def target_losses(model: Any, input_ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Losses [B, T] of predicting targets[b, t] from input_ids[b, :t + 1]; no gradient.

    Targets of -100 count 0, and no logits are made for them. The rest as in `next_token_losses`.
    """
    with torch.no_grad():
        head, hidden_BTD = _hidden_states(model, input_ids, inputs)
        targets = targets.to(head.weight.device)
        counted = targets != IGNORE
        losses = torch.zeros(targets.shape, device=targets.device)
        losses[counted] = token_losses(hidden_BTD[counted], head.weight, targets[counted], head.bias, _logit_cap(model))
        return losses


@torch.no_grad()
def token_scores(model: Any, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """(log-likelihoods [T] in float32 nats, whether each target is the likeliest token [T]); without gradient.

    `hidden_TD` are last hidden states of `model`'s decoder, that of token t where its successor is target t.

    Raises:
        ValueError: as in `next_token_losses`.
    """
    head, cap = _linear_head(model), _logit_cap(model)
    device = head.weight.device
    weight_VD = head.weight.to(_head_dtype(head.weight))
    scores, likeliest = [], []
    for hidden_CD, targets_C in _chunks(hidden_TD.to(device), targets_T.to(device), weight_VD):
        logits_CV = _logits(hidden_CD, weight_VD, head.bias, cap)
        scores.append(-F.cross_entropy(logits_CV, targets_C, reduction="none"))
        likeliest.append(logits_CV.argmax(dim=-1) == targets_C)
    return torch.cat(scores), torch.cat(likeliest)


def next_token_loss(
    model: Any, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """(sum of the next-token losses in nats, number of targets), differentiable.

    `labels` [B, T] are the targets before the shift, `input_ids` when not given; -100 does not count. The rest as in
    `next_token_losses`.
    """
    head, hidden_TD, targets = _predictions(model, input_ids, input_ids if labels is None else labels, inputs)
    loss = summed_loss(hidden_TD, head.weight, targets.flatten(), head.bias, _logit_cap(model))
    return loss, (targets != IGNORE).sum()


def _predictions(model: Any, input_ids: Tensor, labels: Tensor, inputs: dict[str, Any]) -> tuple[Any, Tensor, Tensor]:
    """(head, hidden states [B (T-1), D], shifted targets [B, T-1])."""
    head, hidden_BTD = _hidden_states(model, input_ids, inputs)
    targets = labels[:, 1:].to(head.weight.device)
    mask = inputs.get("attention_mask")
    if mask is not None:
        padding = (mask[:, 1:] == 0) | (mask[:, :-1] == 0)
        targets = targets.masked_fill(padding.to(targets.device), IGNORE)
    return head, hidden_BTD[:, :-1].flatten(0, 1), targets


def _hidden_states(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """(head, hidden states [B, T, D] on its device: a device_map may end on another one than it began)."""
    head = _linear_head(model)
    hidden_BTD = get_decoder(model)(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    return head, hidden_BTD.to(head.weight.device)


def _logit_cap(model: Any) -> float | None:
    config = get_causal_lm(model).config
    return get_architecture(config.model_type).logit_cap(config)


def _linear_head(model: Any) -> Any:
    """The output layer, known to be a matrix product and nothing else."""
    lm = get_causal_lm(model)
    get_architecture(lm.config.model_type)  # its heads are plain up to `logit_cap`; other types may scale their logits
    head = lm.get_output_embeddings()
    inner = getattr(head, "modules_to_save", {"default": head})  # PEFT's trained copy of a tied head
    if not all(type(layer) is nn.Linear for layer in inner.values()):
        raise ValueError(
            f"the output layer is a {type(head).__name__}, and the loss without full logits needs a plain Linear; take "
            "LoRA or quantisation off the output layer"
        )
    return head
