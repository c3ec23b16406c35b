"""The memory estimate of training against the tensors that are live in a step."""

import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import hici
from hici import HiCIConfig
from hici.adapters.lora import trainable_parameters
from hici.models.loss import next_token_loss
from hici.models.modes import set_attention
from hici.models.offload import enable_checkpointing
from hici.models.tiled_mlp import tile_mlp
from hici.report.memory import OVERHEAD, Shape, Training, layer_bytes, offloaded_memory, training_memory
from hici.report.summary import summarise

HICI = {"num_local_slots": 8, "num_heads": 8, "bottleneck_dim": 64, "compress_dim": 16, "visibility": "past"}


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make: now, and at most."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key):
        self.now -= self.sizes.pop(key, 0)


def llama(**changes):
    options = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
               "tie_word_embeddings": True, **changes}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**options))


def live_bytes(model, tokens, dtype, training):
    """Bytes held at most in a step of that model, prepared as `hici train` does: (weights and gradients, the rest)."""
    base = model.to(dtype).requires_grad_(False)
    hici.attach(base, config(tokens))
    wrapped = hici.add_lora(base).train()
    if training.method != "hici":
        for parameter in trainable_parameters(wrapped)[0]:
            parameter.requires_grad_(False)
    for group in trainable_parameters(wrapped):
        for parameter in group:
            parameter.data = parameter.data.float()
            parameter.grad = torch.zeros_like(parameter)
    if training.gradient_checkpointing:
        enable_checkpointing(base)
    set_attention(wrapped, training.method)
    if training.mlp_tile:
        tile_mlp(wrapped, training.mlp_tile)
    live = Live()
    for parameter in wrapped.parameters():
        live.add(parameter.untyped_storage())
        if parameter.grad is not None:
            live.add(parameter.grad.untyped_storage())
    held, live.most = live.now, 0
    ids = torch.randint(0, 64, (1, tokens))
    with live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, count = next_token_loss(wrapped, ids)
        (total / count).backward()
    return held, live.most - held


def config(tokens):
    return HiCIConfig(**HICI, segment_size=tokens // 4)


def estimate(model, tokens, dtype, training):
    """(weights and gradients, what grows with the tokens)."""
    name = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]
    parts = summarise(model.config, config(tokens), context=tokens, dtype=name, training=training).training
    fixed = parts["weights"] + parts["gradients"]
    return fixed, sum(parts.values()) - fixed - parts["optimizer"] - OVERHEAD


CASES = [
    Training(),
    Training(mlp_tile=16),
    Training(gradient_checkpointing=False),
    Training(gradient_checkpointing=False, mlp_tile=16),
    Training(method="hici_s2", mlp_tile=16),
    Training(method="hici_s2"),
    Training(method="full", mlp_tile=16),
    Training(method="full"),
]


def describe(training):
    parts = [training.method, "tiled" if training.mlp_tile else "", "" if training.gradient_checkpointing else "kept"]
    return "-".join(part for part in parts if part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("training", CASES, ids=describe)
def test_what_grows_with_the_tokens_is_what_is_live(training, dtype):
    short, long = (
        (live_bytes(llama(), tokens, dtype, training)[1], estimate(llama(), tokens, dtype, training)[1])
        for tokens in (256, 512)
    )
    assert long[1] - short[1] == pytest.approx(long[0] - short[0], rel=0.12)
    assert long[1] == pytest.approx(long[0], rel=0.12)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 1536},
        {"hidden_size": 512, "num_attention_heads": 8, "head_dim": 64},
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
        {"num_hidden_layers": 5, "intermediate_size": 256},
    ],
    ids=str,
)
def test_other_shapes(changes):
    for training in (Training(), Training(mlp_tile=16)):
        held, rest = live_bytes(llama(**changes), 512, torch.bfloat16, training)
        fixed, grows = estimate(llama(**changes), 512, torch.bfloat16, training)
        assert fixed == pytest.approx(held, rel=0.01)
        assert grows == pytest.approx(rest, rel=0.12)


def test_an_mlp_without_a_gate():
    options = GPTNeoXConfig(vocab_size=64, hidden_size=256, intermediate_size=2048, num_hidden_layers=2,
                            num_attention_heads=4)  # fmt: skip
    _, rest = live_bytes(GPTNeoXForCausalLM(options), 512, torch.float32, Training())
    assert estimate(GPTNeoXForCausalLM(options), 512, torch.float32, Training())[1] == pytest.approx(rest, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_a_large_vocabulary_makes_the_loss_the_peak(dtype):
    model = llama(vocab_size=65536, num_hidden_layers=1)
    fixed, grows = estimate(model, 1100, dtype, Training())  # three chunks of logits
    held, rest = live_bytes(model, 1100, dtype, Training())
    assert fixed == pytest.approx(held, rel=0.01)
    assert grows == pytest.approx(rest, rel=0.12)


SHAPE = Shape(layers=4, width=8, mlp_width=16, heads=2, kv_heads=1, head_dim=4, vocabulary=10, local_scores=6,
              parameters=1000, held_in_training=1100, trained=300, head_trains=True, linear=600)  # fmt: skip


def test_by_hand():
    parts = training_memory(SHAPE, 5, batch=3, number_bytes=2)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (2 * 800 + 4 * 300, 1200, 2400)
    assert parts["checkpoints"] == 3 * 5 * 4 * 8 * 4
    layer = 15 * (25 * 8 + 11.5 * 8 + 5.5 * 4 + 12 * 16 + 6 * 6)
    assert layer_bytes(SHAPE, 15, 2, Training()) == layer
    assert parts["one layer or the loss"] == max(
        round(layer + 4 * 80 + 2 * 2 * 220 / 4), 150 * 6 + 16 * 15 * 8 + 8 * 80 + 2 * 220
    )
    tiled = Training(mlp_tile=3)
    assert layer_bytes(SHAPE, 15, 2, tiled) == 15 * (30.5 * 8 + 21 * 8 + 9.5 * 4 + 6.5 * 6)
    assert layer_bytes(SHAPE, 15, 2, Training(mlp_tile=15)) == layer
    eight = training_memory(SHAPE, 5, training=Training(optimizer="adamw_8bit", quantization="8bit"))
    assert eight["weights"] == parts["weights"] - 600
    assert eight["optimizer"] == round((2 + 8 / 256) * 300)
    four = training_memory(SHAPE, 5, training=Training(quantization="4bit"))
    assert four["weights"] == round(parts["weights"] - 600 * (2 - 0.515869140625))
    offloaded = training_memory(SHAPE, 5, batch=3, training=Training(offload_checkpoints=True))
    assert offloaded["checkpoints"] * 4 == 3 * parts["checkpoints"]
    assert offloaded_memory(SHAPE, 5, batch=3) == parts["checkpoints"]
    shared = training_memory(SHAPE, 5, batch=3, training=Training(processes=2))
    assert shared["optimizer"] * 2 == parts["optimizer"]
    assert shared["gathered"] == 4 * 80 + 2 * (2800 - 320) // 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "s2"}, "unknown method 's2'; known: full, hici, hici_s2"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'"),
        ({"quantization": "3bit"}, "unknown quantization '3bit'"),
        ({"mlp_tile": 0}, "mlp_tile=0 is no integer >= 1; give one"),
        ({"processes": 0}, "processes=0 is no integer >= 1; give one"),
        (
            {"offload_checkpoints": True, "gradient_checkpointing": False},
            "there are no checkpoints to move; turn it on",
        ),
    ],
    ids=str,
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Training(**changes)
