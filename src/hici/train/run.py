"""`hici train`: recipe -> data, model, Trainer -> checkpoints, adapter directory, train.json and train.png."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from hici.adapters.lora import trainable_parameters
from hici.adapters.save import save_pretrained
from hici.adapters.verify import verify
from hici.data.packing import Rows, collate
from hici.data.prepare import PreparedData
from hici.files import write_json
from hici.machine import peak_memory
from hici.models.attach import reconfigure
from hici.models.lookup import FULL, HICI, get_decoder
from hici.models.modes import leaks_future, set_attention
from hici.models.quantized import NONE
from hici.processes import everyones, local_rank, only_run_in, rank, wants_deepspeed, wants_fsdp, world_size
from hici.provenance import provenance
from hici.report.runs import read_run
from hici.report.training import plot_training
from hici.train.checkpoint import CheckpointStore, Identity, step_of
from hici.train.heldout import heldout_losses, row_loss
from hici.train.optimizers import create_optimizer_class
from hici.train.order import TrainingOrder
from hici.train.output import (
    ADAPTER,
    check_output,
    check_space,
    remove_leftovers,
    remove_old_results,
    training_facts,
)
from hici.train.recipe import SCHEDULES, Recipe
from hici.train.rows import prepare_data
from hici.train.setup import (
    attached_config,
    autocast_dtype,
    check_device,
    check_engine,
    check_launcher,
    load_base,
    prepare_model,
    uses_cpu,
)
from hici.train.state import count_numbers, gather_weights, is_sharded, restore_weights
from hici.train.tracking import Trackers, check_tracking, make_trackers, start_event
from hici.train.trainer import HiCITrainer, LanguageModel, Settings

logger = logging.getLogger(__name__)

BEGIN = "begin"  # the log's entry of what was measured before the first step
# how far the loss before the first step may lie from the base's: the sum of roundings in another order
_SAME_LOSS = {"float32": {"rel_tol": 1e-3, "abs_tol": 1e-4}, "bfloat16": {"rel_tol": 3e-2, "abs_tol": 3e-2}}


def train(
    recipe: Recipe, *, resume: bool = False, progress: bool = True, write: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run a recipe, in one process or as one of several that a launcher started.

    The adapter is in output_dir/adapter. With `resume` it goes on from the last whole checkpoint in output_dir, or from
    the beginning where there is none. `write` gets the lines of the table; None: logging.

    Returns:
        What train.json holds, on the first process; on the others {}.

    Raises:
        ValueError: bad data, model or recipe; existing results without `resume` or `overwrite` (before any work); a
            checkpoint of another run; TrainingDivergedError on a NaN or infinite loss or gradient.
    """
    check_device(recipe)
    check_launcher()
    check_engine(recipe)
    create_optimizer_class(recipe.optimizer)  # not installed: known before any work
    check_tracking(recipe)
    output = Path(recipe.output_dir).expanduser()
    first = rank() == 0
    if first:
        check_output(output, recipe, resume=resume)
    with only_run_in(output) if first else contextlib.nullcontext():
        set_seed(recipe.seed)
        tokenizer, model = load_base(recipe)
        data = prepare_data(recipe, tokenizer, model.config.vocab_size, progress=progress and first)
        check_processes(recipe, data)
        base_loss = base_loss_of(recipe, model, data.train)
        model = prepare_model(recipe, model)
        check_space(recipe, output, model)
        store = checkpoint_store(recipe, output, model, data)
        begun = store.last() if resume else None
        at = None if begun is None else step_of(begun)
        if first:
            store.clean()
            if begun is None:
                remove_old_results(output)
        with (
            make_trackers(recipe, output, resumed_at=at, progress=progress, write=write)
            if first
            else Trackers([]) as trackers,
            tempfile.TemporaryDirectory(prefix="hici-train-") as scratch,
        ):
            start = start_event(recipe)
            trackers.event(start if at is None else {**start, "event": "resume", "step": at})
            trainer = make_trainer(recipe, model, data, scratch, store=store, base_loss=base_loss, trackers=trackers)
            trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
            return finish(recipe, output, trainer, data, tokenizer, trackers)


def rows_a_step(recipe: Recipe) -> int:
    """Sequences of an optimizer step over all processes."""
    return recipe.batch_size * recipe.gradient_accumulation_steps * world_size()


