"""The published implementation's numbers: logits, intermediates and gradients (tests/golden, see its README's source).

Three ways of computing: the reference backend, sdpa, and sdpa with absorbed projections (forced: the golden models'
M * h equals the bottleneck, so absorbing is not cheaper there).
"""

import pytest
import torch

from golden_checkpoint import MODES, TOLERANCE
from helpers import (
    difference,
    golden_json,
    golden_model,
    golden_tensors,
    logits,
    loss_and_gradients,
    record_paths,
    relative,
)
from hici.core.local_construction import LocalConstructor
from hici.models.attach import hici_state_dict, reconfigure
from hici.models.lookup import attention_modules

FAMILIES = ("llama_gqa", "llama_mha", "llama_gqa_indep", "llama_gqa_rope4", "qwen3_gqa")
WAYS = ("reference", "sdpa", "absorbed")
DELIBERATE = "train.none.pad41"  # there a fully padded segment enters the published G; never ours


def _cases(*forwards):
    return [
        pytest.param(family, case, id=f"{family}-{case}")
        for family in FAMILIES
        for case, settings in golden_json(f"{family}.cases")["cases"].items()
        if settings["forward"] in forwards and case != DELIBERATE
    ]


def _inputs(family, case):
    tensors = golden_tensors(f"{family}.cases")
    settings = golden_json(f"{family}.cases")["cases"][case]
    ids = (
        tensors["input_ids"][:, :10] if settings["input_ids"] == "input_ids[:, :10]" else tensors[settings["input_ids"]]
    )
    mask = settings["attention_mask"]
    return ids, None if mask.startswith("None") else tensors[mask]


def _set_up(monkeypatch, model, way, mode, use_global=True, use_local=True, **segments):
    """The published mode on the attached model, computed in one of the three ways."""
    visibility, with_global, with_local = MODES[mode]
    reconfigure(
        model,
        visibility=visibility,
        use_global=with_global and use_global,
        use_local=with_local and use_local,
        backend="reference" if way == "reference" else "sdpa",
        **(segments or {"num_segments": 4}),
    )
    if way == "absorbed":
        monkeypatch.setattr(LocalConstructor, "_absorbing_is_cheaper", lambda self, tokens: True)
    return record_paths(monkeypatch)


def _compare(out, family, case, mask):
    expected = golden_tensors(f"{family}.cases")[f"{case}/logits"]
    gap = (out - expected).abs()
    if mask is not None:
        gap = gap[mask.bool()]
    assert gap.max().item() < TOLERANCE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family, case", _cases("train"))
def test_training_cases(monkeypatch, family, case, way):
    settings = golden_json(f"{family}.cases")["cases"][case]
    model = golden_model(family)
    segments = {"segment_size": 2} if case.endswith("len10") else {}
    taken = _set_up(
        monkeypatch, model, way, settings["mode"], settings.get("ug", True), settings.get("ul", True), **segments
    )
    ids, mask = _inputs(family, case)
    _compare(logits(model, ids, mask), family, case, mask)
    neither = case.endswith(("neither", "gonly.L_only"))
    assert taken == ([] if neither else ["absorbed" if way == "absorbed" else "plain"] * 2)


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
@pytest.mark.parametrize("family, case", _cases("full"))
def test_full_attention(family, case, mode):
    model = golden_model(family)
    model.set_attn_implementation(mode)
    ids, mask = _inputs(family, case)
    _compare(logits(model, ids, mask), family, case, mask)


@pytest.mark.parametrize("family, case", _cases("s2"))
def test_shifted_sparse_attention(family, case):
    model = golden_model(family)
    model.set_attn_implementation("hici_s2")
    _compare(logits(model, *_inputs(family, case)), family, case, None)


