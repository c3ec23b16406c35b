"""What a recipe would do, without reading weights or text: `hici train --dry-run`."""

from __future__ import annotations

import glob
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import psutil
import torch

from hici.models.architectures import get_architecture
from hici.models.architectures.base import is_hici_name
from hici.models.load import load_config, meta_model
from hici.models.lookup import FULL, HICI
from hici.presets import load_preset, preset_names
from hici.processes import wants_deepspeed, wants_fsdp, world_size
from hici.report.memory import BYTES, Training
from hici.report.summary import segment_plan, training_estimate
from hici.rope import check_context, config_rope_parameters, extended_rope, far_rope
from hici.train.output import ADAPTER, TRAINED_BYTES, check_output, check_space, free_space, space_needed
from hici.train.recipe import Recipe
from hici.train.setup import (
    attached_config,
    check_device,
    check_engine,
    check_launcher,
    describe_method,
    prepare_model,
    uses_cpu,
)
from hici.train.tracking import check_tracking


def dry_run(recipe: Recipe, *, data_summary: dict[str, Any] | None = None, resume: bool = False) -> dict[str, Any]:
    """The plan of a recipe as plain JSON values; `hici.report.plan.print_plan` shows it.

    Only the base's config is read; for a hub name that cannot be reached, the preset of that name is taken in its
    place. What would stop the run or make it another one than was meant is listed under "problems".

    Args:
        data_summary: counts of prepared data (`sequences` is used), where there are any.
        resume: as the run would be started.

    Raises:
        ValueError: no config; a model type or a HiCI config that does not go with it.
    """
    problems: list[str] = []
    model_config = _read_config(recipe, problems)
    rope = _set_rope(recipe, model_config, problems)
    with torch.device("meta"):
        wrapped = prepare_model(recipe, meta_model(model_config))
    parts, frozen = count_parameters(wrapped, model_config.model_type)
    trained = sum(parts.values())
    memory = training_estimate(
        model_config,
        attached_config(recipe),
        how_trained(recipe),
        model=wrapped,
        held=trained + frozen,
        trained=trained,
        context=recipe.context_length,
        dtype=recipe.dtype,
        batch=recipe.batch_size,
    )
    output = Path(recipe.output_dir).expanduser()
    plan = {
        "model": recipe.model,
        "model_type": model_config.model_type,
        "method": describe_method(recipe),
        "context": recipe.context_length,
        "rope": rope,
        "segments": _segments(recipe),
        "trained_parameters": parts,
        "frozen_parameters": frozen,
        "bytes_of_weights": {"trained": TRAINED_BYTES * trained, "frozen": BYTES[recipe.dtype] * frozen},
        "rates": _rates(recipe),
        "schedule": f"{recipe.schedule} after {recipe.warmup_steps} warm-up steps",
        "work": _work(recipe, data_summary),
        "data": {"sources": recipe.data, "summary": data_summary},
        "memory": memory,
        "disk": {"needed": space_needed(recipe, trained), "free": free_space(output), "at": str(output)},
        "devices": _devices(recipe),
    }
    problems += _problems(recipe, output, wrapped, resume=resume)
    problems += _too_large(sum(memory.values()), plan["devices"])
    return {**plan, "problems": problems}


def count_parameters(wrapped: Any, model_type: str) -> tuple[dict[str, int], int]:
    """(trained parameters by kind, frozen ones) of a prepared model."""
    architecture = get_architecture(model_type)
    parts: dict[str, int] = {}
    frozen = 0
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            frozen += parameter.numel()
            continue
        if is_hici_name(name):
            kind = "HiCI modules"
        elif ".lora_" in name:
            kind = "LoRA"
        else:
            kind = "embeddings" if f".{architecture.embeddings}." in name else "norms"
        parts[kind] = parts.get(kind, 0) + parameter.numel()
    return parts, frozen


def _read_config(recipe: Recipe, problems: list[str]) -> Any:
    name = os.path.expanduser(recipe.model)
    try:
        return load_config(name)
    except ValueError as error:
        preset = _preset_of(recipe.model)
        if preset is None or Path(name).exists():
            raise
        problems.append(f"{error}. The numbers here are those of the preset {preset}")
    from transformers import AutoConfig

    config = AutoConfig.for_model(**load_preset(preset))
    config.name_or_path = recipe.model
    return config


def _preset_of(name: str) -> str | None:
    """meta-llama/Llama-2-7b-hf -> llama-2-7b; None for a path, or where there is no such preset."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # a path
        return None
    short = name.rpartition("/")[2].lower().removesuffix("-hf").removeprefix("meta-")
    return short if short in preset_names() else None


def _set_rope(recipe: Recipe, model_config: Any, problems: list[str]) -> str:
    """Extend the config's rope as the run would; in words."""
    positions, context = model_config.max_position_embeddings, recipe.context_length
    try:
        if recipe.rope == "none":
            check_context(model_config, context)
        parameters = extended_rope(model_config, context, recipe.rope if recipe.rope != "none" else None)
    except ValueError as error:
        problems.append(str(error))
        return f"{positions:,} positions"
    if context <= positions:
        return f"{positions:,} positions, enough for {context:,}"
    config_rope_parameters(model_config, parameters, context)
    far = far_rope(parameters)
    return f"{positions:,} positions, extended to {context:,} by {far['rope_type']}, factor {far['factor']:g}"


