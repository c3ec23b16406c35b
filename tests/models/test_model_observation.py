"""Observing attention changes nothing, leaves nothing behind, and shows what the layer really works on."""

import pytest
import torch
from torch import nn

import hici
from helpers import (
    ARCHITECTURES,
    SEGMENT,
    difference,
    golden_model,
    logits,
    random_ids,
    small_config,
    strong_model,
    tiny_model,
)
from hici.attention import get_backend, reference
from hici.core.broadcast import visible_slots
from hici.models.attach import attach, reconfigure
from hici.models.lookup import attention_modules, get_decoder
from hici.models.modes import set_attention
from hici.models.observation import observe_attention

IDS = random_ids(2, 3 * SEGMENT + 5)
VISIBILITIES = ("all", "current", "past")


def observed(model, ids=IDS, layers=None, **inputs):
    """(logits, observations) of one call."""
    seen = []
    with observe_attention(model, seen.append, layers):
        out = logits(model, ids, use_cache=False, **inputs)
    return out, seen


def traces(model):
    """All that an observer could leave on the modules: hooks and attributes, by identity."""
    return [
        (name, key, list(value.items()) if key.endswith("_hooks") or "hooks_with" in key else id(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hook" in key or key.startswith("hici")
    ]


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_logit_changes_and_no_trace_stays(architecture, visibility):
    model = strong_model(architecture, visibility=visibility)
    before, expected = traces(model), logits(model, IDS, use_cache=False)
    out, seen = observed(model)
    assert torch.equal(out, expected)
    assert [each.layer for each in seen] == [0, 1]
    assert traces(model) == before
    assert torch.equal(logits(model, IDS, use_cache=False), expected)
    assert len(seen) == 2


@pytest.mark.parametrize("place", ["callback", "call"])
def test_an_error_leaves_no_trace(place):
    model = strong_model(visibility="past")
    before, expected = traces(model), logits(model, IDS, use_cache=False)

    def fails(_):
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match=place), observe_attention(model, fails):  # noqa: PT012
        assert traces(model) != before
        if place == "callback":
            logits(model, IDS, use_cache=False)
        raise RuntimeError("call")
    assert traces(model) == before
    assert torch.equal(logits(model, IDS, use_cache=False), expected)


@pytest.mark.parametrize("use", [{}, {"use_local": False}, {"use_global": False}], ids=["both", "global", "local"])
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3"])
def test_what_is_seen_makes_the_layers_output(architecture, visibility, use):
    """The reference over it equals what the output projection gets, and the slots make the slots' keys and values."""
    model = strong_model(architecture, visibility=visibility, **use)
    modules, outputs = attention_modules(model), []
    hooks = [m.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0])) for m in modules]
    _, seen = observed(model)
    assert len(seen) == len(outputs) == 2
    for each, out, module in zip(seen, outputs, modules, strict=True):
        again = reference.attend(*each[1:6], segment_size=each.segment_size, scale=each.scale)
        assert difference(again.flatten(2), out) < 1e-5
        n = 4 - (visibility == "past")
        assert each.segment_size == SEGMENT
        assert each.local_BNMD.shape == (2, n, 3, 64)
        assert (each.global_BNKD is None) == ("use_global" in use)
        if each.global_BNKD is not None:
            assert each.global_BNKD.shape == (2, 1 if visibility == "all" else n, 2, 64)
        shared = each.global_BNKD[:, 0] if visibility == "all" and "use_global" not in use else each.global_BNKD
        slots = visible_slots(shared, None if "use_local" in use else each.local_BNMD, visibility, 4)
        made = module.hici_architecture.slot_keys_values(module, slots.flatten(1, 2))
        for actual, expected in zip((each.slot_k_BNPJE, each.slot_v_BNPJE), made, strict=True):
            assert difference(actual, expected.unflatten(1, (n, -1))) < 1e-5
    for hook in hooks:
        hook.remove()


def test_the_golden_model_observed_gives_its_golden_shapes():
    model = golden_model("llama_gqa")
    ids = random_ids(1, 37)
    expected = logits(model, ids, use_cache=False)
    out, seen = observed(model, ids)
    assert torch.equal(out, expected)
    first = seen[0]
    assert first.segment_size == 10  # four segments
    assert first.q_BTHE.shape[1] == 37
    assert first.slot_k_BNPJE.shape[1] == first.local_BNMD.shape[1] == 4


