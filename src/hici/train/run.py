"""`hici train`: recipe -> data, model, Trainer -> adapter directory, train.json and train.png."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, TrainingArguments, set_seed

from hici.adapters.file_names import RECORD_FILE
from hici.adapters.lora import add_lora, trainable_parameters
from hici.adapters.save import save_pretrained
from hici.data.documents import Document, load_documents
from hici.data.packing import content_hash, pack, split_documents
from hici.files import check_target, write_json
from hici.machine import peak_memory
from hici.models.attach import attach
from hici.models.load import first_line, load_plain_model
from hici.models.lookup import FULL, HICI, attention_mode
from hici.models.modes import leaks_future, set_attention
from hici.provenance import provenance
from hici.report.runs import read_run
from hici.report.training import plot_training
from hici.rope import check_context, extend_rope
from hici.train.recipe import SCHEDULES, Recipe
from hici.train.trainer import HiCITrainer, LanguageModel, Sequences

logger = logging.getLogger(__name__)


class TrainingData(NamedTuple):
    """Packed sequences [n, T] for training and held out, and where they came from."""

    train: np.ndarray
    heldout: np.ndarray
    summary: dict[str, Any]


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
    data = prepare_data(recipe, tokenizer, model.config.vocab_size)
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
    plot_training([read_run(output)], output / "train.png")
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


def prepare_data(recipe: Recipe, tokenizer: Any, vocab_size: int) -> TrainingData:
    """Documents, the held-out split by document, and packed sequences."""
    documents = load_documents(recipe.data, tokenizer, vocab_size=vocab_size, text_key=recipe.text_key)
    if recipe.heldout_data is not None:
        training = documents
        heldout = load_documents(recipe.heldout_data, tokenizer, vocab_size=vocab_size, text_key=recipe.text_key)
        _refuse_overlap(training, heldout)
    else:
        training, heldout = split_documents(documents, recipe.heldout_fraction if recipe.heldout_windows else 0.0)
    length, eos = recipe.context_length, tokenizer.eos_token_id
    packed = pack(training, length, eos, seed=recipe.seed)
    windows = np.zeros((0, length), dtype=np.int64)
    if recipe.heldout_windows:
        what = f"the held-out part (heldout_fraction {recipe.heldout_fraction}, heldout_data or heldout_windows 0 help)"
        windows = pack(heldout, length, eos, seed=recipe.seed, what=what)[: recipe.heldout_windows]
    needed = recipe.max_steps * recipe.batch_size * recipe.gradient_accumulation_steps
    if needed > len(packed):
        logger.warning("%d sequences are needed but there are %d: they repeat", needed, len(packed))
    summary = {
        "documents": len(training),
        "heldout_documents": len(heldout),
        "sequences": len(packed),
        "tokens": sum(len(d.tokens) for d in training),
        "tokens_outside_of_whole_sequences": sum(len(d.tokens) + (eos is not None) for d in training) - packed.size,
        "heldout_windows": len(windows),
        "heldout_sources": [d.source for d in heldout],
    }
    return TrainingData(packed, windows, summary)


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


def make_trainer(recipe: Recipe, model: Any, data: TrainingData, scratch: str, *, progress: bool) -> HiCITrainer:
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
        train_dataset=Sequences(data.train),
        eval_dataset=Sequences(data.heldout),
        hici_learning_rate=recipe.hici_learning_rate,
        clips={"hici": recipe.hici_max_grad_norm, "other": recipe.max_grad_norm},
    )


def training_facts(recipe: Recipe, data: TrainingData, log: list[dict[str, Any]]) -> dict[str, Any]:
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


def _refuse_overlap(training: list[Document], heldout: list[Document]) -> None:
    """The same text on both sides would make the held-out loss one of training."""
    trained = {content_hash(document): document.source for document in training}
    both = [(trained[content_hash(d)], d.source) for d in heldout if content_hash(d) in trained]
    if both:
        raise ValueError(
            f"{len(both)} held-out documents are in the training data too, the first one as {both[0][0]} and "
            f"{both[0][1]}; take them out of data or of heldout_data"
        )


def _refuse_several_processes() -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ValueError(
            f"WORLD_SIZE={world}: `hici train` runs in one process for now (each rank would write the same files); "
            "start it without torchrun or accelerate launch"
        )
