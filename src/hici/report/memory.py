"""Memory of training and of generation, estimated from an architecture's numbers alone.

Symbols: B sequences, T tokens, L layers, D width, I width of the MLP, H query heads, J key/value heads, E head
dimension, V vocabulary, h and M heads and slots of local construction, b bytes of a number (2 for bfloat16).

    training    = weights + gradients + optimizer + checkpoints + the largest of (one layer, loss) + 160 MiB
      weights     b x frozen parameters + 4 x trained  trained ones (PEFT's copies too) are float32 in `hici train`;
                                                       8 bits: 1 byte for each number of the decoder's linear layers,
                                                       4 bits: 0.52
      gradients   4 x trained parameters               there from the second sequence of an optimizer step on
      optimizer   8 x trained parameters               AdamW: two float32 numbers each; 8 bits: 2.03
      checkpoints 4 B T L D                            the input of every layer; the rest is computed again. Float32:
                                                       trained embeddings and norms make the residual stream so.
                                                       Offloaded: of three layers (on their way), L in the CPU's memory
      or, without checkpointing, activations: what L layers keep, as in their MLP below with half of i
      one layer   B T (d D + q H E + k J E + i I + s h M)
                                                       while it is differentiated: in the MLP, whose part i I is of
                                                       min(B T, tile) tokens, or in the attention, if that is more.
                                                       The factors are bytes, counted on what is live (`_MLP`,
                                                       `_ATTENTION`)
                  + 4 V D if the head trains           its gradient waits for that of the embeddings, tied to it
                  + b D I in 4 or 8 bits               one matrix at a time, unpacked
                  + 2 casts / L                        or casts, without checkpointing
      loss        n (b + 4) + 16 B T D                 n = min(B T V, 2^25) logits of a chunk or their gradient, in b
                                                       bytes and float32; the last norm's input, normalised, output,
                                                       and the gradient of that
                  + (4 + 2 b) V D if the head trains   the sum of the chunks' gradients; one of them and the head's
                                                       copy in b bytes; in float32 neither has a copy
                  + casts                              trained weights but the head's in b bytes: autocast keeps the
                                                       copies of a whole forward pass; in float32 there are none
      over N processes (FSDP2, ZeRO-3): weights, gradients and optimizer / N, + gathered: two layers, and the head
    generation  = weights + KV cache + one layer's prefill
      weights     b x the model's parameters (adapters merged or not makes little difference)
      KV cache    2 B T L J E b                        attention full, or hici with raw keys; in a layer with a
                                                       sliding window at most its tokens
      prefill     B T (4 D + b (2 D + max(6 H E, 3 I)))   2 I without a gate
    bounded     = weights + HiCICache + one layer's prefill of a segment (S tokens instead of T)
      HiCICache   B L (2 J E b (P + min(S, T))         slots in use and the unfinished segment at its longest
                       + 4 M (2 h + C)                 local construction: C its width; both only with slots
                       + 4 (1 + 4 D))                  statistics; once a segment is finished

The 160 MiB are what the allocator and the libraries keep for themselves (measured on the CPU where glibc gives blocks
back, MALLOC_MMAP_THRESHOLD_=1048576; where not, it is much more: docs/memory.md). Not in it: the data, other processes.
An estimate, of layers like Llama's: tests compare it with the tensors that are live in a step, and benchmarks/memory.py
with the memory of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hici.registry import suggest

LOSS_CHUNK = 2**25  # logits held at a time, as in hici.models.loss
TRAINED_BYTES = 4
OVERHEAD = 160 * 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
# of a number of the decoder's linear layers; 4 bits: NF4, a scale of 8 bits for 64 numbers and a float32 for 256 scales
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
METHODS = ("hici", "hici_s2", "full")
OFFLOAD_LAYERS = 3  # whose inputs are on the device: on their way to the CPU's memory (2, models.offload) or back


class Factors(NamedTuple):
    """Bytes a token for each number of D, H E, J E, I (with a gate) and h M."""

    d: float
    q: float
    k: float
    i: float = 0.0
    s: float = 0.0


# While a layer is differentiated, its recomputed activations included: in its MLP and in its attention, by method. By
# b: with 2, trained weights and the residual stream are float32 and products run under autocast, which keeps copies.
_MLP = {
    2: {"hici": Factors(25, 11.5, 5.5, 12, 6), "hici_s2": Factors(22, 14, 2.5, 12), "full": Factors(22, 7, 6, 12)},
    4: {"hici": Factors(20, 22, 9.5, 24, 4.5), "hici_s2": Factors(20, 27, 2.5, 24), "full": Factors(20, 9, 10, 24)},
}
_ATTENTION = {
    2: {"hici": Factors(30.5, 21, 9.5, 0, 6.5), "hici_s2": Factors(27.5, 23.5, 6.5), "full": Factors(29, 13, 10)},
    4: {"hici": Factors(32, 22, 9.5, 0, 4.5), "hici_s2": Factors(32, 27, 2.5), "full": Factors(30, 11.5, 10.5)},
}
_TILED_INPUT = 4.0  # bytes for each number of D: what an MLP in tiles keeps, when all layers keep what they need


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as it changes the memory; the names are the recipe's.

    Attributes:
        processes: that share weights, gradients and optimizer (FSDP2, ZeRO-3); DDP: 1, each has all.
    """

    method: str = "hici"
    gradient_checkpointing: bool = True
    offload_checkpoints: bool = False
    mlp_tile: int | None = None
    optimizer: str = "adamw"
    quantization: str = "none"
    processes: int = 1

    def __post_init__(self) -> None:
        known = {"method": METHODS, "optimizer": OPTIMIZER_BYTES, "quantization": ("none", *QUANTIZED_BYTES)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(suggest(getattr(self, name), choices, name))
        for name, value in (("mlp_tile", self.mlp_tile), ("processes", self.processes)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is no integer >= 1; give one")
        if self.offload_checkpoints and not self.gradient_checkpointing:
            raise ValueError(
                "offload_checkpoints without gradient_checkpointing: there are no checkpoints to move; turn it on"
            )


@dataclass(frozen=True)
class Shape:
    """What the estimate needs of a model; see the module for the symbols.

    Attributes:
        parameters: all of the model with HiCI, without adapters.
        held_in_training: those that are in memory when it is trained (adapters and trained copies too).
        trained: those that get gradients.
        head_trains: the output layer is among them (tied to trained embeddings).
        linear: numbers in the decoder's linear layers, which quantisation packs.
        gated_mlp: the MLP has a gate beside its first projection.
        window, window_layers: tokens of the sliding window, and how many layers have it.
        local_context: numbers of a segment's running local construction, without its scores.
        slots: slots in use in front of a segment.
    """

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    local_scores: int  # h M
    parameters: int
    held_in_training: int
    trained: int
    head_trains: bool
    gated_mlp: bool = True
    window: int = 0
    window_layers: int = 0
    local_context: int = 0  # M C
    slots: int = 0  # P
    linear: int = 0


def layer_bytes(shape: Shape, rows: int, number_bytes: int, training: Training) -> float:
    """What one layer holds at most while it is differentiated; its input and its weights left out."""
    tile = rows if training.mlp_tile is None else min(rows, training.mlp_tile)
    mlp = _bytes(_MLP[number_bytes][training.method], shape, rows, tile)
    return max(mlp, _bytes(_ATTENTION[number_bytes][training.method], shape, rows, 0))


def saved_bytes(shape: Shape, rows: int, number_bytes: int, training: Training) -> float:
    """What one layer keeps for its backward pass, without checkpointing. Frozen MLPs keep half of what they make."""
    factors = _MLP[number_bytes][training.method]
    if training.mlp_tile is None or rows <= training.mlp_tile:
        return _bytes(factors, shape, rows, 0.5 * rows)
    return _bytes(factors._replace(d=factors.d + _TILED_INPUT), shape, rows, 0)


def training_memory(
    shape: Shape, tokens: int, *, batch: int = 1, number_bytes: int = 2, training: Training | None = None
) -> dict[str, int]:
    """Bytes by part on one device; `training` None: as `hici train` does without other keys."""
    training = training or Training()
    rows = batch * tokens
    parts = _held(shape, number_bytes, training)
    head = shape.vocabulary * shape.width if shape.head_trains else 0
    copied = number_bytes if number_bytes < TRAINED_BYTES else 0  # what is in float32 already needs no copy
    casts = copied * max(0, shape.trained - head)
    unpacked = 0 if training.quantization == "none" else number_bytes * shape.width * shape.mlp_width
    layer = layer_bytes(shape, rows, number_bytes, training) + unpacked + TRAINED_BYTES * head
    if training.gradient_checkpointing:
        layers = min(OFFLOAD_LAYERS, shape.layers) if training.offload_checkpoints else shape.layers
        parts["checkpoints"] = float(rows * layers * shape.width * TRAINED_BYTES)
        layer += 2 * casts / shape.layers
    else:
        saved = saved_bytes(shape, rows, number_bytes, training)
        parts["activations"] = shape.layers * saved
        layer += casts - saved
    chunk = min(rows * shape.vocabulary, LOSS_CHUNK)
    loss = chunk * (4 + copied) + 16 * rows * shape.width + (4 + number_bytes + copied) * head + casts
    parts["one layer or the loss"] = max(layer, loss)
    parts["allocator and libraries"] = OVERHEAD
    return {name: round(count) for name, count in parts.items()}


def offloaded_memory(shape: Shape, tokens: int, *, batch: int = 1) -> int:
    """Bytes of the CPU's memory that offloaded checkpoints take (pinned)."""
    return batch * tokens * shape.layers * shape.width * TRAINED_BYTES


def _held(shape: Shape, number_bytes: int, training: Training) -> dict[str, float]:
    """What does not grow with the tokens."""
    frozen = float(number_bytes * (shape.held_in_training - shape.trained))
    if training.quantization != "none":
        frozen -= (number_bytes - QUANTIZED_BYTES[training.quantization]) * shape.linear
    weights = frozen + TRAINED_BYTES * shape.trained
    parts = {
        "weights": weights,
        "gradients": float(TRAINED_BYTES * shape.trained),
        "optimizer": OPTIMIZER_BYTES[training.optimizer] * shape.trained,
    }
    if training.processes == 1:
        return parts
    parts = {name: count / training.processes for name, count in parts.items()}
    head = TRAINED_BYTES * shape.vocabulary * shape.width if shape.head_trains else 0
    return {**parts, "gathered": head + 2 * max(0.0, weights - head) / shape.layers}


def _bytes(factors: Factors, shape: Shape, rows: int, mlp_rows: float) -> float:
    heads = factors.q * shape.heads + factors.k * shape.kv_heads
    mlp = factors.i * shape.mlp_width * (1.0 if shape.gated_mlp else 0.5)
    return rows * (factors.d * shape.width + heads * shape.head_dim + factors.s * shape.local_scores) + mlp_rows * mlp


def generation_memory(shape: Shape, tokens: int, *, batch: int = 1, number_bytes: int = 2) -> dict[str, int]:
    """Bytes by part at the end of `tokens` tokens, with the keys and values of all of them."""
    rows = batch * tokens
    widest = max(6 * shape.heads * shape.head_dim, (3 if shape.gated_mlp else 2) * shape.mlp_width)
    cached = (shape.layers - shape.window_layers) * tokens + shape.window_layers * min(tokens, shape.window)
    return {
        "weights": number_bytes * shape.parameters,
        "KV cache": 2 * batch * cached * shape.kv_heads * shape.head_dim * number_bytes,
        "one layer": rows * (4 * shape.width + number_bytes * (2 * shape.width + widest)),
    }


def bounded_memory(
    shape: Shape, tokens: int, segment_size: int, *, batch: int = 1, number_bytes: int = 2
) -> dict[str, int]:
    """Bytes by part when `tokens` tokens are read and written with a HiCICache, segment by segment."""
    piece = min(segment_size, tokens)
    generation = generation_memory(shape, piece, batch=batch, number_bytes=number_bytes)
    layer = 2 * shape.kv_heads * shape.head_dim * number_bytes * (shape.slots + piece)
    if shape.slots:
        layer += 4 * (2 * shape.local_scores + shape.local_context)
        layer += 4 * (1 + 4 * shape.width) if tokens >= segment_size else 0
    return {
        "weights": generation["weights"],
        "HiCICache": batch * shape.layers * layer,
        "one layer": generation["one layer"],
    }
