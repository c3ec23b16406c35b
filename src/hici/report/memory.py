"""Memory of training and of generation, estimated from an architecture's numbers alone.

Symbols: B sequences, T tokens, L layers, D width, I width of the MLP, H query heads, J key/value heads, E head
dimension, V vocabulary, h and M heads and slots of local construction, b bytes of a number (2 for bfloat16).

    training    = weights + gradients + optimizer + checkpoints + one layer + loss
      weights     b x frozen parameters + 4 x trained  trained ones (PEFT's copies too) are float32 in `hici train`
      gradients   4 x trained parameters
      optimizer   8 x trained parameters               AdamW: two float32 numbers each
      checkpoints 4 B T L D                            the input of every layer; the rest is computed again. Float32:
                                                       trained embeddings and norms make the residual stream so
      one layer   B T (2 (4 + 2b) D                    two norms: float32 input, normalised, output
                       + 5 b H E                       q, k, v, output, and the input of o_proj
                       + 6 b I                         gate, up, act, product, and the gradients of two; 3 b I where
                                                       the MLP has no gate
                       + (4 + b) h M)                  weights of local construction
      loss        n (b + 4) + 4 B T D                  n = min(B T V, 2^25) logits of a chunk or their gradient, in b
                                                       bytes and float32; the gradient of the last hidden states
                  + (8 + 2 b) V D if the head trains   its copy in b bytes; a chunk's gradient in b bytes and
                                                       float32; their sum, beside the gradient of earlier batches
    generation  = weights + KV cache + one layer's prefill
      weights     b x the model's parameters (adapters merged or not makes little difference)
      KV cache    2 B T L J E b                        attention full, or hici with raw keys; in a layer with a
                                                       sliding window at most its tokens
      prefill     B T (4 D + b (2 D + max(6 H E, 3 I)))   2 I without a gate
    bounded     = weights + HiCICache + one layer's prefill of a segment (S tokens instead of T)
      HiCICache   B L (2 J E b (P + min(S, T))         slots in use and the unfinished segment at its longest
                       + 4 M (2 h + C)                 local construction: C its width; both only with slots
                       + 4 (1 + 4 D))                  statistics; once a segment is finished

Not in it: what the allocator and the libraries keep for themselves, the data, other processes. An estimate: the
layer's term is tested against the tensors that autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

LOSS_CHUNK = 2**25  # logits held at a time, as in hici.models.loss
TRAINED_BYTES = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """What the estimate needs of a model; see the module for the symbols.

    Attributes:
        parameters: all of the model with HiCI, without adapters.
        held_in_training: those that are in memory when it is trained (adapters and trained copies too).
        trained: those that get gradients.
        head_trains: the output layer is among them (tied to trained embeddings).
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


def layer_bytes_per_token(shape: Shape, number_bytes: int) -> int:
    """What one layer keeps for its backward pass, in bytes a token (the gradients of two MLP tensors left out)."""
    norms = 2 * (4 + 2 * number_bytes) * shape.width
    attention = 5 * number_bytes * shape.heads * shape.head_dim
    mlp = (4 if shape.gated_mlp else 2) * number_bytes * shape.mlp_width
    return norms + attention + mlp + (4 + number_bytes) * shape.local_scores


def training_memory(shape: Shape, tokens: int, *, batch: int = 1, number_bytes: int = 2) -> dict[str, int]:
    """Bytes by part, with checkpointing of every layer, attention hici."""
    rows = batch * tokens
    chunk = min(rows * shape.vocabulary, LOSS_CHUNK)
    mlp_gradients = (2 if shape.gated_mlp else 1) * number_bytes * shape.mlp_width
    head = (8 + 2 * number_bytes) * shape.vocabulary * shape.width if shape.head_trains else 0
    return {
        "weights": number_bytes * (shape.held_in_training - shape.trained) + TRAINED_BYTES * shape.trained,
        "gradients": TRAINED_BYTES * shape.trained,
        "optimizer": 8 * shape.trained,
        "checkpoints": rows * shape.layers * shape.width * TRAINED_BYTES,
        "one layer": rows * (layer_bytes_per_token(shape, number_bytes) + mlp_gradients),
        "loss": chunk * (number_bytes + 4) + 4 * rows * shape.width + head,
    }


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
