"""Stage 2 against the golden modules; statistics against float64; initial values; the gate in files."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from helpers import difference, golden_json, golden_tensors, relative, small_config, tiny_model
from hici.core.global_integration import EPSILON, GlobalIntegrator, cumulative_statistics, slot_statistics
from hici.models.attach import attach
from hici.models.lookup import attention_modules

FAMILIES = {
    "independent": ("module_global_integrator", None),
    "shared": ("module_global_integrator_shared", 16),
    "noexpand": ("module_global_integrator_shared_noexpand", 32),
}
NAMES = ("mean", "max", "min", "std", "direction")


@pytest.fixture(params=FAMILIES)
def family(request):
    name, compress_dim = FAMILIES[request.param]
    tensors = golden_tensors(name)
    module = GlobalIntegrator(64, 4, 4, 32, compress_dim)
    module.load_state_dict({k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")})
    assert golden_json(name)["config"]["compress_dim"] == 32
    return module, tensors


@pytest.mark.parametrize("part, segments", [("", 4), ("_1chunk", 1)], ids=["4segments", "1segment"])
def test_golden_whole(family, part, segments):
    module, tensors = family
    out = module(slot_statistics(tensors["local_repr"][:, :segments]))
    assert difference(out, tensors[f"output_forward{part}"]) < 5e-6


@pytest.mark.parametrize("part, segments", [("", 4), ("_1chunk", 1)], ids=["4segments", "1segment"])
def test_golden_cumulative(family, part, segments):
    module, tensors = family
    out = module(cumulative_statistics(tensors["local_repr"][:, :segments]))
    assert difference(out, tensors[f"output_forward_causal{part}"]) < 5e-6


def test_golden_identical_slots(family):
    """Whole only: the published causal form is rounding noise there, ours equals the whole."""
    module, tensors = family
    const = tensors["local_repr_const"]
    assert difference(module(slot_statistics(const)), tensors["output_forward_const"]) < 5e-6
    assert difference(module(cumulative_statistics(const))[:, -1], tensors["output_forward_const"]) < 5e-6


def test_masked_statistics_are_those_of_the_real_segments(family):
    module, tensors = family
    local = tensors["local_repr"]
    real = torch.tensor([[True, True, False, False], [True, True, True, True]])
    spoiled = torch.where(real[..., None, None], local, 1e6)
    statistics = slot_statistics(spoiled, real)
    assert difference(statistics[0], slot_statistics(local[:1, :2])[0]) < 1e-6
    assert difference(statistics[1], slot_statistics(local)[1]) < 1e-6
    assert difference(module(statistics)[1], tensors["output_forward"][1]) < 5e-6


def _float64(slots_XD):
    """The five statistics of slots [X, D] by their definitions, in float64."""
    x = slots_XD.double()
    mean = x.mean(0)
    std = ((x - mean) ** 2).mean(0).sqrt().clamp(min=EPSILON)
    return torch.stack((mean, x.max(0).values, x.min(0).values, std, mean / mean.norm().clamp(min=EPSILON)))


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([0.0, 1.0, 1e3]),
    st.sampled_from([1e-2, 1.0, 30.0]),
    st.integers(0, 10**6),
)
def test_statistics_on_every_prefix(batch, n, m, offset, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    local = offset + spread * torch.randn(batch, n, m, 6, generator=generator)
    cumulative = cumulative_statistics(local)
    assert cumulative.shape == (batch, n, 5, 6)
    bound = 1e-5 * (spread + offset)  # float32 rounding at this size of the data
    for i in range(n):
        whole = slot_statistics(local[:, : i + 1])
        for b in range(batch):
            exact = _float64(local[b, : i + 1].flatten(0, 1))
            bounds = dict.fromkeys(NAMES, bound) | {"direction": 2 * bound / exact[0].norm().item()}
            for k, name in enumerate(NAMES):
                assert difference(cumulative[b, i, k], exact[k]) < bounds[name], (name, i, "cumulative")
                assert difference(whole[b, k], exact[k]) < bounds[name], (name, i, "whole")


@pytest.mark.parametrize("statistics", [cumulative_statistics, slot_statistics])
def test_huge_mean_and_small_variance(statistics):
    """E[x^2] - E[x]^2 in float32 would lose the standard deviation completely: 1000 +- 0.1."""
    local = 1000 + 0.1 * torch.randn(2, 5, 8, 16)
    out = statistics(local)
    last = out[:, -1] if statistics is cumulative_statistics else out
    for b in range(2):
        exact = _float64(local[b].flatten(0, 1))
        assert relative(last[b, 3], exact[3]) < 2e-3
        naive = (local[b].flatten(0, 1).square().mean(0) - local[b].flatten(0, 1).mean(0) ** 2).clamp(min=0).sqrt()
        assert relative(naive, exact[3]) > 0.1  # what this test is there to refuse


@pytest.mark.parametrize("value", [0.0, 0.7, 1e4])
@pytest.mark.parametrize(
    "statistics",
    [
        slot_statistics,
        lambda x: slot_statistics(x, torch.tensor([[True, True, False]])),
        lambda x: slot_statistics(x, torch.tensor([[False, False, False]])),
        cumulative_statistics,
    ],
    ids=["whole", "masked", "masked-all", "cumulative"],
)
def test_finite_at_zero_variance(statistics, value):
    local = torch.full((1, 3, 4, 8), value, requires_grad=True)
    module = GlobalIntegrator(8, 2, 2, 4, 4)
    out = statistics(local)
    module(out).sum().backward()
    assert out.isfinite().all()
    assert (out[..., 3, :] == EPSILON).all()
    assert local.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_a_row_without_real_segments_gives_zeros():
    out = slot_statistics(torch.randn(1, 2, 3, 4), torch.zeros(1, 2, dtype=torch.bool))
    assert torch.equal(out[0, [0, 1, 2, 4]], torch.zeros(4, 4))


def test_the_mask_broadcasts_over_the_batch():
    local = torch.randn(3, 2, 3, 4)
    assert torch.equal(
        slot_statistics(local, torch.tensor([[True, False]])),
        slot_statistics(local, torch.tensor([[True, False]] * 3)),
    )


def test_bfloat16_statistics_are_float32():
    local = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    assert slot_statistics(local).dtype == cumulative_statistics(local).dtype == torch.float32
    module = GlobalIntegrator(4, 2, 2, 4, 2, dtype=torch.bfloat16)
    assert module(slot_statistics(local)).dtype == torch.bfloat16


def test_initial_values():
    torch.manual_seed(0)
    module = GlobalIntegrator(1024, 64, 8, 256, 128)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = getattr(module, name).weight
        bound = math.sqrt(6 / 512)  # Xavier uniform, 256 -> 256
        assert weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01), name
    assert module.expand.weight.std().item() == pytest.approx(0.02 / 16, rel=0.01)
    assert module.expand_scale_param.shape == (1,)
    assert module.expand_scale_param.item() == pytest.approx(math.log(math.exp(0.1) - 1), rel=1e-5)
    assert functional.softplus(module.expand_scale_param).item() == pytest.approx(0.1, rel=1e-5)
    for linear, norm, inputs in (
        (module.shared_compressor[0], module.shared_compressor[1], 1024),
        (module.stat_expand[0], module.stat_expand[1], 128),
    ):
        assert linear.bias is None
        assert linear.weight.abs().max().item() <= inputs**-0.5
        assert linear.weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.01)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
        assert norm.eps == 1e-5
    bound = math.sqrt(6 / (64 + 256))  # no embedding: Xavier uniform
    assert module.global_queries.abs().max().item() <= bound
    assert module.global_queries.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("compress_dim", [16, 32, None], ids=["shared-expand", "shared", "independent"])
def test_queries_are_the_compressed_largest_embeddings(compress_dim):
    model = tiny_model()
    table = model.get_input_embeddings().weight.detach()
    rows = table[sorted(range(len(table)), key=lambda i: -table[i].norm().item())[:2]]
    attach(model, small_config(compress_dim=compress_dim))
    for attention in attention_modules(model):
        module = attention.global_integrator
        if compress_dim is None:
            expected = module.stat_compressors[0](rows)
        elif compress_dim == 16:
            expected = module.stat_expand(module.shared_compressor(rows))
        else:
            assert isinstance(module.stat_expand, torch.nn.Identity)
            expected = module.shared_compressor(rows)
        assert difference(module.global_queries, expected) < 1e-6
    first, second = (a.global_integrator.global_queries for a in attention_modules(model))
    assert difference(first, second) > 0.1  # each layer has its own compressor


def test_the_gate_is_a_scalar_in_files_and_one_element_inside():
    module = GlobalIntegrator(8, 2, 2, 4, 2)
    state = module.state_dict()
    assert state["expand_scale_param"].shape == ()
    other = GlobalIntegrator(8, 2, 2, 4, 2)
    for shape in ((), (1,)):
        state["expand_scale_param"] = torch.full(shape, 0.25)
        result = other.load_state_dict(state, strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert other.expand_scale_param.shape == (1,)
        assert other.expand_scale_param.item() == 0.25


def test_published_names():
    names = set(GlobalIntegrator(8, 2, 2, 4, 2).state_dict())
    common = {f"{p}_proj.weight" for p in "qkvo"} | {"expand.weight", "expand_scale_param", "global_queries"}
    layers = ("0.weight", "1.weight", "1.bias")
    assert names == common | {f"{part}.{rest}" for part in ("shared_compressor", "stat_expand") for rest in layers}
    names = set(GlobalIntegrator(8, 2, 2, 4, None).state_dict())
    assert names == common | {f"stat_compressors.{i}.{r}" for i in range(5) for r in layers}
