"""Training: gradient checkpointing, every parameter takes part, autocast, the loss that holds no [T, V] logits."""

import pytest
import torch
from torch.nn import functional

from helpers import (
    ARCHITECTURES,
    assert_same_gradients,
    difference,
    logits,
    loss_and_gradients,
    padded,
    random_ids,
    relative,
    strong_model,
)
from hici.models.attach import reconfigure
from hici.models.lookup import attention_modules
from hici.models.loss import next_token_loss, next_token_losses, summed_loss, token_losses


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("way", ["all", "current", "past", "s2", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_is_exact(architecture, way, reentrant):
    model = strong_model(architecture, visibility=way if way in ("all", "current", "past") else "all").train()
    if way == "s2":
        model.set_attn_implementation("hici_s2")
    ids, mask = random_ids(2, 29), None
    if way == "padded":
        ids, mask = padded([ids[0], ids[1, :13]], "left")
    expected_loss, expected = loss_and_gradients(model, ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, gradients = loss_and_gradients(model, ids, mask)
    assert difference(loss, expected_loss) < 2e-6  # without gradients torch may fold a product another way
    assert_same_gradients(gradients, expected, 2e-4)  # a gate's gradient is a sum that cancels


@pytest.mark.parametrize("backend", ["sdpa"])
@pytest.mark.parametrize("visibility", ["all", "current", "past"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_gradients_equal_the_reference(architecture, visibility, backend):
    model = strong_model(architecture, visibility=visibility, backend="reference")
    ids, mask = padded([random_ids(1, 29)[0], random_ids(1, 13)[0]], "left")
    labels = ids.masked_fill(mask == 0, -100)
    expected_loss, expected = loss_and_gradients(model, ids, mask, labels)
    reconfigure(model, backend=backend)
    loss, gradients = loss_and_gradients(model, ids, mask, labels)
    assert difference(loss, expected_loss) < 1e-5
    assert_same_gradients(gradients, expected, 1e-4)


OFF = {
    "one-segment-past": {"visibility": "past", "num_segments": 1},
    "no-slots": {"use_global": False, "use_local": False},
    "no-global": {"use_global": False},
    "no-local": {"use_local": False},
    "no-global-past": {"use_global": False, "visibility": "past"},
    "no-local-slots": {"num_local_slots": 0, "use_global": False, "use_local": False},
    "no-global-slots": {"num_global_slots": 0, "use_global": False},
}
UNUSED = {
    "one-segment-past": ("local_constructor", "global_integrator"),
    "no-slots": ("local_constructor", "global_integrator"),
    "no-global": ("global_integrator",),
    "no-local": (),
    "no-global-past": ("global_integrator",),
    "no-local-slots": ("local_constructor", "global_integrator"),
    "no-global-slots": ("global_integrator",),
}


@pytest.mark.parametrize("case", OFF)
def test_every_trainable_parameter_takes_part(case):
    model = strong_model(check=False, **OFF[case]).train()
    _, gradients = loss_and_gradients(model, random_ids(2, 29))
    for name, gradient in gradients.items():
        if 0 in model.get_parameter(name).shape:
            continue
        assert gradient is not None, name
        unused = any(part in name for part in UNUSED[case])
        assert bool(gradient.any()) != unused, name  # an exact zero, or a real gradient


def test_frozen_modules_need_no_anchor():
    model = strong_model(check=False, use_global=False, use_local=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn.q_proj" in name)
    loss_and_gradients(model, random_ids(1, 29))
    assert model.model.layers[0].self_attn.local_constructor.memory_slots.grad is None


@pytest.mark.parametrize("case", ["plain", "padded", "slots-off", "s2", "reference"])
def test_bf16_autocast_is_close(case):
    options = {"use_global": False, "use_local": False} if case == "slots-off" else {}
    model = strong_model("qwen3", visibility="past", check=case != "slots-off", **options)
    if case == "reference":
        reconfigure(model, backend="reference")
    if case == "s2":
        model.set_attn_implementation("hici_s2")
    ids, mask = random_ids(2, 29), None
    if case == "padded":
        ids, mask = padded([ids[0], ids[1, :13]], "left")
    expected_loss, expected = loss_and_gradients(model, ids, mask)
    expected_logits = logits(model, ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = logits(model, ids, mask)
        loss, gradients = loss_and_gradients(model, ids, mask)
    assert out.dtype == torch.bfloat16
    spread = (out.float() - expected_logits).std() / expected_logits.std()
    assert spread < 0.05
    assert abs(loss.item() - expected_loss.item()) < 0.05
    flat, expected_flat = (
        torch.cat([g.flatten() for g in grads.values() if g is not None]) for grads in (gradients, expected)
    )
    assert functional.cosine_similarity(flat, expected_flat, dim=0) > 0.99
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)


@pytest.mark.parametrize(
    "use_cache, dtype", [(False, torch.bfloat16), (True, torch.float32)], ids=["no-cache", "cache"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_reaches_the_backend_in_one_dtype(architecture, use_cache, dtype):
    """RoPE leaves queries and keys in float32 under autocast; the bridge casts. (DynamicCache promotes the values.)"""
    model = strong_model(architecture)
    dtypes = []
    for attention in attention_modules(model):
        original = attention.hici_attend

        def recorded(*tensors, original=original, **options):
            dtypes.extend(tensor.dtype for tensor in tensors)
            return original(*tensors, **options)

        attention.hici_attend = recorded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, random_ids(1, 29), use_cache=use_cache)
    assert dtypes == [dtype] * 10


def test_bf16_model_is_close():
    model = strong_model(visibility="past")
    ids = random_ids(2, 29)
    expected = logits(model, ids)
    out = logits(model.to(torch.bfloat16), ids).float()
    assert (out - expected).std() / expected.std() < 0.05


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2", "gemma3"])
def test_chunked_loss_equals_the_stock_loss(architecture, monkeypatch):
    monkeypatch.setattr("hici.models.loss._CHUNK_ELEMENTS", 97 * 5)  # 5 tokens at a time
    model = strong_model(architecture, visibility="past").train()  # gemma2 caps its logits
    ids = random_ids(2, 29)
    expected_loss, expected = loss_and_gradients(model, ids)
    model.zero_grad(set_to_none=True)
    total, count = next_token_loss(model, ids)
    assert int(count) == 2 * 28
    (total / count).backward()
    assert difference(total / count, expected_loss) < 1e-5
    losses = next_token_losses(model, ids)
    assert losses.shape == (2, 28)
    assert difference(losses.mean(), expected_loss) < 1e-5
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(gradients, expected, 1e-5)


def test_chunked_loss_skips_padding():
    model = strong_model(visibility="past")
    row = random_ids(1, 13)
    ids, mask = padded([random_ids(1, 29)[0], row[0]], "left")
    with torch.no_grad():
        losses = next_token_losses(model, ids, attention_mask=mask)
        alone = next_token_losses(model, row)
    assert not losses[1, :16].any()
    total, count = next_token_loss(model, ids, attention_mask=mask)
    assert difference(losses[1:, 16:], alone) < 1e-5
    assert int(count) == 28 + 12
    assert difference(total, losses.sum()) < 1e-3


def test_token_losses_ignore_and_bias():
    hidden, weight, bias = torch.randn(7, 4), torch.randn(11, 4), torch.randn(11)
    targets = torch.tensor([1, -100, 3, 10, 0, -100, 5])
    expected = functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="none", ignore_index=-100)
    assert relative(token_losses(hidden, weight, targets, bias), expected) < 1e-6


@pytest.mark.parametrize("targets", [[1, -100, 3, 10, 0, -100, 5], [1, 2, 3, 10, 0, 4, 5], [-100] * 7])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_summed_loss_has_the_gradients_of_cross_entropy(targets, bias, cap, monkeypatch):
    monkeypatch.setattr("hici.models.loss._CHUNK_ELEMENTS", 11 * 3)  # 3 tokens at a time
    generator = torch.Generator().manual_seed(0)
    inputs = [3 * torch.randn(shape, generator=generator) for shape in ((7, 4), (11, 4), (11,))[: 2 + bias]]
    inputs = [x.requires_grad_() for x in inputs]
    hidden, weight, *rest = inputs
    targets = torch.tensor(targets)
    right_logits = functional.linear(hidden, weight, *rest)
    if cap is not None:
        right_logits = cap * torch.tanh(right_logits / cap)
    expected = functional.cross_entropy(right_logits, targets, reduction="sum")
    loss = summed_loss(hidden, weight, targets, *rest, cap=cap)
    assert loss.dtype == torch.float32
    assert difference(loss, expected) < 1e-5
    gradients = torch.autograd.grad(2.5 * loss, inputs)
    for gradient, right in zip(gradients, torch.autograd.grad(2.5 * expected, inputs), strict=True):
        assert difference(gradient, right) < 1e-5
    assert any(gradient.any() for gradient in gradients) == bool((targets >= 0).any())


def test_summed_loss_makes_only_the_gradients_that_are_asked_for():
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4)
    loss = summed_loss(hidden, weight, torch.arange(7))
    assert [gradient is None for gradient in loss.grad_fn.gradients] == [False, True, True]
    loss.backward()
    assert hidden.grad.any()
    assert weight.grad is None
    with torch.no_grad():
        assert summed_loss(hidden, weight, torch.arange(7)).grad_fn is None


def test_summed_loss_cannot_be_differentiated_twice():
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4)
    loss = summed_loss(hidden, weight, torch.arange(7))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def test_summed_loss_in_bf16_autocast_sums_the_weights_gradient_in_float32(monkeypatch):
    monkeypatch.setattr("hici.models.loss._CHUNK_ELEMENTS", 64)  # a token at a time: 2,048 terms in the sum
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 32, generator=generator, dtype=torch.bfloat16).requires_grad_()
    weight = (0.1 * torch.randn(64, 32, generator=generator)).requires_grad_()
    targets = torch.randint(0, 64, (2048,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summed_loss(hidden, weight, targets)
    loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    reference = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = functional.cross_entropy(reference[0] @ reference[1].T, targets, reduction="sum")
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-4
    assert relative(hidden.grad, reference[0].grad) < 1e-2
    assert relative(weight.grad, reference[1].grad) < 5e-3  # 9e-2 when summed in bfloat16
