"""The Hugging Face Trainer with two parameter groups, two gradient clips, a loss without [T, vocabulary] logits, and
checkpoints of its own.

What is used of Trainer's private methods is pinned by a test over the supported versions: `_save_checkpoint`,
`_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_rng_state`, `_get_grad_norm`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from hici.adapters.lora import trainable_parameters
from hici.files import read_json, write_json
from hici.models.lookup import get_causal_lm
from hici.models.loss import next_token_loss
from hici.processes import everyones, wants_fsdp
from hici.train.checkpoint import CheckpointStore
from hici.train.order import TrainingOrder, describe_rows
from hici.train.state import (
    gather_optimizer,
    gather_weights,
    random_state,
    restore_optimizer,
    restore_random,
    restore_weights,
)
from hici.train.steps import Steps, TrainingDivergedError

logger = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, OPTIMIZER_PLAIN = "weights.safetensors", "optimizer.safetensors", "optimizer.json"
TRAINER_STATE, RANDOM = "trainer_state.json", "random.pt"


class LanguageModel(nn.Module):
    """A causal LM whose forward gives the loss only, so that the Trainer (and DDP around it) never sees logits.

    `autocast`: the dtype that it computes in, whatever engine is around it; None: as its surroundings say.
    """

    accepts_loss_kwargs = True  # Trainer: the mean over an accumulated batch is ours (num_items_in_batch)

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        # accelerate shards by these classes
        self._no_split_modules = list(getattr(get_causal_lm(model), "_no_split_modules", None) or [])

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Mean next-token loss (nats) over the targets; `labels` [B, T] as in `next_token_loss`."""
        inputs = {} if attention_mask is None else {"attention_mask": attention_mask}
        device = input_ids.device.type
        with contextlib.nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            total, count = next_token_loss(self.model, input_ids, labels, **inputs)
        return {"loss": total / (count if num_items_in_batch is None else num_items_in_batch)}


@dataclasses.dataclass
class Settings:
    """What HiCITrainer does beyond Trainer.

    Attributes:
        hici_learning_rate: of the HiCI modules.
        clips: gradient clips of the groups "hici" and "other".
        optimizer: (class, arguments) that makes the optimizer.
        rows_a_step: sequences of an optimizer step over all processes.
        checkpoints: where checkpoints go; None: none are written.
        segment_counts, seed: as in the recipe.
        on_begin: called once the model is as the engine trains it, before the first step, with the trainer.
        on_step: gets a dict of numbers for each optimizer step, on the first process.
        on_checkpoint: gets the step and place of a checkpoint that is whole, on the first process.
    """

    hici_learning_rate: float
    clips: dict[str, float]
    optimizer: tuple[Any, dict[str, Any]]
    rows_a_step: int
    checkpoints: CheckpointStore | None = None
    segment_counts: list[int] | None = None
    seed: int = 0
    on_begin: Callable[[HiCITrainer], None] | None = None
    on_step: Callable[[dict[str, Any]], None] | None = None
    on_checkpoint: Callable[[int, Path], None] | None = None


