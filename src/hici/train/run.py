"""`hici train`: recipe -> data, model, Trainer -> adapter directory, train.json and train.png."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainingArguments, set_seed

from hici.adapters.file_names import RECORD_FILE
from hici.adapters.lora import add_lora, trainable_parameters
from hici.adapters.save import save_pretrained
from hici.data.packing import collate
from hici.data.prepare import DataOptions, PreparedData, prepare
from hici.files import check_target, write_json
from hici.machine import peak_memory
from hici.models.attach import attach
from hici.models.load import first_line, load_plain_model
from hici.models.lookup import FULL, HICI, attention_mode
from hici.models.modes import leaks_future, set_attention
from hici.provenance import provenance
from hici.report.training import plot_training
from hici.rope import check_context, extend_rope
from hici.train.recipe import SCHEDULES, Recipe
from hici.train.trainer import HiCITrainer, LanguageModel

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Run a recipe. Returns what train.json holds; the adapter is in output_dir/adapter.

    Raises:
        ValueError: bad data, model or recipe; an existing adapter without `overwrite` (before any work);
            TrainingDivergedError on a NaN or infinite gradient.
    """
    output = Path(recipe.output_dir).expanduser()
    _check_output(output, recipe)
    _refuse_several_processes()
    set_seed(recipe.seed)
    tokenizer, model = load_base(recipe)
    data = prepare_data(recipe, tokenizer, model.config.vocab_size, progress=progress)
    model = prepare_model(recipe, model)
    with tempfile.TemporaryDirectory(prefix="hici-train-") as scratch:
        trainer = make_trainer(recipe, model, data, scratch, progress=progress)
        before = heldout_losses(trainer, recipe)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = heldout_losses(trainer, recipe)
    directory = save_pretrained(
        model,
        output / "adapter",
        tokenizer=tokenizer,
        context_length=recipe.context_length,
        training=training_facts(recipe, data, trainer.state.log_history),
        overwrite=recipe.overwrite,
    )
    hici, others = trainable_parameters(trainer.model)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "recipe": recipe.to_dict(),
        "adapter": str(directory),
        "attention": HICI,
        "visibility": recipe.hici_config().visibility,
        "leaks_future": {HICI: leaks_future(model), FULL: False},
        "data": data.summary,
        "trainable_parameters": {"hici": sum(p.numel() for p in hici), "other": sum(p.numel() for p in others)},
        "steps": steps,
        "heldout_loss": {"before": before, "after": after, "unit": "nats a token"},
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(trainer.args.device),
        "made_with": provenance(),
    }
    write_json(output / "train.json", result)
    plot_training(steps, output / "train.png")
    return result


def load_base(recipe: Recipe) -> tuple[Any, Any]:
    """(tokenizer, model) of the recipe, rope extended to its context."""
    name = os.path.expanduser(recipe.model)  # not Path: a hub name keeps its slash everywhere
    model = load_plain_model(name, dtype=getattr(torch, recipe.dtype))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {recipe.model} could not be loaded ({first_line(error)}); put its files beside the model"
        ) from error
    if recipe.rope == "none":
        check_context(model.config, recipe.context_length)
    else:
        extend_rope(model, recipe.context_length, method=recipe.rope)
    return tokenizer, model


def prepare_data(recipe: Recipe, tokenizer: Any, vocab_size: int, *, progress: bool = False) -> PreparedData:
    """The recipe's data, tokenised, split and packed (`hici.data.prepare`)."""
    data = prepare(data_options(recipe), tokenizer, vocab_size=vocab_size, progress=progress)
    needed = recipe.max_steps * recipe.batch_size * recipe.gradient_accumulation_steps
    if needed > len(data.train):
        logger.warning("%d sequences are needed but there are %d: they repeat", needed, len(data.train))
    return data