def _segments(recipe: Recipe) -> list[list[list[int]]]:
    """The segment plans that a step may have; none for full attention."""
    if recipe.method == FULL:
        return []
    config = recipe.hici_config()
    configs = [config]
    if recipe.segment_counts is not None:
        configs = [config.replace(num_segments=count, segment_size=None) for count in recipe.segment_counts]
    return [segment_plan(recipe.context_length, one) for one in configs]


def _rates(recipe: Recipe) -> dict[str, dict[str, float | None]]:
    """Learning rate and gradient clip (None: no clip) of each group of parameters."""
    groups = {"LoRA, embeddings, norms": (recipe.learning_rate, recipe.max_grad_norm)}
    if recipe.method == HICI:
        groups["HiCI modules"] = (recipe.hici_learning_rate, recipe.hici_max_grad_norm)
    return {
        name: {"learning_rate": rate, "clip": clip if math.isfinite(clip) else None}
        for name, (rate, clip) in groups.items()
    }


def _work(recipe: Recipe, data_summary: dict[str, Any] | None) -> dict[str, Any]:
    sequences = recipe.batch_size * recipe.gradient_accumulation_steps * world_size()
    available = None if data_summary is None else data_summary.get("sequences")
    return {
        "processes": world_size(),
        "steps": recipe.max_steps,
        "sequences_per_step": sequences,
        "tokens_per_step": sequences * recipe.context_length,
        "sequences": sequences * recipe.max_steps,
        "tokens": sequences * recipe.context_length * recipe.max_steps,
        "epochs": sequences * recipe.max_steps / available if available else None,
    }


def how_trained(recipe: Recipe) -> Training:
    """The recipe's keys that change the memory."""
    return Training(
        method=recipe.method,
        gradient_checkpointing=recipe.gradient_checkpointing,
        offload_checkpoints=recipe.offload_checkpoints,
        mlp_tile=recipe.mlp_tile,
        optimizer=recipe.optimizer,
        quantization=recipe.quantization,
        processes=world_size() if wants_fsdp() or wants_deepspeed() else 1,
    )


def _devices(recipe: Recipe) -> list[dict[str, Any]]:
    """Name and bytes of memory of what the run would use; none where what the recipe asks for is not there."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        return []
    if uses_cpu(recipe) or not torch.cuda.is_available():
        return [{"name": f"CPU, {torch.get_num_threads()} threads", "memory": psutil.virtual_memory().total}]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory": device.total_memory} for device in found]


def _problems(recipe: Recipe, output: Path, wrapped: Any, *, resume: bool) -> list[str]:
    """What the run itself would refuse, and what it would do otherwise than was meant."""
    found = []
    for check in (
        lambda: check_device(recipe),
        check_launcher,
        lambda: check_engine(recipe),
        lambda: check_tracking(recipe),
        lambda: check_output(output, recipe, resume=resume),
        lambda: check_space(recipe, output, wrapped),
    ):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    for source in [*recipe.data, *(recipe.heldout_data or [])]:
        path = os.path.expanduser(source)
        if not source.startswith("hub:") and not os.path.exists(path) and not glob.glob(path, recursive=True):
            found.append(f"{source} names no file; give data that is there")
    if recipe.warmup_steps >= recipe.max_steps:
        found.append(
            f"warmup_steps={recipe.warmup_steps} is not below max_steps={recipe.max_steps}, so the learning rates are "
            "never reached; lower it"
        )
    needs_bitsandbytes = recipe.quantization != "none" or recipe.optimizer != "adamw"
    if needs_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        found.append(
            f"quantization={recipe.quantization!r} and optimizer={recipe.optimizer!r} need bitsandbytes, which is not "
            "installed; pip install 'hici[quantization]'"
        )
    if not resume and (output / ADAPTER).exists() and recipe.overwrite:
        found.append(f"overwrite=true: {output / ADAPTER} and the other results there will be replaced")
    return found


def _too_large(needed: int, devices: list[dict[str, Any]]) -> list[str]:
    smallest = min((device["memory"] for device in devices), default=math.inf)
    if needed <= smallest:
        return []
    return [
        f"a step needs about {needed / 2**30:.1f} GiB, but the device has {smallest / 2**30:.1f} GiB; shard over "
        "several GPUs (recipes/accelerate/fsdp2.yaml), shorten the context, or set offload_checkpoints or mlp_tile"
    ]