@pytest.mark.parametrize(
    "case, segments", [("infer_seg16", {"segment_size": 16}), ("infer_fullhici", {"num_segments": 1})]
)
def test_qwen3_inference_function_is_mode_none(monkeypatch, case, segments):
    model = golden_model("qwen3_gqa")
    _set_up(monkeypatch, model, "sdpa", "none", **segments)
    _compare(logits(model, *_inputs("qwen3_gqa", case)), "qwen3_gqa", case, None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama_gqa", "qwen3_gqa"])
def test_deliberate_difference_only_in_the_padded_row(monkeypatch, family, way):
    model = golden_model(family)
    _set_up(monkeypatch, model, way, "none")
    ids, mask = _inputs(family, DELIBERATE)
    assert mask.sum(1).tolist() == [64, 41]
    out = logits(model, ids, mask)
    gap = (out - golden_tensors(f"{family}.cases")[f"{DELIBERATE}/logits"]).abs()
    assert gap[0].max().item() < TOLERANCE
    assert 0.1 < gap[1, :41].max().item() < 10
    alone = logits(reconfigure(model, segment_size=16), ids[1:, :41])  # ours: as if there were no padding
    assert difference(out[1:, :41], alone) < TOLERANCE


def _intermediate_cases():
    return [
        pytest.param(family, case, id=f"{family}-{case}")
        for family in FAMILIES
        for case in golden_json(f"{family}.cases")["cases"]
        if f"{case}/layer0.local" in golden_tensors(f"{family}.cases")
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family, case", _intermediate_cases())
def test_layer_intermediates(monkeypatch, family, case, way):
    model = golden_model(family)
    mode = golden_json(f"{family}.cases")["cases"][case]["mode"]
    _set_up(monkeypatch, model, way, mode)
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for i, attention in enumerate(attention_modules(model)):
        attention.local_constructor.register_forward_hook(keep(f"layer{i}.local"))
        attention.global_integrator.register_forward_hook(keep(f"layer{i}.global"))
        attention.register_forward_hook(keep(f"layer{i}.attn_out"))
    logits(model, *_inputs(family, case))
    expected = golden_tensors(f"{family}.cases")
    segments = 3 if mode == "causal_shift" else 4  # the last segment's summary is seen by nobody: not computed
    for i in range(2):
        local = expected[f"{case}/layer{i}.local"].unflatten(0, (2, 4))[:, :segments]
        assert difference(seen[f"layer{i}.local"], local) < TOLERANCE
        if mode == "none":
            wanted = expected[f"{case}/layer{i}.global"]
        else:
            wanted = expected[f"{case}/layer{i}.global_causal"][:, :segments]
        assert difference(seen[f"layer{i}.global"], wanted) < TOLERANCE
        assert difference(seen[f"layer{i}.attn_out"], expected[f"{case}/layer{i}.attn_out"]) < TOLERANCE


def _gradient_cases():
    return [
        pytest.param(family, mode, id=f"{family}-{mode}")
        for family in ("llama_gqa", "llama_gqa_indep", "qwen3_gqa")
        for mode in golden_json(f"{family}.grads")["cases"]
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family, mode", _gradient_cases())
def test_gradients(monkeypatch, family, mode, way):
    model = golden_model(family).train()
    _set_up(monkeypatch, model, way, mode)
    expected = golden_tensors(f"{family}.grads")
    loss, gradients = loss_and_gradients(model, golden_tensors(f"{family}.cases")["input_ids"])
    assert abs(loss.item() - expected[f"{mode}/loss"].item()) < 1e-5
    compared = 0
    for key, gradient in expected.items():
        if key.startswith(f"{mode}/grad/"):
            name = key.removeprefix(f"{mode}/grad/")
            assert relative(gradients[name].reshape(gradient.shape), gradient) < 1e-4, name
            compared += 1
    assert compared > 15
    norms = golden_json(f"{family}.grads")["grad_norms_all_params"][mode]
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_has_the_published_names_and_shapes(family):
    weights = golden_json(f"{family}.cases")["weights"].removesuffix(".safetensors")
    expected = golden_tensors(weights)
    model = golden_model(family)
    result = model.load_state_dict(expected, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    state = model.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in expected.items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    gates = [name for name in state if name.endswith("expand_scale_param")]
    assert len(gates) == 2
    assert all(state[name].shape == torch.Size([]) for name in gates)
    own = {name for name in expected if "local_constructor" in name or "global_integrator" in name}
    assert hici_state_dict(model).keys() == own