def data_options(recipe: Recipe) -> DataOptions:
    """The recipe's keys about data."""
    return DataOptions(
        sources=recipe.data,
        length=recipe.context_length,
        seed=recipe.seed,
        data_format=recipe.data_format,
        text_key=recipe.text_key,
        packing=recipe.packing,
        prompt=recipe.prompt,
        overlong=recipe.overlong,
        heldout_sources=recipe.heldout_data,
        heldout_fraction=recipe.heldout_fraction,
        heldout_windows=recipe.heldout_windows,
        hub_split=recipe.hub_split,
        hub_config=recipe.hub_config,
        streaming=recipe.streaming,
        max_documents=recipe.max_documents,
        token_cache=recipe.token_cache,
        workers=recipe.data_workers,
    )


def prepare_model(recipe: Recipe, model: Any) -> Any:
    """Attach HiCI and LoRA; trained parameters in float32 (bfloat16 would round small updates away)."""
    attach(model, recipe.hici_config())
    wrapped = add_lora(
        model,
        r=recipe.lora_r,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        embeddings=recipe.train_embeddings,
        norms=recipe.train_norms,
    )
    for group in trainable_parameters(wrapped):
        for parameter in group:
            parameter.data = parameter.data.float()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return wrapped


def make_trainer(recipe: Recipe, model: Any, data: PreparedData, scratch: str, *, progress: bool) -> HiCITrainer:
    """The Trainer of a recipe; it writes nothing itself."""
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=0.0,  # each group is clipped on its own (trainer._Clip)
        bf16=recipe.dtype == "bfloat16",
        use_cpu=recipe.device == "cpu" or not torch.accelerator.is_available(),
        logging_steps=recipe.logging_steps,
        save_strategy="no",
        report_to="none",
        seed=recipe.seed,
        disable_tqdm=not progress,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would choose DataParallel, which replicates modules without their attributes
    return HiCITrainer(
        model=LanguageModel(model),
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        data_collator=collate,
        hici_learning_rate=recipe.hici_learning_rate,
        clips={"hici": recipe.hici_max_grad_norm, "other": recipe.max_grad_norm},
    )


def training_facts(recipe: Recipe, data: PreparedData, log: list[dict[str, Any]]) -> dict[str, Any]:
    """What the model card says about the training."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    sequences = recipe.batch_size * recipe.gradient_accumulation_steps
    return {
        "attention": f"{HICI}, visibility {recipe.hici_config().visibility}",
        "optimizer steps": recipe.max_steps,
        "tokens a step": sequences * recipe.context_length,
        "documents": data.summary["documents"],
        "learning rate": recipe.learning_rate,
        "learning rate of the HiCI modules": recipe.hici_learning_rate,
        "schedule": recipe.schedule,
        "LoRA": f"r={recipe.lora_r}, alpha={recipe.lora_alpha}",
        "last training loss": losses[-1] if losses else None,
        "seed": recipe.seed,
    }


def heldout_losses(trainer: HiCITrainer, recipe: Recipe) -> dict[str, float]:
    """Mean held-out loss in nats a token, in "hici" and in the model's stock ("full") attention."""
    if not recipe.heldout_windows:
        return {}
    model, losses = trainer.model.model, {}
    trained_in = attention_mode(model)
    for attention in (HICI, FULL):
        set_attention(model, attention)
        metrics = trainer.evaluate(metric_key_prefix=f"heldout_{attention}")
        losses[attention] = float(metrics[f"heldout_{attention}_loss"])
    set_attention(model, trained_in)
    return losses


def _check_output(output: Path, recipe: Recipe) -> None:
    """Before any work: nothing that is there would be lost, and the results can be written."""
    check_target(output / "adapter", overwrite=recipe.overwrite, marker=RECORD_FILE)
    for file in (output / "train.json", output / "train.png"):
        if file.is_dir():
            raise ValueError(f"{file} is a directory, but a file is to be written there; give another output_dir")
        if file.exists() and not recipe.overwrite:
            raise ValueError(
                f"{file} exists, and nothing is overwritten silently; give another output_dir or --overwrite true"
            )


def _refuse_several_processes() -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ValueError(
            f"WORLD_SIZE={world}: `hici train` runs in one process for now (each rank would write the same files); "
            "start it without torchrun or accelerate launch"
        )
