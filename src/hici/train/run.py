"""`hici train`: recipe -> data, model, Trainer -> checkpoints, adapter directory, train.json and train.png."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from hici.adapters.lora import trainable_parameters
from hici.adapters.save import save_pretrained
from hici.files import write_json
from hici.machine import peak_memory
from hici.models.attach import reconfigure
from hici.models.lookup import FULL, HICI, get_decoder
from hici.models.modes import leaks_future, set_attention
from hici.provenance import provenance
from hici.report.training import plot_training
from hici.train.checkpoint import CheckpointStore, Identity
from hici.train.heldout import heldout_losses, row_loss
from hici.train.order import Rows, TrainingOrder
from hici.train.output import (
    ADAPTER,
    check_output,
    check_space,
    remove_leftovers,
    remove_old_results,
    training_facts,
)
from hici.train.processes import local_rank, only_run_in, rank, wants_deepspeed, wants_fsdp, world_size
from hici.train.recipe import SCHEDULES, Recipe
from hici.train.rows import TrainingData, prepare_data
from hici.train.setup import attached_config, check_device, load_base, prepare_model, uses_cpu
from hici.train.state import gather_weights, is_sharded, restore_weights
from hici.train.trainer import HiCITrainer, LanguageModel, Settings

logger = logging.getLogger(__name__)

BEGIN = "begin"  # the log's entry of what was measured before the first step
# how far the loss before the first step may lie from the base's: the sum of roundings in another order
_SAME_LOSS = {"float32": 1e-3, "bfloat16": 3e-2}


def train(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Run a recipe, in one process or as one of several that a launcher started. Returns what train.json holds.

    The adapter is in output_dir/adapter. With `resume` it goes on from the last whole checkpoint in output_dir, or from
    the beginning where there is none.

    Raises:
        ValueError: bad data, model or recipe; existing results without `resume` or `overwrite` (before any work); a
            checkpoint of another run; TrainingDivergedError on a NaN or infinite loss or gradient.
    """
    check_device(recipe)
    output = Path(recipe.output_dir).expanduser()
    first = rank() == 0
    if first:
        check_output(output, recipe, resume=resume)
    with only_run_in(output) if first else contextlib.nullcontext():
        set_seed(recipe.seed)
        tokenizer, model = load_base(recipe)
        data = prepare_data(recipe, tokenizer, model.config.vocab_size)
        check_processes(recipe, data)
        base_loss = base_loss_of(recipe, model, data.train)
        model = prepare_model(recipe, model)
        check_space(recipe, output, model)
        store = checkpoint_store(recipe, output, model, data)
        begun = store.last() if resume else None
        if first:
            store.clean()
        if first and not resume:
            remove_old_results(output)
        with tempfile.TemporaryDirectory(prefix="hici-train-") as scratch:
            trainer = make_trainer(recipe, model, data, scratch, store=store, base_loss=base_loss)
            trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
        return finish(recipe, output, trainer, data, tokenizer)


def rows_a_step(recipe: Recipe) -> int:
    """Sequences of an optimizer step over all processes."""
    return recipe.batch_size * recipe.gradient_accumulation_steps * world_size()


def check_processes(recipe: Recipe, data: TrainingData) -> None:
    """Raise ValueError when a step would give two processes the same sequence; say when sequences repeat at all."""
    rows, needed = len(data.train), recipe.max_steps * rows_a_step(recipe)
    if world_size() > 1 and rows < recipe.batch_size * world_size():
        raise ValueError(
            f"{world_size()} processes of {recipe.batch_size} sequences need more than the {rows} sequences that the "
            "data gives; start fewer processes, give more text, or a shorter context"
        )
    if needed > rows:
        logger.warning("%d sequences are needed but there are %d: they repeat", needed, rows)


def checkpoint_store(recipe: Recipe, output: Path, model: Any, data: TrainingData) -> CheckpointStore:
    """Where the run's checkpoints lie, and what it is known by."""
    base = get_decoder(model).hici_attached.base_fingerprint
    identity = Identity(recipe.to_dict(), data.fingerprint, base, rows_a_step(recipe))
    return CheckpointStore(output, identity, recipe.keep_checkpoints)