def check_processes(recipe: Recipe, data: PreparedData) -> None:
    """Raise ValueError when a step would give two processes the same sequence; say when sequences repeat at all."""
    rows, needed = len(data.train), recipe.max_steps * rows_a_step(recipe)
    if world_size() > 1 and rows < recipe.batch_size * world_size():
        raise ValueError(
            f"{world_size()} processes of {recipe.batch_size} sequences need more than the {rows} sequences that the "
            "data gives; start fewer processes, give more text, or a shorter context"
        )
    if recipe.warmup_steps >= recipe.max_steps:
        logger.warning("warmup_steps=%d is not below max_steps=%d: the rates never get to what the recipe says",
                       recipe.warmup_steps, recipe.max_steps)  # fmt: skip
    if needed > rows:
        logger.warning("%d sequences are needed but there are %d: they repeat", needed, rows)


def checkpoint_store(recipe: Recipe, output: Path, model: Any, data: PreparedData) -> CheckpointStore:
    """Where the run's checkpoints lie, and what it is known by."""
    base = get_decoder(model).hici_attached.base_fingerprint
    # sections that mean the same are the same, however they are spelt
    known_by = {**recipe.to_dict(), "hici": attached_config(recipe).to_dict()}
    identity = Identity(known_by, data.fingerprint, base, rows_a_step(recipe))
    return CheckpointStore(output, identity, recipe.keep_checkpoints)


def check_same_step(step: int) -> None:
    """Raise ValueError unless all processes begin at the same step."""
    steps = everyones(step)
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found checkpoints of other steps ({steps}); let output_dir be one that all machines share"
        )


def make_trainer(
    recipe: Recipe,
    model: Any,
    data: PreparedData,
    scratch: str,
    *,
    store: CheckpointStore | None = None,
    base_loss: float | None = None,
    trackers: Trackers | None = None,
) -> HiCITrainer:
    """The Trainer of a recipe; its only files are checkpoints."""
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=one_clip(recipe),
        use_cpu=uses_cpu(recipe),
        train_sampling_strategy="sequential",  # TrainingOrder has drawn the order
        ddp_find_unused_parameters=False,  # every trained parameter takes part in every step
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what must stop the run
        save_strategy="steps" if recipe.save_steps and store is not None else "no",
        save_steps=max(1, recipe.save_steps),
        report_to="none",
        seed=recipe.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would choose DataParallel, which replicates modules without their attributes

    trackers = trackers or Trackers([])

    def begin(trainer: HiCITrainer) -> None:
        check_same_step(trainer.state.global_step)
        if trainer.state.global_step == 0:
            set_seed(recipe.seed + rank())  # other dropout on every process
            measured = before_first_step(recipe, trainer, data, base_loss)
            trainer.state.log_history.append({BEGIN: measured, "step": 0})
            trackers.event({"event": "heldout", "step": 0, "losses": measured["heldout_loss"]})

    return HiCITrainer(
        model=LanguageModel(model, autocast_dtype(recipe)),
        args=arguments,
        data_collator=collate,
        train_dataset=TrainingOrder(data.train, recipe.max_steps * rows_a_step(recipe), recipe.seed),
        settings=Settings(
            hici_learning_rate=recipe.hici_learning_rate,
            clips={"hici": recipe.hici_max_grad_norm, "other": recipe.max_grad_norm},
            optimizer=create_optimizer_class(recipe.optimizer),
            rows_a_step=rows_a_step(recipe),
            checkpoints=store,
            segment_counts=recipe.segment_counts,
            seed=recipe.seed,
            on_begin=begin,
            on_step=trackers.step,
            on_checkpoint=lambda step, path: trackers.event({"event": "checkpoint", "step": step, "path": str(path)}),
        ),
    )


def one_clip(recipe: Recipe) -> float:
    """Trainer's own clip: none (0), since each group is clipped by its own norm (train.steps), but with DeepSpeed.

    DeepSpeed holds the gradients itself and clips all of them by one norm: then the smaller clip counts.
    """
    if not wants_deepspeed():
        return 0.0
    clip = min(recipe.max_grad_norm, recipe.hici_max_grad_norm)
    logger.warning("DeepSpeed clips all gradients together: by the smaller one of the two clips, %s", clip)
    return clip


def base_loss_of(recipe: Recipe, model: Any, rows: Rows) -> float | None:
    """The untouched base's loss on the first training row, in nats a token; None for a model that will be sharded.

    (Such a one may not fit a single device.)
    """
    if wants_fsdp() or wants_deepspeed():
        return None
    device = torch.device("cpu") if uses_cpu(recipe) else torch.device("cuda", local_rank())
    if recipe.quantization == NONE:  # else it lies there already
        model.to(device)
    return row_loss(LanguageModel(model, autocast_dtype(recipe)), rows[0], device)


