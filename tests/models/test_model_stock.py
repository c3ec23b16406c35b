"""What must equal the stock model: full mode, slots off, one segment, detached. And nothing else is touched."""

import copy

import pytest
import torch

from helpers import (
    ARCHITECTURES,
    difference,
    logits,
    padded,
    random_ids,
    randomise,
    small_config,
    stock_attention,
    strong_model,
    tiny_model,
)
from hici import attach, detach, reconfigure
from hici.attention import get_backend
from hici.models.attach import hici_state_dict
from hici.models.lookup import attention_modules, hici_config, is_attached

STOCK = [(a, i) for a in ARCHITECTURES for i in ("sdpa", "eager") if i in ("eager", stock_attention(a))]


def _stock(architecture, **options):
    """The stock model with the base weights of `strong_model`."""
    attached = strong_model(architecture, options=options)
    model = tiny_model(architecture, **options)
    model.load_state_dict({k: v for k, v in attached.state_dict().items() if k in model.state_dict()}, strict=True)
    return model, attached


@pytest.mark.parametrize("visibility", ["all", "current", "past"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_segment_without_slots_is_the_stock_model(architecture, visibility):
    stock, model = _stock(architecture)
    reconfigure(model, use_global=False, use_local=False, num_segments=1, visibility=visibility)
    ids = random_ids(2, 29)
    assert difference(logits(model, ids), logits(stock, ids)) < 1e-5
    ids, mask = padded([ids[0], ids[1, :13]], "left")
    gap = (logits(model, ids, mask) - logits(stock, ids, mask)).abs()[mask.bool()]
    assert gap.max() < 2e-5  # positions are numbered differently under left padding, which RoPE alone does not see
    reconfigure(model, segment_size=64)
    assert difference(logits(model, ids[:1]), logits(stock, ids[:1])) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_segment_in_past_is_the_stock_model(architecture):
    stock, model = _stock(architecture)
    reconfigure(model, num_segments=1, visibility="past")
    ids = random_ids(2, 29)
    assert difference(logits(model, ids), logits(stock, ids)) < 1e-5
    reconfigure(model, visibility="all")
    assert difference(logits(model, ids), logits(stock, ids)) > 0.1  # "full attention + HiCI" is another thing


@pytest.mark.parametrize("architecture, implementation", STOCK)
def test_full_mode_is_the_stock_model_bit_for_bit(architecture, implementation):
    stock, model = _stock(architecture)
    stock.set_attn_implementation(implementation)
    model.set_attn_implementation(implementation)
    ids = random_ids(2, 29)
    assert torch.equal(logits(model, ids), logits(stock, ids))
    for side in ("left", "right"):
        padded_ids, mask = padded([ids[0], ids[1, :13]], side)
        assert torch.equal(logits(model, padded_ids, mask), logits(stock, padded_ids, mask))
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), stock.generate(ids, **arguments))


def test_full_mode_gives_attentions():
    _, model = _stock("llama")
    model.set_attn_implementation("eager")
    assert model(random_ids(1, 9), output_attentions=True).attentions[0].shape == (1, 4, 9, 9)


@pytest.mark.parametrize("architecture, implementation", STOCK)
def test_detach_restores_the_stock_model(architecture, implementation):
    model = tiny_model(architecture, attn_implementation=implementation)
    ids, mask = padded([random_ids(1, 29)[0], random_ids(1, 13)[0]], "left")
    expected = logits(model, ids, mask)
    keys = list(model.state_dict())
    before = [set(vars(m)) | set(m._modules) for m in model.modules()]
    config = model.config.to_dict()
    assert attach(model, small_config()) is model
    assert is_attached(model)
    assert model.config._attn_implementation == "hici"
    assert difference(logits(model, ids, mask), expected) > 0.1
    assert detach(model) is model
    assert not is_attached(model)
    assert model.config._attn_implementation == implementation
    assert not hasattr(model.config, "hici")
    assert model.config.to_dict() == config
    assert all(not m._forward_pre_hooks and not m._forward_pre_hooks_with_kwargs for m in model.modules())
    assert list(model.state_dict()) == keys
    assert [set(vars(m)) | set(m._modules) for m in model.modules()] == before
    assert torch.equal(logits(model, ids, mask), expected)
    attach(model, small_config(visibility="past"))
    assert hici_config(model).visibility == "past"
    assert difference(logits(model, ids, mask), expected) > 0.1
    detach(model)
    assert torch.equal(logits(model, ids, mask), expected)


