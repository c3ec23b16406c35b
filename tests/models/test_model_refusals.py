"""Every refusal of the bridge, with its message: the value, the rule, the remedy."""

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

from helpers import logits, random_ids, small_config, strong_model, tiny_model
from hici import attach, detach, reconfigure
from hici.models.lookup import hici_config, is_attached


@pytest.fixture(scope="module")
def attached():
    return strong_model()


@pytest.fixture(params=["hici", "hici_s2"])
def either_mode(request, attached):
    attached.set_attn_implementation(request.param)
    yield attached, request.param
    attached.set_attn_implementation("hici")


def test_unknown_model_type():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    message = (
        r"^unknown model type 'gpt2'; known: .*llama, .*mistral, .*qwen3\..* Use a model of a known type, or add a "
        r"file to hici/models/architectures\.$"
    )
    with pytest.raises(ValueError, match=message):
        attach(model)
    assert not hasattr(model.config, "hici")


def test_unknown_model_type_names_the_nearest():
    model = tiny_model()
    model.config.model_type = "qwen4"
    with pytest.raises(ValueError, match=r"unknown model type 'qwen4'; .*Did you mean 'qwen[23]'\?"):
        attach(model)


def test_attach_twice(attached):
    message = r"HiCI is already attached to this model; call hici\.detach\(model\) first, or hici\.reconfigure\(model"
    with pytest.raises(ValueError, match=message):
        attach(attached, small_config())


@pytest.mark.parametrize("act", [detach, reconfigure, hici_config], ids=lambda f: f.__name__)
def test_nothing_attached(act):
    message = r"^HiCI is not attached to this model; call hici\.attach\(model, HiCIConfig\(\.\.\.\)\) first$"
    with pytest.raises(ValueError, match=message):
        act(tiny_model())


@pytest.mark.parametrize("mode", ["hici", "hici_s2"])
def test_mode_of_a_never_attached_model(mode):
    model = tiny_model()
    model.set_attn_implementation(mode)
    message = (
        rf"attention mode '{mode}' is set, but no HiCI modules are attached to this model; call hici\.attach\(model, "
        r"HiCIConfig\(\.\.\.\)\) first, or model\.set_attn_implementation\('sdpa'\)"
    )
    with pytest.raises(ValueError, match=message):
        logits(model, random_ids(1, 9))
    with pytest.raises(ValueError, match=message):
        logits(model, random_ids(2, 9), torch.tensor([[0] * 3 + [1] * 6, [1] * 9]))


def test_a_failed_attach_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model()
    names = list(model.state_dict())

    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("hici.models.attach.GlobalIntegrator.__init__", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            attach(model, small_config())
    assert list(model.state_dict()) == names
    assert not is_attached(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    attach(model, small_config())


def test_masks_that_are_none(either_mode):
    model, mode = either_mode
    ids = random_ids(1, 9)
    for length in (8, 10):
        with pytest.raises(ValueError, match=f"attention_mask covers {length} tokens, but there are 9"):
            logits(model, ids, torch.ones(1, length, dtype=torch.long))
    with pytest.raises(ValueError, match=f"attention_mask is a dict, but attention mode '{mode}'"):
        model(ids, attention_mask={"full_attention": None})


def test_packed_positions(either_mode):
    model, mode = either_mode
    positions = torch.tensor([list(range(9)), [*range(4), *range(5)]])
    message = (
        rf"position_ids restart at token 4 of row 1 \(packed documents\), but attention mode '{mode}' counts segments "
        r"over a whole row; give one document a row \(padding is fine\), or model\.set_attn_implementation\('sdpa'\)"
    )
    with pytest.raises(ValueError, match=message):
        logits(model, random_ids(2, 9), position_ids=positions)
    with pytest.raises(ValueError, match="position_ids restart at token 5 of row 0"):
        logits(model, random_ids(1, 9), position_ids=torch.tensor([[3, 4, 5, 6, 7, 7, 8, 9, 10]]))


def test_packed_positions_behind_padding(attached):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="position_ids restart at token 6 of row 0"):
        logits(attached, random_ids(1, 9), mask, position_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 0, 1, 2]]))
    logits(attached, random_ids(1, 9), mask, position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5]]))  # usual fill


def test_output_attentions(either_mode):
    model, mode = either_mode
    message = (
        rf"output_attentions=True, but attention mode '{mode}' makes no attention matrix; drop it, or call "
        r"model\.set_attn_implementation\('eager'\)"
    )
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 9), output_attentions=True)


def test_output_attentions_in_the_config():
    model = strong_model()
    model.config._attn_implementation = "hici"
    model.config._output_attentions = True
    assert model.config.output_attentions
    with pytest.raises(ValueError, match="output_attentions=True, but attention mode 'hici' makes no"):
        model(random_ids(1, 9))


def _remedy(mode):
    bounded = r"hici\.HiCICache\(model\) \(memory that does not grow; visibility 'past'\), " if mode == "hici" else ""
    return rf"use {bounded}transformers\.DynamicCache\(config=.*\), or model\.set_attn_implementation\('sdpa'\)$"


def test_static_cache(either_mode):
    model, mode = either_mode
    message = (
        rf"a static cache \(StaticCache\) in attention mode '{mode}': its unused places would be summarised as tokens; "
    )
    with pytest.raises(ValueError, match=message + _remedy(mode)):
        model(random_ids(1, 9), past_key_values=StaticCache(config=model.config, max_cache_len=16))


