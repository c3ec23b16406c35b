"""What happens around an optimizer step: segments are drawn, gradients clipped by group, time is taken."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hici.adapters.lora import trainable_parameters
from hici.machine import peak_memory
from hici.models.attach import reconfigure
from hici.processes import everyones
from hici.train.order import draw_segments
from hici.train.state import trained

if TYPE_CHECKING:
    from hici.train.trainer import HiCITrainer


class TrainingDivergedError(ValueError):
    """A gradient or loss that is NaN or infinite: the step, its rows and the parameters are named."""


class Steps(TrainerCallback):
    """The Trainer's events that matter to us."""

    def __init__(self, trainer: HiCITrainer) -> None:
        self.trainer = trainer
        self.started = 0.0
        self.segments: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state has the old run's save_steps
        if self.trainer.settings.on_begin is not None:
            self.trainer.settings.on_begin(self.trainer)
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settings = self.trainer.settings
        if settings.segment_counts is not None:
            self.segments = draw_segments(settings.segment_counts, settings.seed, state.global_step)
            reconfigure(self.trainer.language_model, num_segments=self.segments)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        hici, others = trainable_parameters(trainer.model)
        if trainer.is_deepspeed_enabled:  # it holds the gradients itself, and clips all of them by one norm
            return
        for name, parameters in (("hici", hici), ("other", others)):
            if not parameters:
                continue
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not norm.isfinite():
                raise TrainingDivergedError(self._about(float(norm), name, parameters))
            nn.utils.clip_grads_with_norm_(parameters, trainer.settings.clips[name], norm)
            trainer.step_log[f"{name}_grad_norm"] = float(norm)
        if hici:
            trainer.step_log["hici_learning_rate"] = trainer.optimizer.param_groups[-1]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        tokens, self.trainer.step_tokens = sum(everyones(self.trainer.step_tokens)), 0
        self.trainer.step_log |= {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": peak_memory(args.device),
        }
        if self.segments is not None:
            self.trainer.step_log["segments"] = self.segments

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()  # writing a checkpoint is no part of a step

    def _about(self, norm: float, group: str, parameters: list[Any]) -> str:
        """Where a gradient is not finite (on this process, where it holds a part of each)."""
        trainer = self.trainer
        step = trainer.state.global_step
        own = {id(parameter) for parameter in parameters}
        bad = [
            name.removeprefix("model.").removeprefix("base_model.model.")
            for name, parameter in trained(trainer.model)
            if id(parameter) in own and not _is_finite(parameter.grad)
        ]
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return (
            f"the gradient norm of the {group} parameters is {norm} at step {step + 1}, in {names or 'their sum'}, on "
            f"{trainer.rows_of(step)}. The last whole checkpoint stands; lower the learning rates or lengthen "
            "warmup_steps, check these documents, and go on from it with --resume"
        )


def _is_finite(gradient: Tensor | None) -> bool:
    if gradient is None:
        return True
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(local.isfinite().all())
