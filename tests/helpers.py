"""Tiny models with strong random HiCI weights, and comparisons. Nothing here is a test.

On freshly initialised modules most properties hold whatever the code does, so `strong_model` draws large random
weights and checks that zeroing either kind of slot moves the logits by more than 0.1.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hici.config import HiCIConfig
from hici.core import broadcast
from hici.core.local_construction import LocalConstructor
from hici.models.attach import attach
from hici.models.lookup import hici_config

GOLDEN = Path(__file__).parent / "golden"
VOCAB = 97
SEGMENT = 8
ARCHITECTURES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "gemma2", "gemma3")
SMALL = {"num_local_slots": 3, "num_global_slots": 2, "num_heads": 4, "bottleneck_dim": 32, "compress_dim": 16}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that each of the three kinds of frequency is there
}
# head_dim is not width / heads, scores are not scaled by it, and the second layer has another kind of attention
_GEMMA = {
    "head_dim": 24,
    "query_pre_attn_scalar": 30,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}
_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),  # heads * head_dim is not the width
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": 20.0, "attn_implementation": "eager"},
    ),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, _GEMMA),
}


def stock_attention(architecture):
    """What transformers chooses for it: Gemma 2 has no sdpa."""
    return "eager" if architecture == "gemma2" else "sdpa"


def tiny_model(architecture="llama", *, seed=0, **options):
    """A random stock model: 2 layers, width 64, 4 heads, 2 key/value heads, 97 entries."""
    config_class, model_class, extra = _CLASSES[architecture]
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    if architecture == "gpt_neox":
        del values["num_key_value_heads"]  # it knows none
    model = model_class(config_class(**copy.deepcopy({**values, **extra, **options}))).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model, seed=0):
    """Large random values for every parameter (in the order and spirit of the golden models)."""
    generator = torch.Generator().manual_seed(seed)
    from_one = getattr(getattr(model, "config", None), "model_type", "").startswith("gemma")  # its norms weigh 1 + w
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        in_hici = "local_constructor" in name or "global_integrator" in name
        if from_one and "norm" in name and not in_hici:
            value = 0.2 * noise
        elif "norm" in name or name.endswith((".1.weight", ".1.bias")):
            value = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif name.endswith(("embed_tokens.weight", "embed_in.weight", "memory_slots", "global_queries")):
            value = 0.3 * noise
        elif name.endswith("expand_scale_param"):
            value = 0.5 * noise
        elif parameter.dim() == 1:
            value = 0.2 * noise
        else:
            value = (0.2 if in_hici else 0.15) * noise
        parameter.copy_(value)


def small_config(**changes):
    """A small HiCIConfig with segments of 8 tokens; M * h < bottleneck, so the absorbed path is the cheaper one."""
    if "num_segments" not in changes:
        changes.setdefault("segment_size", SEGMENT)
    return HiCIConfig(**{**SMALL, **changes})


def strong_model(architecture="llama", *, seed=0, check=True, options=None, **hici):
    """An attached tiny model whose slots matter: asserted, unless the config leaves none to assert (`check`)."""
    model = tiny_model(architecture, **(options or {}))
    attach(model, small_config(**hici))
    randomise(model, seed)
    if check:
        assert_slots_matter(model)
    return model


@torch.no_grad()
def assert_slots_matter(model, length=3 * SEGMENT + 5):
    """Zeroing G, and zeroing L, in the broadcast moves some logit by more than 0.1 (each kind that is in use)."""
    config = hici_config(model)
    ids = random_ids(2, length)
    expected = model(ids).logits
    for kind, used in (("global", config.use_global), ("local", config.use_local)):
        if used:
            with zeroed(kind):
                moved = (model(ids).logits - expected).abs().max().item()
            assert moved > 0.1, f"zeroing the {kind} slots moves the logits by only {moved:.3g}"


def zeroed(kind):
    """Context: the slots of that kind ("global" or "local") are zero vectors in the broadcast."""
    original = broadcast.visible_slots

    def wrapper(global_D, local_BNMD, visibility, num_segments):
        if kind == "global" and global_D is not None:
            global_D = torch.zeros_like(global_D)
        if kind == "local" and local_BNMD is not None:
            local_BNMD = torch.zeros_like(local_BNMD)
        return original(global_D, local_BNMD, visibility, num_segments)

    return mock.patch.object(broadcast, "visible_slots", wrapper)


def random_ids(batch, length, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, mask=None, **inputs):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **inputs).logits


def cut(length, borders):
    """(begin, end) of the pieces of `length` tokens, cut at those of the borders that are inside."""
    places = sorted({0, length, *(border for border in borders if border < length)})
    return list(itertools.pairwise(places))


@torch.no_grad()
def read(model, cache, ids, pieces, mask=None, **inputs):
    """Logits of calls with the pieces (begin, end) of ids, one after another with the cache: [B, T, V]."""
    outs = []
    for begin, end in pieces:
        part = {name: x[:, begin:end] for name, x in inputs.items()}
        seen = None if mask is None else mask[:, :end]
        outs.append(model(ids[:, begin:end], attention_mask=seen, past_key_values=cache, **part).logits)
    return torch.cat(outs, dim=1)


def padded(rows, side, total=None, fill=0):
    """(ids, mask) of rows of different lengths, padded on one side."""
    total = total or max(len(row) for row in rows)
    ids = torch.full((len(rows), total), fill)
    mask = torch.zeros(len(rows), total, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(total - len(row), total)
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask


def difference(a, b):
    """Largest absolute difference."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def relative(a, b):
    """Largest difference over the largest value of the expected `b`; both zero: 0."""
    scale = b.double().abs().max().item()
    gap = difference(a, b)
    return gap / scale if scale else gap