class HiCITrainer(Trainer):
    """Trainer with a learning rate and a gradient clip of their own for the HiCI parameters."""

    optimizer: Any  # set by Trainer

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.step_log: dict[str, Any] = {}  # of the last optimizer step
        self.step_tokens = 0  # real tokens of this process since the step began
        self.remove_callback(PrinterCallback)
        self.add_callback(Steps(self))

    @property
    def order(self) -> TrainingOrder:
        """The rows in the order of training."""
        assert isinstance(self.train_dataset, TrainingOrder)
        return self.train_dataset

    @property
    def language_model(self) -> Any:
        """The (PEFT) model inside the engine's wrappers."""
        return self.model.model

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer; FSDP also on CPU processes, where accelerate's own switch leaves it out, and in full precision.

        The plugin and everything behind it are accelerate's, so that two CPU processes prove what many GPUs run.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.accelerator.distributed_type.value == "MULTI_CPU" and wants_fsdp():
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # LanguageModel decides what is computed in bfloat16, as in one process; gradients are summed in float32
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)

    def create_optimizer(self, model: Any = None) -> Any:
        """The recipe's optimizer over (others, HiCI)."""
        if self.optimizer is None:
            hici, others = trainable_parameters(self.model if model is None else model)
            cls, options = self.settings.optimizer
            options = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay,
                       "betas": (self.args.adam_beta1, self.args.adam_beta2), **options}  # fmt: skip
            groups: list[dict[str, Any]] = [
                {"params": others},
                {"params": hici, "lr": self.settings.hici_learning_rate},
            ]
            self.optimizer = cls([group for group in groups if group["params"]], **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer; counts tokens."""
        mask = inputs.get("attention_mask")
        self.step_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what a step measured (gradient norms before clipping, rate of the HiCI modules, time, memory)."""
        if "loss" in logs:
            step = self.state.global_step
            bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(logs.get(key, 0.0))), None)
            if bad is not None:  # with DeepSpeed the norm, else Steps has seen it before
                raise TrainingDivergedError(
                    f"the {bad} of step {step} is {logs[bad]}, on {self.rows_of(step - 1)}; check these documents, "
                    "lower the learning rates or lengthen warmup_steps, and go on from the last checkpoint (--resume)"
                )
            logs |= self.step_log
            if self.settings.on_step is not None and self.is_world_process_zero():
                self.settings.on_step({"step": step, **logs})
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """None: Steps measures the groups, and Trainer's way turns all gradients into NaN where one is.

        With DeepSpeed, which measures them itself: as Trainer.
        """
        return super()._get_grad_norm(model, grad_norm) if self.is_deepspeed_enabled else None

    def rows_of(self, step: int) -> str:
        """The rows of an optimizer step (from 0) and their documents, for an error."""
        return describe_rows(self.order, step, self.settings.rows_a_step)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer; with DeepSpeed, what reads its checkpoints expects trained parameters only."""
        scheduler = super().create_scheduler(*args, **kwargs)
        if self.is_deepspeed_enabled:
            engine = self._engine()
            engine.load_checkpoint = functools.partial(_load_trained, engine.load_checkpoint)
        return scheduler

    def _engine(self) -> Any:
        """DeepSpeed's engine around the model."""
        return self.accelerator.deepspeed_engine_wrapped.engine

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's place for writing a checkpoint: a whole one or none (hici.train.checkpoint)."""
        store = self.settings.checkpoints
        if store is None:
            return
        step, first = self.state.global_step, self.is_world_process_zero()
        weights = gather_weights(self.model, keep=first)
        optimizer = None if self.is_deepspeed_enabled else gather_optimizer(self.optimizer, self.model, keep=first)
        everything = {"random": everyones(random_state()), "schedule": self.lr_scheduler.state_dict()}

        def fill(directory: Path | None) -> None:
            if optimizer is None:  # every process writes its shard
                place = everyones(None if directory is None else str(directory))[0]
                self._engine().save_checkpoint(place, tag=f"global_step{step}", exclude_frozen_parameters=True)
            if directory is None:
                return
            save_file(weights, directory / WEIGHTS)
            if optimizer is not None:
                save_file(optimizer[0], directory / OPTIMIZER)
                write_json(directory / OPTIMIZER_PLAIN, optimizer[1])
            buffer = io.BytesIO()  # torch's own writer hides the reason when a disk is full
            torch.save(everything, buffer)
            (directory / RANDOM).write_bytes(buffer.getvalue())
            self.state.save_to_json(str(directory / TRAINER_STATE))

        if first:
            place = store.write(step, fill)
            if self.settings.on_checkpoint is not None:
                self.settings.on_checkpoint(step, place)
        else:
            fill(None)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer's place for reading weights (before wrapping; after it with FSDP)."""
        restore_weights(self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's place for reading the optimizer and the rates' schedule."""
        if checkpoint is None:
            return
        directory = Path(checkpoint)
        if not self.is_deepspeed_enabled:  # which has read its own files
            tensors, plain = load_file(directory / OPTIMIZER), read_json(directory / OPTIMIZER_PLAIN)
            restore_optimizer(self.optimizer, self.model, tensors, plain)
        self.lr_scheduler.load_state_dict(torch.load(directory / RANDOM, weights_only=True)["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's place for reading random states."""
        if checkpoint is None:
            return
        states = torch.load(Path(checkpoint) / RANDOM, weights_only=True)["random"]
        if len(states) == self.args.world_size:
            restore_random(states[self.args.process_index])
        elif any(isinstance(module, nn.Dropout) and module.p for module in self.model.modules()):
            logger.warning("the checkpoint has random states of %d processes, and these are %d: dropout draws anew",
                           len(states), self.args.world_size)  # fmt: skip


def _load_trained(load_checkpoint: Any, directory: str, load_module_strict: bool = True, **kwargs: Any) -> Any:
    """DeepSpeed's load_checkpoint for files without the frozen parameters."""
    return load_checkpoint(directory, load_module_strict=False, **kwargs)
