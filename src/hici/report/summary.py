"""Parameters, segments and memory of a model with HiCI, counted on the meta device: no weights are read or made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hici.adapters.lora import add_lora
from hici.config import HiCIConfig
from hici.core.segments import count_segments
from hici.models.architectures import get_architecture
from hici.models.architectures.base import is_hici_name
from hici.models.attach import attach, hici_state_dict
from hici.models.load import meta_model
from hici.models.lookup import HICI, get_decoder
from hici.report.memory import (
    BYTES,
    Shape,
    Training,
    bounded_memory,
    generation_memory,
    offloaded_memory,
    training_memory,
)
from hici.rope import extended_rope, far_rope

VISIBILITY = {
    "all": "tokens of segment i see G over every segment and L_i; not causal",
    "current": "tokens of segment i see G over 1..i and L_i; not causal within the segment",
    "past": "tokens of segment i see G over 1..i-1 and L_(i-1); causal",
}


@dataclass(frozen=True)
class Summary:
    """What `hici info` shows; parameters are counts, memory is in bytes by part.

    Attributes:
        segments: sizes of the segments of `context` tokens, run-length coded: [[count, size], ...].
        modules: parameters of one layer's HiCI modules, by their first two names.
        rope: how the context fits the model's positions.
        sliding_window: tokens; segments must not be longer. None: no layer has one.
        trained_as: what the memory of training is of.
        training: on one device; `offloaded` comes to it in the CPU's memory.
    """

    model_type: str
    layers: int
    width: int
    base_parameters: int
    hici_parameters: int
    hici_parameters_per_layer: int
    hici_percent: float
    trained_parameters: int
    modules: dict[str, int]
    context: int
    segments: list[list[int]]
    visibility: str | None
    hici: dict[str, Any]
    max_position_embeddings: int
    rope: str
    sliding_window: int | None
    dtype: str
    batch: int
    trained_as: dict[str, Any]
    training: dict[str, int]
    offloaded: int
    generation: dict[str, int]
    bounded: dict[str, int] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def summarise(
    model_config: Any,
    config: HiCIConfig,
    *,
    context: int | None = None,
    dtype: str = "bfloat16",
    batch: int = 1,
    lora_rank: int = 8,
    training: Training | None = None,
) -> Summary:
    """Count and estimate for a transformers config with HiCI and a LoRA as `hici.add_lora` makes it.

    Args:
        context: tokens; None: the model's positions.
        dtype, batch: of the memory estimate.
        training: how it is trained; None: as `hici train` does without other keys. By another method than "hici" the
            model is without HiCI modules, and so are the parameters and the memory of training.

    Raises:
        ValueError: an unsupported model type, a config that does not fit, a context below 1.
    """
    training = training or Training()
    context = model_config.max_position_embeddings if context is None else context
    if context < 1:
        raise ValueError(f"context={context} is below 1; give the number of tokens")
    model = attach(meta_model(model_config), config)
    hici = {name: tensor.numel() for name, tensor in hici_state_dict(model).items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    layers, count = model_config.num_hidden_layers, sum(hici.values())
    with torch.device("meta"):  # PEFT makes the copy of a tied head anew: 1.2 GB of real numbers for Gemma 3 1B
        wrapped = add_lora(model, r=lora_rank)
    parameters = list(wrapped.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    held = sum(parameter.numel() for parameter in parameters)
    if training.method != HICI:
        trained, held = trained - count, held - count
    shape = _shape(model_config, config, total, held=held, trained=trained, linear=_linear(model))
    return Summary(
        model_type=model_config.model_type,
        layers=layers,
        width=model_config.hidden_size,
        base_parameters=total - count,
        hici_parameters=count,
        hici_parameters_per_layer=count // layers,
        hici_percent=100 * count / total,
        trained_parameters=trained,
        modules=_first_layer(hici, get_architecture(model_config.model_type).attention),
        context=context,
        segments=segment_plan(context, config),
        visibility=config.visibility if config.use_global or config.use_local else None,
        hici=config.to_dict(),
        max_position_embeddings=model_config.max_position_embeddings,
        rope=_rope(model_config, context),
        sliding_window=shape.window if shape.window_layers else None,
        dtype=dtype,
        batch=batch,
        trained_as=asdict(training),
        training=training_memory(shape, context, batch=batch, number_bytes=BYTES[dtype], training=training),
        offloaded=offloaded_memory(shape, context, batch=batch) if training.offload_checkpoints else 0,
        generation=generation_memory(shape, context, batch=batch, number_bytes=BYTES[dtype]),
        bounded=bounded_memory(shape, context, config.segment_size, batch=batch, number_bytes=BYTES[dtype])
        if config.bounded_decode and config.segment_size is not None
        else None,
    )


def segment_plan(context: int, config: HiCIConfig) -> list[list[int]]:
    """[[count, size], ...] of the segments of `context` tokens: whole ones, then a shorter last one if there is one."""
    size = config.resolve_segment_size(context)
    tail = context % size
    whole = count_segments(context, size) - bool(tail)
    return [[count, tokens] for count, tokens in ((whole, size), (1, tail)) if count and tokens]


def describe_plan(plan: list[list[int]]) -> str:
    """[[3, 4096], [1, 100]] -> "3 segments of 4,096 tokens and a last one of 100"."""
    count, size = plan[0]
    text = f"{count} segment{'s' if count > 1 else ''} of {size:,} tokens"
    return text if len(plan) == 1 else f"{text} and a last one of {plan[1][1]:,}"


def _linear(model: Any) -> int:
    """Numbers in the linear layers of the decoder, HiCI's and LoRA's left out: what quantisation packs."""
    return sum(
        module.weight.numel()
        for name, module in get_decoder(model).named_modules()
        if isinstance(module, torch.nn.Linear) and not is_hici_name(f".{name}.") and ".lora_" not in name
    )


def _shape(model_config: Any, config: HiCIConfig, total: int, *, held: int, trained: int, linear: int = 0) -> Shape:
    heads = model_config.num_attention_heads
    window = getattr(model_config, "sliding_window", None)
    layer_types = getattr(model_config, "layer_types", None) or ["sliding_attention"] * model_config.num_hidden_layers
    return Shape(
        layers=model_config.num_hidden_layers,
        width=model_config.hidden_size,
        mlp_width=model_config.intermediate_size,
        heads=heads,
        kv_heads=getattr(model_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(model_config, "head_dim", None) or model_config.hidden_size // heads,
        vocabulary=model_config.vocab_size,
        local_scores=config.num_heads * config.num_local_slots,
        local_context=config.num_local_slots * (config.bottleneck_dim or model_config.hidden_size),
        slots=config.slots_in_use,
        parameters=total,
        held_in_training=held,
        trained=trained,
        head_trains=bool(model_config.tie_word_embeddings),
        gated_mlp=get_architecture(model_config.model_type).gated_mlp,
        linear=linear,
        window=window or 0,
        window_layers=layer_types.count("sliding_attention") if window else 0,
    )


def _first_layer(hici: dict[str, int], attention: str) -> dict[str, int]:
    """Parameters of layer 0's modules: "local_constructor.q_proj" -> count."""
    modules: dict[str, int] = {}
    for name, count in hici.items():
        layer, _, rest = name.partition(f".{attention}.")
        if layer.endswith("layers.0"):
            key = ".".join(rest.split(".")[:2])
            modules[key] = modules.get(key, 0) + count
    return modules


def _rope(model_config: Any, context: int) -> str:
    positions = model_config.max_position_embeddings
    if context <= positions:
        return f"{positions:,} positions, enough for {context:,}"
    kind = far_rope(model_config.rope_parameters)["rope_type"]
    try:
        factor = far_rope(extended_rope(model_config, context))["factor"]
    except ValueError:
        return f"{positions:,} positions, scaled already: {context:,} needs other rope settings"
    return f"{positions:,} positions; {context:,} needs {'linear' if kind == 'default' else kind} scaling by {factor:g}"


def training_estimate(
    model_config: Any,
    config: HiCIConfig,
    training: Training,
    *,
    model: Any,
    held: int,
    trained: int,
    context: int,
    dtype: str,
    batch: int,
) -> dict[str, int]:
    """Bytes by part of a step of a prepared `model` with `held` parameters in memory, `trained` of them trained."""
    shape = _shape(model_config, config, held, held=held, trained=trained, linear=_linear(model))
    return training_memory(shape, context, batch=batch, number_bytes=BYTES[dtype], training=training)
