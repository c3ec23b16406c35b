"""A recipe's base and the model that is trained: rope, HiCI modules or none, LoRA, precision, memory savings."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed

from hici.adapters.lora import add_lora, trainable_parameters
from hici.config import HiCIConfig
from hici.models.attach import attach
from hici.models.load import first_line
from hici.models.lookup import FULL, HICI
from hici.models.modes import set_attention
from hici.models.offload import StreamTransfers, enable_checkpointing, offload_checkpoints
from hici.models.quantized import NONE, load_quantized
from hici.models.tiled_mlp import tile_mlp
from hici.processes import local_rank, wants_deepspeed, wants_fsdp
from hici.rope import check_context, extend_rope
from hici.train.optimizers import ADAMW
from hici.train.recipe import Recipe

# FSDP's settings, the value that does not work, accelerate's default, and why not
_REFUSED = (
    ("FSDP_VERSION", "1", "1", "only FSDP2 trains frozen and trained parameters together; write fsdp_version: 2"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "false", "every process makes its own HiCI modules; write "
     "fsdp_cpu_ram_efficient_loading: false"),
)  # fmt: skip


def check_device(recipe: Recipe) -> None:
    """Raise ValueError when the recipe asks for a GPU, or for what only a GPU has, and there is none."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', but torch sees no CUDA device here; run the recipe on a machine with one, or give --device "
            "cpu (with a model and a context that a CPU can train)"
        )
    if recipe.offload_checkpoints and uses_cpu(recipe):
        raise ValueError(
            "offload_checkpoints=true on the CPU, where the checkpoints are in the CPU's memory already; take it out"
        )


def uses_cpu(recipe: Recipe) -> bool:
    """Whether the run is on the CPU."""
    return recipe.device == "cpu" or not torch.cuda.is_available()


def check_launcher() -> None:
    """Raise ValueError when the launcher's settings contradict the recipe's."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        raise ValueError(
            f"the launch config says mixed_precision {precision!r}, but precision is the recipe's key dtype; write "
            "mixed_precision: 'no' in the config (see recipes/accelerate)"
        )
    for setting, means, absent, remedy in _REFUSED if wants_fsdp() else ():
        if os.environ.get(setting, absent).lower() == means:
            raise ValueError(
                f"the launch config says {setting.removeprefix('FSDP_').lower()} {means}, but {remedy} "
                "(see recipes/accelerate/fsdp2.yaml)"
            )
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        raise ValueError(
            "the launch config has a parallelism_config (tensor, context or sequence parallelism), but hici divides a "
            "step by sequences only; take it out (see recipes/accelerate)"
        )


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """What the recipe computes in where that is not what its trained parameters are in."""
    return torch.bfloat16 if recipe.dtype == "bfloat16" else None


def load_base(recipe: Recipe) -> tuple[Any, Any]:
    """(tokenizer, model) of the recipe, rope extended to its context."""
    name = os.path.expanduser(recipe.model)  # not Path: a hub name keeps its slash everywhere
    # quantised weights are made where they stay
    place = None if recipe.quantization == NONE or uses_cpu(recipe) else {"": local_rank()}
    model = load_quantized(name, recipe.quantization, dtype=getattr(torch, recipe.dtype), device_map=place)
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


def prepare_model(recipe: Recipe, model: Any) -> Any:
    """Attach HiCI and LoRA; trained parameters in float32 (bfloat16 would round small updates away)."""
    attach(model, attached_config(recipe))
    set_seed(recipe.seed)  # LoRA begins alike in every method, whatever modules were made before
    wrapped = add_lora(
        model,
        r=recipe.lora_r,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        embeddings=recipe.train_embeddings,
        norms=recipe.train_norms,
    )
    if recipe.method != HICI:
        for parameter in trainable_parameters(wrapped)[0]:
            parameter.requires_grad_(False)
    for group in trainable_parameters(wrapped):
        for parameter in group:
            parameter.data = parameter.data.float()
    if recipe.offload_checkpoints and not on_meta(model):
        # an engine may put the model on its GPU later
        offload_checkpoints(model, transfers=None if uses_cpu(recipe) else StreamTransfers())
    elif recipe.gradient_checkpointing:
        enable_checkpointing(model)
    if recipe.mlp_tile is not None:
        tile_mlp(model, recipe.mlp_tile)
    set_attention(wrapped, recipe.method)
    return wrapped


def on_meta(model: Any) -> bool:
    """Whether the model has shapes only."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def check_engine(recipe: Recipe) -> None:
    """Raise ValueError for what bitsandbytes cannot do when an engine divides the parameters."""
    engine = "FSDP" if wants_fsdp() else "DeepSpeed" if wants_deepspeed() else None
    if engine is None:
        return
    for key, plain in (("quantization", NONE), ("optimizer", ADAMW)):
        value = getattr(recipe, key)
        if value != plain:
            raise ValueError(
                f"{key}={value!r} with {engine}, which divides tensors that bitsandbytes keeps in blocks; give "
                f"{plain!r}, or start the run with DDP (torchrun)"
            )


def attached_config(recipe: Recipe) -> HiCIConfig:
    """What is attached: the recipe's HiCI modules; for the baselines the smallest ones, which stay frozen and unused.

    A baseline goes by the same segments (shifted sparse attention) and the same directory of results.
    """
    config = recipe.hici_config()
    if recipe.method == HICI:
        return config
    return HiCIConfig(
        num_local_slots=1, num_global_slots=1, num_heads=1, bottleneck_dim=1, compress_dim=1, use_global=False,
        use_local=False, backend=config.backend, visibility="past", decode="raw",
        num_segments=config.num_segments, segment_size=config.segment_size,
    )  # fmt: skip


def describe_method(recipe: Recipe) -> str:
    """The method in words, for a model card and a table."""
    if recipe.method == FULL:
        return "full attention (LoRA, no HiCI modules)"
    counts = "" if recipe.segment_counts is None else f", segments drawn from {recipe.segment_counts}"
    if recipe.method == HICI:
        return f"{HICI}, visibility {recipe.hici_config().visibility}{counts}"
    return f"{recipe.method}: shifted sparse attention (LoRA, no HiCI modules){counts}"