def loss_and_gradients(model, ids, mask=None, labels=None):
    """Loss and the gradients of all trainable parameters (None stays None)."""
    model.zero_grad(set_to_none=True)
    loss = model(ids, attention_mask=mask, labels=ids if labels is None else labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            assert relative(actual[name], gradient) <= tolerance, name


def record_paths(monkeypatch):
    """A list that fills with the path ("plain", "absorbed") of each local construction from now on."""
    taken = []

    def recorded(path, original):
        def wrapper(self, *args):
            taken.append(path)
            return original(self, *args)

        return wrapper

    for path in ("plain", "absorbed"):
        name = f"_{path}"
        monkeypatch.setattr(LocalConstructor, name, recorded(path, getattr(LocalConstructor, name)))
    return taken


@functools.cache
def golden_json(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@functools.cache
def golden_tensors(name):
    return load_file(GOLDEN / f"{name}.safetensors")


@functools.cache
def _golden_model(name):
    cases = golden_json(f"{name}.cases")
    weights = cases["weights"].removesuffix(".safetensors")
    described = golden_json(weights)
    options = {**described["config"], "rope_scaling": cases["settings_common"].get("rope_scaling")}
    config_class, model_class, _ = _CLASSES["qwen3" if name.startswith("qwen3") else "llama"]
    model = model_class(config_class(**options, attn_implementation="sdpa")).eval()
    register = described["register"]
    shared = register.get("use_shared_compressor", True)
    attach(
        model,
        HiCIConfig(
            num_local_slots=register["num_local_slots"],
            num_global_slots=register["global_slots"],
            num_heads=register["num_heads"],
            bottleneck_dim=register["bottleneck_dim"],
            compress_dim=register["shared_compress_dim"] if shared else None,
            integrator_dim=None if shared else register["compress_dim"],
        ),
    )
    model.load_state_dict(golden_tensors(weights), strict=True)
    return model


def golden_model(name):
    """The attached model of a golden family, with its weights: a fresh copy."""
    return copy.deepcopy(_golden_model(name))