def test_detach_leaves_hooks_of_others_alone():
    model = tiny_model()
    calls = []
    for module in (model.model, model.model.layers[0].self_attn):
        module.register_forward_pre_hook(lambda *args: calls.append(1))
    attach(model, small_config())
    detach(model)
    logits(model, random_ids(1, 5))
    assert len(calls) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attach_again_with_the_saved_weights(architecture):
    model = strong_model(architecture, visibility="past")
    ids = random_ids(2, 29)
    expected = logits(model, ids)
    saved = {name: tensor.clone() for name, tensor in hici_state_dict(model).items()}
    assert {name.split(".")[4] for name in saved} == {"local_constructor", "global_integrator"}
    assert len(saved) == 2 * (5 + 13)
    detach(model)
    attach(model, small_config(visibility="past"))
    assert difference(logits(model, ids), expected) > 0.1  # fresh modules
    result = model.load_state_dict(saved, strict=False)
    assert not result.unexpected_keys
    assert not any("local_constructor" in k or "global_integrator" in k for k in result.missing_keys)
    assert torch.equal(logits(model, ids), expected)


def test_base_weights_are_untouched():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, small_config())
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_modules_take_dtype_and_device_of_the_layer(dtype):
    model = attach(tiny_model().to(dtype), small_config())
    for attention in attention_modules(model):
        for module in (attention.local_constructor, attention.global_integrator):
            assert {p.dtype for p in module.parameters()} == {dtype}
    assert logits(model, random_ids(1, 29)).dtype == dtype


def test_nothing_process_wide_is_patched():
    from transformers.models.llama import modeling_llama

    watched = [
        (cls, name)
        for cls in (modeling_llama.LlamaAttention, modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaModel)
        for name in ("forward", "__call__", "__init__")
    ]
    names = dict(vars(modeling_llama))
    before = [getattr(cls, name) for cls, name in watched]
    other = tiny_model()
    ids, mask = padded([random_ids(1, 29)[0], random_ids(1, 13)[0]], "left")
    expected = logits(other, ids, mask)
    model = strong_model()
    logits(model, ids, mask)
    assert all(getattr(cls, name) is value for (cls, name), value in zip(watched, before, strict=True))
    assert vars(modeling_llama).keys() == names.keys()
    assert all(vars(modeling_llama)[key] is value for key, value in names.items())
    assert type(model.model.layers[0].self_attn) is modeling_llama.LlamaAttention
    assert "forward" not in vars(model.model.layers[0].self_attn)
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(logits(other, ids, mask), expected)
    assert all(not m._forward_pre_hooks for m in other.modules())


def test_two_attached_models_keep_their_own_settings():
    first, second = strong_model(visibility="past"), strong_model(visibility="all", num_global_slots=3)
    ids = random_ids(1, 29)
    expected = logits(first, ids)
    logits(second, ids)
    reconfigure(second, use_local=False)
    assert torch.equal(logits(first, ids), expected)
    assert hici_config(first).use_local


def test_reconfigure_equals_attaching_so():
    model = strong_model(visibility="all")
    ids = random_ids(2, 29)
    for changes in ({"visibility": "past"}, {"segment_size": 5}, {"use_local": False}, {"num_segments": 3}):
        reconfigure(model, **changes)
        fresh = attach(tiny_model(), hici_config(model))
        randomise(fresh)
        assert torch.equal(logits(model, ids), logits(fresh, ids)), changes
        assert model.config.hici == fresh.config.hici


def test_the_configured_backend_is_the_one_that_runs():
    model = attach(tiny_model(), small_config(backend="reference"))
    for name in ("reference", "sdpa", "reference"):
        reconfigure(model, backend=name)
        for attention in attention_modules(model):
            assert attention.hici_attend is get_backend(name).attend
            assert attention.local_constructor.absorb == get_backend(name).absorbed
    fresh = attach(tiny_model(), small_config(backend="reference"))
    assert attention_modules(fresh)[1].hici_attend is get_backend("reference").attend
    assert not attention_modules(fresh)[1].local_constructor.absorb


def test_num_local_slots_zero_switches_everything_off():
    stock = tiny_model()
    model = copy.deepcopy(stock)
    attach(model, small_config(num_local_slots=0, use_global=False, use_local=False, num_segments=1))
    ids = random_ids(1, 29)
    assert difference(logits(model, ids), logits(stock, ids)) < 1e-5