def before_first_step(
    recipe: Recipe, trainer: HiCITrainer, data: PreparedData, base_loss: float | None
) -> dict[str, Any]:
    """Losses before anything was trained: held out, and on the first training row beside the base's.

    Raises:
        ValueError: the adapted model in full attention is not the base, so weights were lost on the way.
    """
    model, device = trainer.language_model, trainer.args.device
    losses: dict[str, float] = {}
    for attention in dict.fromkeys((FULL, recipe.method)):
        set_attention(model, attention)
        losses[attention] = row_loss(trainer.model_wrapped, data.train[0], device)
    full, own = losses[FULL], losses[recipe.method]
    first = {"base": base_loss, **losses}
    if base_loss is not None and not math.isclose(full, base_loss, **_SAME_LOSS[recipe.dtype]):
        raise ValueError(
            f"before the first step the model in full attention has loss {full:.4f} on the first sequence, but the "
            f"base has {base_loss:.4f}; new modules and LoRA change nothing yet, so weights of the base were lost: "
            "check the base's files"
        )
    uniform = math.log(model.config.vocab_size)
    if full < uniform < own:
        logger.warning(
            "before the first step the loss in %s attention is %.2f, above that of random words (%.2f), and the base's "
            "is %.2f: the first steps will be rough; shorter warm-ups or high rates may not recover",
            recipe.method, own, uniform, full,
        )  # fmt: skip
    heldout = heldout_losses(trainer.model_wrapped, model, data.heldout, recipe.method, device)
    logger.info("first sequence: %s; held out: %s", first, heldout)
    if torch.device(device).type == "cuda":  # the peak is to be the training's
        torch.cuda.reset_peak_memory_stats(device)
    return {"first_sequence_loss": first, "heldout_loss": heldout}


def finish(
    recipe: Recipe, output: Path, trainer: HiCITrainer, data: PreparedData, tokenizer: Any, trackers: Trackers
) -> dict[str, Any]:
    """After the last step: held-out losses, the adapter, train.json and train.png (the first process writes)."""
    model = trainer.language_model
    config = attached_config(recipe)
    reconfigure(model, num_segments=config.num_segments, segment_size=config.segment_size)  # not the last one drawn
    before = next(entry[BEGIN] for entry in trainer.state.log_history if BEGIN in entry)
    after = heldout_losses(trainer.model_wrapped, model, data.heldout, recipe.method, trainer.args.device)
    trackers.event({"event": "heldout", "step": recipe.max_steps, "losses": after})
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    hici, others = trainable_parameters(trainer.model)
    leaks = {recipe.method: leaks_future(model), FULL: False}
    whole = whole_model(recipe, trainer)
    if whole is None:
        return {}
    directory = save_pretrained(
        whole,
        output / ADAPTER,
        tokenizer=tokenizer,
        context_length=recipe.context_length,
        training=training_facts(recipe, data.summary, rows_a_step(recipe), steps),
        overwrite=True,  # check_output has asked
    )
    check_saved(directory)
    result = {
        "recipe": recipe.to_dict(),
        "adapter": str(directory),
        "attention": recipe.method,
        "visibility": config.visibility if recipe.method == HICI else None,
        "leaks_future": leaks,
        "data": {**data.summary, "fingerprint": data.fingerprint},
        "trainable_parameters": {"hici": count_numbers(hici), "other": count_numbers(others)},
        "processes": world_size(),
        "steps": steps,
        "first_sequence_loss": before["first_sequence_loss"],
        "heldout_loss": {
            "before": {mode: before["heldout_loss"][mode] for mode in after},
            "after": after,
            "unit": "nats a token",
        },
        "seconds": sum(step["seconds"] for step in steps),
        "peak_memory_bytes": peak_memory(trainer.args.device),
        "made_with": provenance(),
    }
    write_json(output / "train.json", result)
    trackers.event({"event": "end", "step": recipe.max_steps})
    plot_training([read_run(output)], output / "train.png")
    remove_leftovers(output)
    return result


def check_saved(directory: Path) -> None:
    """Read the adapter back. Raises ValueError for what is missing, damaged or does not fit the base."""
    problems = verify(directory).problems
    if problems:
        found = "; ".join(f"{problem.name}: {problem.text}" for problem in problems)
        raise ValueError(
            f"{directory} was written but does not read back whole ({found}); check the disk, and go on from the last "
            "checkpoint with --resume"
        )


def whole_model(recipe: Recipe, trainer: HiCITrainer) -> Any:
    """The trained model with whole parameters, on the first process; None on the others.

    A sharded one is made anew from the base there and gets the gathered weights, name by name, so that what is saved
    has gone through the same checks as in one process. All processes must call it together.
    """
    if not is_sharded(trainer.model):
        return trainer.language_model if rank() == 0 else None
    weights = gather_weights(trainer.model)
    if rank() != 0:
        return None
    if wants_deepspeed():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else ZeRO-3 would partition this model too, over processes that make none
    model = LanguageModel(prepare_model(recipe, load_base(recipe)[1]))
    restore_weights(model, weights)
    return model.model
