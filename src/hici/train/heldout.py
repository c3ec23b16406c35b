"""Losses on rows that are not trained on, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hici.data.packing import Rows, collate
from hici.models.lookup import FULL
from hici.models.modes import set_attention
from hici.processes import everyones, rank, world_size


def heldout_losses(model: nn.Module, language_model: Any, rows: Rows, method: str, device: Any) -> dict[str, float]:
    """Mean loss in nats a target, in the attention trained in and in the model's stock ("full") attention.

    Args:
        model: what gives {"loss"} of a batch, as the engine has wrapped it; all processes must call it together.
        language_model: the model inside, whose attention is switched; it is left in `method`.
    """
    if not len(rows):
        return {}
    losses = {}
    for attention in dict.fromkeys((method, FULL)):
        set_attention(language_model, attention)
        losses[attention] = mean_loss(model, rows, device)
    set_attention(language_model, method)
    return losses


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows, device: Any) -> float:
    """Mean loss over all targets of all rows, each row read by one process."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    # every process makes the same number of calls, since FSDP's are collective
    for start in range(0, len(rows), world_size()):
        own = start + rank() < len(rows)
        row = rows[start + rank() if own else 0]
        targets = int((row["labels"][1:] != -100).sum())
        loss = model(**batch_of(row, device))["loss"]
        if own and targets:
            total, count = total + float(loss) * targets, count + targets
    model.train(was_training)
    parts = everyones((total, count))
    return sum(part for part, _ in parts) / max(1, sum(number for _, number in parts))


@torch.no_grad()
def row_loss(model: nn.Module, row: dict[str, Tensor], device: Any) -> float:
    """One row's mean loss (every process reads the same row)."""
    was_training = model.training
    model.eval()
    loss = float(model(**batch_of(row, device))["loss"])
    model.train(was_training)
    return loss


def batch_of(row: dict[str, Tensor], device: Any) -> dict[str, Tensor]:
    """One row as a batch on a device."""
    return {key: value.to(device) for key, value in collate([row]).items()}
