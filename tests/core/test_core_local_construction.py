"""Stage 1 against the golden module, and the absorbed projections against the plain ones."""

import peft
import pytest
import torch
from torch import nn

from helpers import difference, golden_tensors, record_paths, relative
from hici.core.local_construction import LocalConstructor

GOLDEN = "module_local_constructor"


def _golden_constructor(prefix="", absorb=True):
    tensors = golden_tensors(GOLDEN)
    module = LocalConstructor(64, 8, 4, None if prefix else 32, absorb=absorb)
    start = prefix + "param."
    state = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    module.load_state_dict(state, strict=True)
    return module


@pytest.mark.parametrize("path", ["plain", "absorbed"])
@pytest.mark.parametrize("masked", [False, True], ids=["nomask", "mask"])
@pytest.mark.parametrize("prefix", ["", "full."], ids=["bottleneck", "full"])
def test_golden(monkeypatch, prefix, masked, path):
    tensors = golden_tensors(GOLDEN)
    monkeypatch.setattr(LocalConstructor, "_absorbing_is_cheaper", lambda self, tokens: True)
    taken = record_paths(monkeypatch)
    module = _golden_constructor(prefix, absorb=path == "absorbed")
    mask = tensors["mask"].bool()[:, None] if masked else None
    out = module(tensors["input"][:, None], mask)[:, 0]
    assert taken == [path]
    assert difference(out, tensors[f"{prefix}output_{'mask' if masked else 'nomask'}"]) < 2e-6


@pytest.mark.parametrize("path", ["plain", "absorbed"])
def test_a_segment_without_real_tokens_gives_zeros_unlike_the_published_default(monkeypatch, path):
    tensors = golden_tensors(GOLDEN)
    monkeypatch.setattr(LocalConstructor, "_absorbing_is_cheaper", lambda self, tokens: True)
    module = _golden_constructor(absorb=path == "absorbed")
    out = module(tensors["input"][:, None], tensors["mask_dead"].bool()[:, None])[:, 0]
    assert tensors["mask_dead"][0].sum() == 0
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert difference(out[0], tensors["output_mask_dead"][0]) > 0.1  # Multi: uniform average over padding
    assert difference(out[1:], tensors["output_mask_dead"][1:]) < 2e-6
    assert difference(out, tensors["flash.output_mask_dead"]) < 2e-6


def test_padding_content_never_comes_through():
    module = LocalConstructor(16, 2, 2, 8)
    x = torch.randn(2, 3, 5, 16)
    real = torch.rand(2, 3, 5) > 0.4
    real[0, 0] = False
    filled = torch.where(real[..., None], x, 1e4)
    assert torch.equal(module(x, real), module(filled, real))


def test_segments_do_not_mix():
    module = LocalConstructor(16, 2, 2, 8)
    x = torch.randn(2, 3, 5, 16)
    assert difference(module(x)[1, 2], module(x[1:, 2:])[0, 0]) < 1e-6


# float32: rounding only. bfloat16: both paths round at different places; each is held to the float64 result.
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 0.03)], ids=["float32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["nomask", "mask"])
@pytest.mark.parametrize("bottleneck", [32, None], ids=["C32", "full"])
def test_absorbed_equals_plain(monkeypatch, bottleneck, masked, dtype, bound):
    torch.manual_seed(3)
    exact = LocalConstructor(48, 3, 4, bottleneck, dtype=torch.float64)
    exact.memory_slots.data.normal_(std=1.0)
    taken = record_paths(monkeypatch)
    x = torch.randn(2, 3, 7, 48, dtype=torch.float64)
    real = None
    if masked:
        real = torch.rand(2, 3, 7) > 0.3
        real[1, 2] = False
    weight = torch.randn(2, 3, 3, 48, dtype=torch.float64)

    def run(module, dtype):
        inputs = x.to(dtype, copy=True).requires_grad_()
        out = module(inputs, real)
        (out * weight.to(dtype)).sum().backward()
        return {"out": out, "input": inputs.grad, **{n: p.grad for n, p in module.named_parameters()}}

    exact.absorb = False
    expected = run(exact, torch.float64)
    for absorb in (False, True):
        module = LocalConstructor(48, 3, 4, bottleneck, absorb=absorb, dtype=dtype)
        module.load_state_dict(exact.state_dict())
        actual = run(module, dtype)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert value.abs().max() > 1e-3, f"{name}: nothing to compare"
            assert relative(actual[name], value) < bound, (name, absorb)
    assert taken == ["plain", "plain", "absorbed"]


@pytest.mark.parametrize(
    "slots, heads, bottleneck, tokens, path",
    [
        (8, 4, 32, 512, "plain"),
        (7, 4, 32, 512, "absorbed"),
        (7, 4, 32, 8, "plain"),  # too few tokens to pay for the absorbed projections
        (2, 4, 32, 1, "plain"),
        (8, 4, 64, 512, "absorbed"),
        (9, 4, 32, 512, "plain"),
        (15, 4, None, 512, "absorbed"),
    ],
)
def test_absorbed_only_where_it_is_cheaper(monkeypatch, slots, heads, bottleneck, tokens, path):
    taken = record_paths(monkeypatch)
    LocalConstructor(64, slots, heads, bottleneck)(torch.randn(1, 2, tokens, 64))
    assert taken == [path]


@pytest.mark.parametrize("target", ["k_proj", "v_proj"])
def test_lora_inside_takes_the_plain_path_and_takes_part(monkeypatch, target):
    taken = record_paths(monkeypatch)
    module = LocalConstructor(64, 2, 4, 32)
    x = torch.randn(1, 2, 5, 64)
    before = module(x)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=[target]), module)
    layer = getattr(module, target)
    assert type(layer) is not nn.Linear
    nn.init.normal_(layer.lora_B["default"].weight)
    after = module(x)
    assert taken == ["absorbed", "plain"]
    assert difference(before, after) > 1e-2

    folded = LocalConstructor(64, 2, 4, 32)
    state = {name.replace(".base_layer", ""): t for name, t in module.state_dict().items() if "lora_" not in name}
    state[f"{target}.weight"] = layer.base_layer.weight + layer.get_delta_weight("default")
    folded.load_state_dict(state)
    assert difference(after, folded(x)) < 1e-5


def test_a_hook_on_a_projection_takes_the_plain_path(monkeypatch):
    taken = record_paths(monkeypatch)
    module = LocalConstructor(64, 2, 4, 32)
    module.k_proj.register_forward_hook(lambda *args: None)
    module(torch.randn(1, 2, 5, 64))
    assert taken == ["plain"]


def test_initial_values():
    torch.manual_seed(0)
    module = LocalConstructor(1024, 64, 8, 256)
    assert module.memory_slots.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert abs(module.memory_slots.mean().item()) < 3 * 1024**-0.5 / 256
    for name, inputs in (("q_proj", 1024), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", 256)):
        weight = getattr(module, name).weight
        bound = inputs**-0.5  # torch's default: uniform in +-1/sqrt(inputs)
        assert weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01), name


def test_no_bottleneck_has_no_output_projection():
    module = LocalConstructor(16, 2, 2, None)
    assert module.o_proj is None
    assert sorted(module.state_dict()) == ["k_proj.weight", "memory_slots", "q_proj.weight", "v_proj.weight"]
