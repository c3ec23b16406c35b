"""What differs between architectures: slot keys and values, windows by layer, refused configs, LoRA's places."""

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

import hici
from helpers import (
    ARCHITECTURES,
    VOCAB,
    difference,
    logits,
    random_ids,
    relative,
    small_config,
    stock_attention,
    strong_model,
    tiny_model,
)
from hici import attach, reconfigure
from hici.models.architectures import get_architecture
from hici.models.lookup import attention_modules, get_decoder, is_attached

SLOTS = torch.randn(1, 2, 5, 64, generator=torch.Generator().manual_seed(3))


def _slot_keys_values(model, layer=1):
    architecture = get_architecture(model.config.model_type)
    with torch.no_grad():
        return architecture.slot_keys_values(attention_modules(model)[layer], SLOTS)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("qwen3", "gemma3")])
def test_slot_keys_values_are_the_models_own_at_position_zero(architecture):
    """RoPE turns nothing at position 0: what the stock layer puts into its cache there is the plain projection."""
    model = tiny_model(architecture)
    attention = attention_modules(model)[1]
    hidden = SLOTS.flatten(1, 2)
    cache = DynamicCache()
    with torch.no_grad():
        rope = get_decoder(model).rotary_emb(hidden, torch.zeros(1, 10, dtype=torch.long))
        name = "layer_past" if architecture == "gpt_neox" else "past_key_values"
        attention(hidden_states=hidden, position_embeddings=rope, attention_mask=None, **{name: cache})
    for slots, cached in zip(_slot_keys_values(model), (cache.layers[1].keys, cache.layers[1].values), strict=True):
        assert difference(slots.flatten(1, 2), cached.transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_slot_keys_have_no_norm(architecture):
    model = tiny_model(architecture)
    attention = attention_modules(model)[1]
    keys, values = _slot_keys_values(model)
    for slots, projection in ((keys, attention.k_proj), (values, attention.v_proj)):
        assert difference(slots.flatten(3), functional.linear(SLOTS, projection.weight)) < 1e-6
    assert difference(attention.k_norm(keys), keys) > 0.1


def test_fused_layouts():
    """GPT-NeoX: q, k, v inside each of 4 heads. Phi-3: all queries, all keys, all values; 2 key/value heads; E = 16."""
    neox, phi3 = tiny_model("gpt_neox"), tiny_model("phi3")
    keys, values = _slot_keys_values(neox)
    fused = attention_modules(neox)[1].query_key_value
    weight, bias = fused.weight.view(4, 3, 16, 64), fused.bias.view(4, 3, 16)
    for head in range(4):
        assert difference(keys[..., head, :], SLOTS @ weight[head, 1].T + bias[head, 1]) < 1e-5
        assert difference(values[..., head, :], SLOTS @ weight[head, 2].T + bias[head, 2]) < 1e-5
    keys, values = _slot_keys_values(phi3)
    weight = attention_modules(phi3)[1].qkv_proj.weight
    for head in range(2):
        assert difference(keys[..., head, :], SLOTS @ weight[64 + 16 * head :][:16].T) < 1e-5
        assert difference(values[..., head, :], SLOTS @ weight[96 + 16 * head :][:16].T) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_counts_in_slot_keys_and_values(architecture):
    model = attach(tiny_model(architecture), small_config())
    plain = _slot_keys_values(model)
    wrapped = hici.add_lora(model)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    adapted = _slot_keys_values(model)
    merged = _slot_keys_values(wrapped.merge_and_unload())
    for before, now, folded in zip(plain, adapted, merged, strict=True):
        assert difference(before, now) > 0.1
        assert relative(now, folded) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_norms_and_embeddings_are_found(architecture):
    model = attach(tiny_model(architecture), small_config())
    wrapped = hici.add_lora(model)
    kinds = {False: set(), True: set()}
    for name, parameter in wrapped.named_parameters():
        if "original_module" not in name:
            kinds[parameter.requires_grad].add(name)
    lora = {name for name in kinds[True] if ".lora_" in name}
    assert len(lora) == 2 * 2 * len(get_architecture(model.config.model_type).lora_targets)
    assert not any("local_constructor" in name or "global_integrator" in name for name in lora)
    # what is left frozen: the attention's projections below LoRA, the MLP, the head
    rest = {name for name in kinds[False] if ".base_layer." not in name and ".mlp." not in name}
    assert rest == {"base_model.model.lm_head.weight"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("visibility", ["all", "past"])
def test_every_backend_equals_the_reference(architecture, visibility):
    model = strong_model(architecture, visibility=visibility, backend="reference")
    ids = random_ids(2, 29)
    expected = logits(model, ids)
    assert difference(logits(reconfigure(model, backend="sdpa"), ids), expected) < 1e-5


# configs and calls that are refused


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"attn_logit_softcapping": 50.0},
            r"attn_logit_softcapping=50\.0: the model caps its attention scores, which HiCI's attention kernels cannot "
            r"compute; load it with attn_logit_softcapping=None .*Gemma 3",
        ),
        (
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True: the model's tokens attend to later ones, but HiCI attention is for "
            "causal language models; use a model without it",
        ),
    ],
    ids=["softcap", "bidirectional"],
)
def test_what_a_gemma_may_not_do(architecture, options, message):
    model = tiny_model(architecture, **options)
    before = list(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        attach(model, small_config())
    assert not is_attached(model)
    assert (list(model.state_dict()), model.config.to_dict()) == before
    assert model.config._attn_implementation == stock_attention(architecture)


def test_a_soft_cap_set_later_is_not_ignored():
    model = strong_model("gemma2")
    attention_modules(model)[1].attn_logit_softcapping = 50.0
    message = (
        r"the model caps its attention scores at 50\.0, which attention mode 'hici' cannot compute; use a model "
        r"without soft-capping, or model\.set_attn_implementation\('eager'\)"
    )
    with pytest.raises(ValueError, match=message):
        logits(model, random_ids(1, 9))


def test_the_multimodal_gemma_3_is_no_known_type():
    with pytest.raises(ValueError, match=r"unknown model type 'gemma3'; .*Did you mean 'gemma3_text'"):
        get_architecture("gemma3")


@pytest.mark.parametrize("architecture", ["mistral", "phi3", "gemma2", "gemma3"])
def test_a_layers_window_shorter_than_the_segment(architecture):
    model = strong_model(architecture, options={"sliding_window": 6}, check=False)
    with pytest.raises(ValueError, match="segments of 8 tokens are longer than the model's sliding window of 6"):
        logits(model, random_ids(1, 29))
    logits(reconfigure(model, segment_size=6), random_ids(1, 29))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_layers_of_full_attention_have_no_window(architecture):
    model = strong_model(architecture, options={"sliding_window": 6, "layer_types": ["full_attention"] * 2})
    assert logits(model, random_ids(1, 29)).shape == (1, 29, VOCAB)


def test_loaded_in_hici_mode_gemma_2_falls_back_to_what_transformers_takes():
    stock = tiny_model("gemma2", attn_implementation=None).config._attn_implementation  # eager since 5.18
    model = attach(tiny_model("gemma2", attn_implementation="hici"), small_config())
    assert get_decoder(model).hici_attached.stock_attention == stock
