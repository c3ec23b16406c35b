"""The Hugging Face Trainer with two parameter groups, two gradient clips and a loss without [T, vocabulary] logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from hici.adapters.lora import trainable_parameters
from hici.models.loss import IGNORE, next_token_loss


class TrainingDivergedError(ValueError):
    """A gradient or loss that is NaN or infinite: the step and the group of parameters are named."""


class LanguageModel(nn.Module):
    """A causal LM whose forward gives the loss only, so that the Trainer (and DDP around it) never sees logits."""

    accepts_loss_kwargs = True  # Trainer: the mean over an accumulated batch is ours (num_items_in_batch)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Mean next-token loss (nats) over the targets; `labels` [B, T] as in `next_token_loss`."""
        inputs = {} if attention_mask is None else {"attention_mask": attention_mask}
        total, count = next_token_loss(self.model, input_ids, labels, **inputs)
        return {"loss": total / (count if num_items_in_batch is None else num_items_in_batch)}


class Sequences(Dataset[dict[str, Tensor]]):
    """Packed sequences [n, T] as a data set. The first token of a row is never a target."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[index])
        labels = ids.clone()
        labels[0] = IGNORE
        return {"input_ids": ids, "labels": labels}


class HiCITrainer(Trainer):
    """Trainer with a learning rate and a gradient clip of their own for the HiCI parameters."""

    optimizer: Any  # set by Trainer

    def __init__(self, *args: Any, hici_learning_rate: float, clips: dict[str, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hici_learning_rate = hici_learning_rate
        self.step_log: dict[str, float] = {}  # of the last optimizer step
        self.add_callback(_Clip(self, clips))

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW over (others, HiCI)."""
        if self.optimizer is None:
            hici, others = trainable_parameters(self.model if model is None else model)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {"params": others, "weight_decay": self.args.weight_decay},
                {"params": hici, "weight_decay": self.args.weight_decay, "lr": self.hici_learning_rate},
            ]
            self.optimizer = cls([group for group in groups if group["params"]], **options)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds both gradient norms (before clipping) and the HiCI learning rate to a training line."""
        if "loss" in logs:
            logs |= self.step_log
        super().log(logs, *args, **kwargs)


class _Clip(TrainerCallback):
    """Clips each group by its own norm, on the public event right before the optimizer's step."""

    def __init__(self, trainer: HiCITrainer, clips: dict[str, float]) -> None:
        self.trainer = trainer
        self.clips = clips

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hici, others = trainable_parameters(self.trainer.model)
        for name, parameters in (("hici", hici), ("other", others)):
            if not parameters:
                continue
            norm = float(nn.utils.clip_grad_norm_(parameters, self.clips[name]))
            if not math.isfinite(norm):
                raise TrainingDivergedError(
                    f"the gradient norm of the {name} parameters is {norm} at step {state.global_step + 1}; nothing "
                    "was saved. Lower the learning rates or lengthen warmup_steps, and check the data"
                )
            self.trainer.step_log[f"{name}_grad_norm"] = norm
        self.trainer.step_log["hici_learning_rate"] = self.trainer.optimizer.param_groups[-1]["lr"]