@pytest.mark.parametrize(
    "name, kind", [("static", "static"), ("offloaded_static", "static"), ("quantized", "quantized")]
)
def test_cache_implementation(either_mode, name, kind):
    model, mode = either_mode
    message = (
        rf"cache_implementation='{name}' \(a {kind} cache\) in attention mode '{mode}', which needs the keys of .*; "
    )
    with pytest.raises(ValueError, match=message + _remedy(mode)):
        model.generate(random_ids(1, 9), max_new_tokens=2, cache_implementation=name, pad_token_id=0)


def test_a_cache_that_is_no_cache(attached):
    message = r"past_key_values is a tuple, which attention mode 'hici' does not know; pass transformers\.DynamicCache"
    with pytest.raises(ValueError, match=message):
        attached.model(random_ids(1, 9), past_key_values=())


def test_paged_cache(either_mode):
    model, mode = either_mode
    message = rf"a paged cache \(continuous batching\) in attention mode '{mode}', which keeps no pages; use model\.gen"
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 9), cache=object())


def test_four_dimensional_mask(either_mode):
    model, _ = either_mode
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    message = (
        r"attention_mask of shape \(1, 1, 9, 9\): HiCI's modes build their own causal mask; pass the \[batch, tokens\] "
        r"mask of real tokens, or none"
    )
    with pytest.raises(ValueError, match=message):
        logits(model, random_ids(1, 9), mask)


def test_is_causal(either_mode):
    model, mode = either_mode
    message = (
        rf"is_causal=True was passed to attention mode '{mode}': another tool \(accelerate's context parallelism does "
        r"so\) has replaced the mask, and segments would be wrong; switch that tool off"
    )
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 9), is_causal=True)


def test_accelerate_context_parallel_hooks():
    from accelerate.big_modeling import _attach_context_parallel_hooks

    model = strong_model()
    _attach_context_parallel_hooks(model)
    with pytest.raises(ValueError, match=r"is_causal=True was passed .*accelerate's context parallelism"):
        model(random_ids(1, 9), attention_mask=torch.ones(1, 9, dtype=torch.long))


@pytest.mark.parametrize("act", [attach, detach], ids=lambda f: f.__name__)
def test_peft_model(act):
    model = tiny_model() if act is attach else strong_model()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    message = (
        r"PeftModel\w* is a PEFT model, but HiCI goes below PEFT; attach to the plain model first and wrap it then "
        r"\(to detach: merge_and_unload\(\) or unload\(\) first\)"
    )
    with pytest.raises(ValueError, match=message):
        act(model)


def test_reconfigure_works_below_peft():
    model = strong_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert is_attached(wrapped)
    reconfigure(wrapped, visibility="past")
    assert hici_config(wrapped).visibility == "past"
    assert wrapped.config.hici["visibility"] == "past"
    logits(wrapped, random_ids(1, 9))


def test_window_shorter_than_the_segment():
    model = strong_model("mistral", options={"sliding_window": 6}, check=False)
    message = (
        r"segments of 8 tokens are longer than the model's sliding window of 6, which HiCI attention would not keep; "
        r"give segment_size <= 6, or config\.sliding_window=None if the model allows full attention"
    )
    for mode in ("hici", "hici_s2"):
        model.set_attn_implementation(mode)
        with pytest.raises(ValueError, match=message):
            logits(model, random_ids(1, 29))
        logits(model, random_ids(1, 6))  # nothing is longer than the window
    logits(reconfigure(model, segment_size=6), random_ids(1, 29))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_local_slots": 4}, r"num_local_slots=4 instead of 3 needs other modules; detach and attach with the new"),
        ({"num_global_slots": 4}, "num_global_slots=4 instead of 2 needs other modules"),
        ({"num_heads": 2}, "num_heads=2 instead of 4 needs other modules"),
        ({"bottleneck_dim": 64}, "bottleneck_dim=64 instead of 32 needs other modules"),
        ({"compress_dim": None}, "compress_dim=None instead of 16 needs other modules"),
        ({"integrator_dim": 64}, "integrator_dim=64 instead of None needs other modules"),
        ({"visibility": "future"}, "unknown visibility 'future'"),
        ({"visibilty": "past"}, "unknown HiCIConfig field 'visibilty'; .*Did you mean 'visibility'"),
        ({"backend": "sdp"}, r"unknown attention backend 'sdp'; .*Did you mean 'sdpa'\?"),
        ({"num_segments": 2, "segment_size": 3}, "are both given"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_reconfigure(attached, change, message):
    before = hici_config(attached)
    with pytest.raises(ValueError, match=message):
        reconfigure(attached, **change)
    assert hici_config(attached) is before


def test_integrator_dim_of_the_same_width_is_no_change():
    model = strong_model()
    assert hici_config(reconfigure(model, integrator_dim=32)).integrator_dim == 32


def test_unknown_backend_leaves_the_model_alone():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"unknown attention backend 'flesh'; known: auto, "):
        attach(model, small_config(backend="flesh"))
    assert not is_attached(model)
    assert model.config._attn_implementation == "sdpa"
    logits(model, random_ids(1, 9))


def test_heads_must_divide_the_width_without_a_bottleneck():
    model = tiny_model()
    config = small_config(bottleneck_dim=None, integrator_dim=33, num_heads=3)
    with pytest.raises(ValueError, match="num_heads=3 does not divide the model's width 64, which bottleneck_dim=None"):
        attach(model, config)
    assert not is_attached(model)


def test_refusals_leave_full_mode_alone(attached):
    """What the modes of this library refuse, the stock attention of an attached model still does."""
    attached.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            attached(random_ids(1, 9), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
            attached(random_ids(1, 9), attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
            attached.generate(random_ids(1, 9), max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    finally:
        attached.set_attn_implementation("hici")
