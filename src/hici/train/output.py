"""The output directory of a run: what may be there before, the space it needs, and what is written at the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hici.adapters.file_names import RECORD_FILE
from hici.adapters.lora import trainable_parameters
from hici.files import check_target, refuse_sources
from hici.train.checkpoint import checkpoints_of, remove_checkpoints
from hici.train.recipe import Recipe
from hici.train.setup import describe_method

RESULTS = ("train.json", "train.png", "metrics.jsonl")
CHECKPOINTS, ADAPTER, TENSORBOARD = "checkpoints", "adapter", "tensorboard"
TRAINED_BYTES = 4  # trained parameters are float32
_MOMENTS = 2


def check_output(output: Path, recipe: Recipe, *, resume: bool) -> None:
    """Before any work: nothing that is there would be lost, and the results can be written.

    Raises:
        ValueError: results of an earlier run without `resume` or `overwrite`; a place that cannot be written.
    """
    for name in (ADAPTER, CHECKPOINTS, TENSORBOARD):  # are replaced, or removed
        refuse_sources(output / name, recipe.model, *recipe.data, *(recipe.heldout_data or []))
    may_replace = resume or recipe.overwrite
    check_target(output / ADAPTER, overwrite=may_replace, marker=RECORD_FILE)
    for file in (output / name for name in RESULTS):
        if file.is_dir():
            raise ValueError(f"{file} is a directory, but a file is to be written there; give another output_dir")
        if file.exists() and not may_replace:
            raise ValueError(
                f"{file} exists, and nothing is overwritten silently; go on with --resume, or give another output_dir "
                "or --overwrite true"
            )
    for what, found in (
        ("checkpoints", checkpoints_of(output / CHECKPOINTS)),
        ("TensorBoard's files", _boards(output)),
    ):
        if found and not may_replace:
            raise ValueError(
                f"{found[0].parent} holds {what} of an earlier run; go on from its last checkpoint with --resume, or "
                "give another output_dir or --overwrite true, which removes them"
            )
    ended = next((name for name in (ADAPTER, "train.json") if (output / name).exists()), None)
    if resume and ended and not recipe.overwrite and not checkpoints_of(output / CHECKPOINTS):
        raise ValueError(
            f"{output} holds the {ended} of an earlier run and no checkpoint, so there is nothing to go on from; give "
            "another output_dir, or --overwrite true to start anew there"
        )


def remove_old_results(output: Path) -> None:
    """Remove an earlier run's checkpoints and logs (its adapter is replaced when the new one is whole)."""
    remove_checkpoints(output / CHECKPOINTS)
    for path in (*_boards(output), *(output / name for name in RESULTS)):
        path.unlink(missing_ok=True)


def _boards(output: Path) -> list[Path]:
    return sorted((output / TENSORBOARD).glob("events.out.tfevents.*"))


def remove_leftovers(output: Path) -> None:
    """Remove what killed runs left under temporary names beside the results, once these stand."""
    for name in (ADAPTER, *RESULTS):
        for path in output.glob(f".{name}.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def space_needed(recipe: Recipe, trained: int) -> int:
    """Bytes of a run's files on disk: an adapter and the checkpoints that stand at one time."""
    adapter = TRAINED_BYTES * trained
    checkpoint = adapter * (1 + _MOMENTS)
    standing = recipe.keep_checkpoints + 1 if recipe.save_steps else 0  # the old ones go after the new one is whole
    written = -(-recipe.max_steps // max(1, recipe.save_steps))  # the last step has one too
    return adapter + checkpoint * min(standing, written)


def free_space(output: Path) -> int:
    """Free bytes where `output` is or will be."""
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_space(recipe: Recipe, output: Path, model: Any) -> None:
    """Raise ValueError when the disk cannot hold what the run will write."""
    needed = space_needed(recipe, sum(p.numel() for group in trainable_parameters(model) for p in group))
    # earlier checkpoints make way for this run's
    held = sum(path.stat().st_size for path in (output / CHECKPOINTS).rglob("*") if path.is_file())
    free = free_space(output) + held
    if free < needed:
        raise ValueError(
            f"{output} has {free / 1e9:.1f} GB free, but the run writes up to {needed / 1e9:.1f} GB (adapter and "
            f"{recipe.keep_checkpoints} checkpoints); make room, lower keep_checkpoints, or give another output_dir"
        )


def training_facts(recipe: Recipe, summary: dict[str, Any], rows_a_step: int, steps: list[dict[str, Any]]) -> Any:
    """What the model card says about the training."""
    return {
        "attention": describe_method(recipe),
        "optimizer steps": recipe.max_steps,
        "sequences a step": rows_a_step,
        "context": recipe.context_length,
        "documents": summary["documents"],
        "learning rate": recipe.learning_rate,
        "learning rate of the HiCI modules": recipe.hici_learning_rate,
        "schedule": recipe.schedule,
        "LoRA": f"r={recipe.lora_r}, alpha={recipe.lora_alpha}",
        "last training loss": steps[-1]["loss"] if steps else None,
        "seed": recipe.seed,
    }