def make_trainer(
    recipe: Recipe,
    model: Any,
    data: TrainingData,
    scratch: str,
    *,
    store: CheckpointStore | None = None,
    base_loss: float | None = None,
    progress: bool = False,
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
        max_grad_norm=0.0,  # each group is clipped on its own (train.steps)
        bf16=recipe.dtype == "bfloat16",
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
    # a launcher's environment would decide it otherwise
    arguments.mixed_precision = "bf16" if recipe.dtype == "bfloat16" else "no"
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would choose DataParallel, which replicates modules without their attributes

    def begin(trainer: HiCITrainer) -> None:
        if trainer.state.global_step == 0:
            trainer.state.log_history.append({BEGIN: before_first_step(recipe, trainer, data, base_loss), "step": 0})

    return HiCITrainer(
        model=LanguageModel(model),
        args=arguments,
        train_dataset=TrainingOrder(data.train, recipe.max_steps * rows_a_step(recipe), recipe.seed),
        settings=Settings(
            hici_learning_rate=recipe.hici_learning_rate,
            clips={"hici": recipe.hici_max_grad_norm, "other": recipe.max_grad_norm},
            optimizer=(torch.optim.AdamW, {}),
            rows_a_step=rows_a_step(recipe),
            checkpoints=store,
            segment_counts=recipe.segment_counts,
            seed=recipe.seed,
            on_begin=begin,
        ),
    )


def base_loss_of(recipe: Recipe, model: Any, rows: Rows) -> float | None:
    """The untouched base's loss on the first training row, in nats a token; None for a model that will be sharded.

    (Such a one may not fit a single device.)
    """
    if wants_fsdp() or wants_deepspeed():
        return None
    device = torch.device("cpu") if uses_cpu(recipe) else torch.device("cuda", local_rank())
    model.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
        return row_loss(LanguageModel(model), rows[0], device)


def before_first_step(
    recipe: Recipe, trainer: HiCITrainer, data: TrainingData, base_loss: float | None
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
    if base_loss is not None and not math.isclose(full, base_loss, rel_tol=_SAME_LOSS[recipe.dtype]):
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
    return {"first_sequence_loss": first, "heldout_loss": heldout}


def finish(recipe: Recipe, output: Path, trainer: HiCITrainer, data: TrainingData, tokenizer: Any) -> dict[str, Any]:
    """After the last step: held-out losses, the adapter, train.json and train.png (the first process writes)."""
    model = trainer.language_model
    config = attached_config(recipe)
    reconfigure(model, num_segments=config.num_segments, segment_size=config.segment_size)  # not the last one drawn
    before = next(entry[BEGIN] for entry in trainer.state.log_history if BEGIN in entry)
    after = heldout_losses(trainer.model_wrapped, model, data.heldout, recipe.method, trainer.args.device)
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
    result = {
        "recipe": recipe.to_dict(),
        "adapter": str(directory),
        "attention": recipe.method,
        "visibility": config.visibility if recipe.method == HICI else None,
        "leaks_future": leaks,
        "data": {**data.summary, "fingerprint": data.fingerprint},
        "trainable_parameters": {"hici": sum(p.numel() for p in hici), "other": sum(p.numel() for p in others)},
        "processes": world_size(),
        "steps": steps,
        "first_sequence_loss": before["first_sequence_loss"],
        "heldout_loss": {"before": before["heldout_loss"], "after": after, "unit": "nats a token"},
        "seconds": sum(step["seconds"] for step in steps),
        "peak_memory_bytes": peak_memory(trainer.args.device),
        "made_with": provenance(),
    }
    write_json(output / "train.json", result)
    plot_training(steps, output / "train.png")
    remove_leftovers(output)
    return result


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
    model = LanguageModel(prepare_model(recipe, load_base(recipe)[1]))
    restore_weights(model, weights)
    return model.model