def test_one_segment_of_the_past_has_no_slots():
    """And not those of the call before."""
    model, seen = strong_model(visibility="past"), []
    with observe_attention(model, seen.append):
        logits(model, IDS, use_cache=False)
        logits(model, IDS[:, :SEGMENT], use_cache=False)
    assert [each.q_BTHE.shape[1] for each in seen] == [IDS.shape[1]] * 2 + [SEGMENT] * 2
    for each in seen[:2]:
        assert None not in [x if x is None else 0 for x in each[4:8]]
    for each in seen[2:]:
        assert each[4:8] == (None, None, None, None)


def test_some_layers_only():
    model = strong_model("llama", options={"num_hidden_layers": 4}, visibility="past")
    assert [each.layer for each in observed(model, layers=[3, 1])[1]] == [1, 3]
    before = traces(model)
    with observe_attention(model, print, [2]):
        changed = [i for i, module in enumerate(attention_modules(model))
                   if module.hici_attend is not get_backend("auto").attend]  # fmt: skip
        assert changed == [2]
    assert traces(model) == before


def test_below_peft():
    model = strong_model(visibility="past")
    wrapped = hici.add_lora(model, r=2).eval()
    expected = logits(wrapped, IDS, use_cache=False)
    out, seen = observed(wrapped)
    assert torch.equal(out, expected)
    assert [each.layer for each in seen] == [0, 1]


def test_two_observers_and_a_change_of_the_backend():
    model = strong_model(visibility="past")
    before, outer, inner = traces(model), [], []
    with observe_attention(model, outer.append):
        with observe_attention(model, inner.append):
            logits(model, IDS, use_cache=False)
        logits(model, IDS, use_cache=False)
    assert (len(outer), len(inner)) == (4, 2)
    assert traces(model) == before
    with observe_attention(model, outer.append):
        reconfigure(model, backend="reference")
    for attention in attention_modules(model):
        assert attention.hici_attend is reference.attend


def test_padding_is_refused_and_a_mask_of_ones_is_none():
    model = strong_model(visibility="past")
    mask = torch.ones_like(IDS)
    out, seen = observed(model, mask=mask)
    assert torch.equal(out, logits(model, IDS, use_cache=False))
    assert len(seen) == 2
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="an observed call has padding.*give rows of one length"):
        observed(model, mask=mask)


def test_a_cache_is_refused():
    model = strong_model(visibility="past")
    with pytest.raises(ValueError, match="an observed call has a cache.*use_cache=False"), \
            observe_attention(model, print):  # fmt: skip
        logits(model, IDS, use_cache=True)
    with pytest.raises(ValueError, match="an observed call has a cache"), observe_attention(model, print):
        logits(model, IDS, past_key_values=hici.HiCICache(model))


@pytest.mark.parametrize("mode", ["full", "hici_s2"])
def test_other_modes_are_refused(mode):
    model = strong_model(visibility="past")
    with observe_attention(model, print):
        set_attention(model, mode)
        with pytest.raises(ValueError, match=r"attention mode '\w+' makes no slots.*set_attn_implementation\('hici'\)"):
            logits(model, IDS, use_cache=False)
    with pytest.raises(ValueError, match="makes no slots"), observe_attention(model, print):
        pytest.fail("entered")


def test_a_model_without_hici_is_refused():
    with pytest.raises(ValueError, match="HiCI is not attached to this model"), observe_attention(tiny_model(), print):
        pytest.fail("entered")


@pytest.mark.parametrize("how", ["module", "method", "part"])
def test_a_compiled_model_is_refused(how):
    model = strong_model(visibility="past")
    if how == "module":
        model = torch.compile(model)
    elif how == "method":
        model.compile()
    else:
        get_decoder(model).layers[1] = torch.compile(get_decoder(model).layers[1])
    with pytest.raises(ValueError, match="the model is compiled"), observe_attention(model, print):
        pytest.fail("entered")


@pytest.mark.parametrize("layers, message", [([2], r"layer 2 is not in 0\.\.1"), ([0, -1], "layer -1"), ([], "empty")])
def test_layers_that_are_none_are_refused(layers, message):
    model = attach(tiny_model(), small_config(visibility="past"))
    before = traces(model)
    with pytest.raises(ValueError, match=message), observe_attention(model, print, layers):
        pytest.fail("entered")
    assert traces(model) == before


def test_traces_would_be_seen():
    model = strong_model(visibility="past")
    before = traces(model)
    hook = attention_modules(model)[0].local_constructor.register_forward_hook(lambda *_: None)
    assert traces(model) != before
    hook.remove()
    assert traces(model) == before
    nn.Module.__setattr__(attention_modules(model)[1], "hici_attend", print)
    assert traces(model) != before
