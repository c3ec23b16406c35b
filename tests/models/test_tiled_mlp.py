"""MLPs in tiles: the numbers of the whole MLP, one tile's activations at a time, and everything a model goes through.

DDP and FSDP2 are in test_model_distributed.py.
"""

import collections
import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import (
    ARCHITECTURES,
    assert_same_gradients,
    difference,
    logits,
    loss_and_gradients,
    padded,
    random_ids,
    randomise,
    relative,
    strong_model,
    tiny_model,
)
from hici import add_lora
from hici.models.lookup import get_decoder
from hici.models.tiled_mlp import TiledForward, tile_mlp, untile_mlp

TILE = 5  # of 58 tokens: the last tile is short
IDS = random_ids(2, 29)
CHECKPOINTING = {"none": None, "not-reentrant": False, "reentrant": True}


def checkpoint(model, reentrant):
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()


def first_linear(model):
    return next(m for m in get_decoder(model).layers[0].mlp.modules() if isinstance(m, nn.Linear))


def rows_computed(model, run):
    """How many tokens went through the first layer's MLP, and in what pieces."""
    pieces = collections.Counter()
    handle = first_linear(model).register_forward_hook(lambda module, args, out: pieces.update([args[0].shape[1]]))
    run()
    handle.remove()
    return pieces


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_whole_mlp(architecture, checkpointing):
    model = strong_model(architecture, visibility="past").train()
    checkpoint(model, CHECKPOINTING[checkpointing])
    expected_loss, expected = loss_and_gradients(model, IDS)
    tile_mlp(model, TILE)
    results = []
    pieces = rows_computed(model, lambda: results.append(loss_and_gradients(model, IDS)))
    loss, gradients = results[0]
    assert difference(loss, expected_loss) < 2e-6
    assert_same_gradients(gradients, expected, 5e-6)
    # twice: forward, and backward. Once more where a norm behind the MLP keeps its output, or every layer runs again
    # before its backward pass
    times = 3 if checkpointing == "reentrant" or (checkpointing != "none" and "gemma" in architecture) else 2
    assert pieces == {TILE: 11 * times, 3: times}


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_frozen_base_and_lora_inside_of_the_mlp(architecture):
    model = tiny_model(architecture)
    inner = "up_proj" if architecture == "llama" else "dense_h_to_4h"
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=[inner], lora_dropout=0.3)).train()
    randomise(wrapped)
    checkpoint(model, False)
    torch.manual_seed(1)
    tile_mlp(wrapped, TILE)
    _, gradients = loss_and_gradients(wrapped, IDS)
    assert len(gradients) == 4
    assert all("lora_" in name and gradient.abs().max() > 1e-3 for name, gradient in gradients.items())
    # the backward pass draws the dropout of the forward pass again: the gradient is that of the loss
    name = next(name for name in gradients if "lora_B" in name)
    parameter, step = wrapped.get_parameter(name), 1e-2
    direction = gradients[name] / gradients[name].norm()
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * direction
        torch.manual_seed(1)
        moved.append(wrapped(IDS, labels=IDS).loss.item())
        with torch.no_grad():
            parameter -= sign * step * direction
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(gradients[name].norm().item(), rel=0.02)


def test_random_numbers_go_on_as_they_would():
    """The backward pass puts the generator back: what is drawn after it is what the forward pass left."""
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["up_proj"], lora_dropout=0.3)).train()
    tile_mlp(wrapped, TILE)
    loss = wrapped(IDS, labels=IDS).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("below", [True, False], ids=["tiled-then-peft", "peft-then-tiled"])
def test_with_add_lora_and_autocast(below):
    model = strong_model(visibility="past").to(torch.bfloat16)
    if below:
        tile_mlp(model, TILE)
    wrapped = add_lora(model).train()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    tile_mlp(wrapped, TILE)
    checkpoint(model, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(wrapped, IDS)
    untile_mlp(wrapped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_loss, expected = loss_and_gradients(wrapped, IDS)
    assert difference(loss, expected_loss) < 1e-3
    gates = [name for name in gradients if name.endswith("expand_scale_param")]  # sums that cancel: bfloat16 shows
    for name in gates:
        assert relative(gradients.pop(name), expected.pop(name)) < 0.3
    assert_same_gradients(gradients, expected, 0.02)
    assert any("lora_" in name for name in gradients)
    assert not any(".mlp." in name for name in gradients)


def test_the_backward_pass_computes_under_the_autocast_of_the_forward_pass():
    model = tiny_model().train()
    tile_mlp(model, TILE)
    seen = []
    get_decoder(model).layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert len(seen) == 24
    assert set(seen) == {torch.bfloat16}


def test_sums_of_16_bit_gradients_are_kept_in_float32():
    torch.manual_seed(0)
    model = tiny_model().train()
    ids = random_ids(4, 100)
    _, expected = loss_and_gradients(model, ids)
    lower = copy.deepcopy(model).to(torch.bfloat16)
    errors = []
    for tiled in (False, True):
        if tiled:
            tile_mlp(lower, 2)  # 200 tiles
        _, gradients = loss_and_gradients(lower, ids)
        name = "model.layers.1.mlp.down_proj.weight"
        assert gradients[name].dtype == torch.bfloat16
        errors.append((gradients[name].float() - expected[name]).norm() / expected[name].norm())
    assert errors[1] < 1.2 * errors[0]


class _Counted:
    """Counts the bytes of the wide tensors that autograd holds: now, and at most."""

    def __init__(self, width):
        self.width, self.now, self.most = width, 0, 0

    def pack(self, tensor):
        return _Held(self, tensor)

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)


class _Held:
    def __init__(self, count, tensor):
        self.count, self.tensor = count, tensor
        self.size = tensor.nbytes if tensor.dim() == 3 and tensor.shape[-1] == count.width else 0
        count.now += self.size
        count.most = max(count.most, count.now)

    def __del__(self):
        self.count.now -= self.size


@pytest.mark.parametrize("checkpointed", [True, False])
def test_only_one_tile_is_held_at_a_time(checkpointed):
    model = tiny_model(max_position_embeddings=512).train()
    if checkpointed:
        checkpoint(model, False)

    def most(tokens):
        count = _Counted(96)
        with count.hooks():
            model(random_ids(1, tokens), labels=random_ids(1, tokens)).loss.backward()
        assert count.now == 0
        return count.most

    if not checkpointed:  # (a checkpoint's own hooks would stand before these)
        assert most(256) == 2 * most(128) > 2 * 256 * 96 * 4
    tile_mlp(model, 16)
    assert most(256) == most(128) == most(64)
    # what the whole MLP of one layer holds for 16 tokens
    assert 3 * 16 * 96 * 4 <= most(256) <= 5 * 16 * 96 * 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_gradients(architecture):
    model = strong_model(architecture, visibility="past")
    ids, mask = padded([IDS[0], IDS[1, :13]], "left")
    expected = logits(model, ids, mask)
    tile_mlp(model, TILE)
    pieces = rows_computed(model, lambda: logits(model, ids, mask))
    assert pieces == {TILE: 11, 3: 1}
    assert difference(logits(model, ids, mask), expected) < 2e-5
    assert difference(logits(model.requires_grad_(False), ids, mask), expected) < 2e-5
    assert rows_computed(model, lambda: model(ids)) == {TILE: 11, 3: 1}  # gradients on, but nothing trains


def test_a_call_of_no_more_than_a_tile_is_the_stock_call():
    model = tiny_model().train()
    expected_loss, expected = loss_and_gradients(model, IDS)
    tile_mlp(model, IDS.numel())
    results = []
    pieces = rows_computed(model, lambda: results.append(loss_and_gradients(model, IDS)))
    assert pieces == {29: 1}
    assert torch.equal(results[0][0], expected_loss)
    assert_same_gradients(results[0][1], expected, 0)


def test_a_frozen_mlp_passes_the_gradient_on():
    """And an MLP that trains behind frozen layers gets its own, though its input has none."""
    model = tiny_model().train().requires_grad_(False)
    decoder = get_decoder(model)
    for trained in (decoder.layers[1].mlp.down_proj.weight, decoder.layers[0].input_layernorm.weight):
        trained.requires_grad_(True)
        untile_mlp(model)
        _, expected = loss_and_gradients(model, IDS)
        tile_mlp(model, TILE)
        _, gradients = loss_and_gradients(model, IDS)
        assert_same_gradients(gradients, expected, 5e-6)
        trained.requires_grad_(False)


def test_backward_twice():
    model = tiny_model().train()
    tile_mlp(model, TILE)
    loss = model(IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    assert_same_gradients(
        {name: p.grad for name, p in model.named_parameters()}, {n: 2 * g for n, g in once.items()}, 0
    )
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_copies_files_and_the_way_back(tmp_path):
    model = strong_model(visibility="past")
    expected, names = logits(model, IDS), list(model.state_dict())
    tile_mlp(model, TILE)
    assert list(model.state_dict()) == names
    tiled = logits(model, IDS)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "saved")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    randomise(model, seed=5)  # the copies share nothing
    for other in (twin, loaded):
        assert torch.equal(logits(other, IDS), tiled)
        assert set(rows_computed(other, lambda other=other: logits(other, IDS))) == {TILE, 3}
        tile_mlp(other, 7)
        assert set(rows_computed(other, lambda other=other: logits(other, IDS))) == {7, 2}
        untile_mlp(other)
        assert not any("forward" in vars(module) for module in other.modules())
        assert torch.equal(logits(other, IDS), expected)
        untile_mlp(other)  # nothing to undo
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not any("forward" in vars(module) for module in stock.modules())


def test_a_forward_that_was_there_is_called_and_comes_back():
    """accelerate's hooks are such."""
    model = tiny_model()
    mlp = get_decoder(model).layers[0].mlp
    before, calls = mlp.forward, []

    def own(hidden):
        calls.append(hidden.shape[1])
        return before(hidden)

    mlp.forward = own
    tile_mlp(model, TILE)
    logits(model, IDS)
    assert calls == [TILE] * 11 + [3]
    untile_mlp(model)
    assert mlp.forward is own


def test_hooks_on_the_mlp_run_once_a_call():
    model = tiny_model().train()
    tile_mlp(model, TILE)
    calls = []
    get_decoder(model).layers[0].mlp.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    loss_and_gradients(model, IDS)
    assert calls == [(2, 29, 64)]


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True, "8", None])
def test_refusals(tokens):
    model = tiny_model()
    message = f"mlp_tile={tokens!r} is no integer >= 1; give the tokens that an MLP computes at a time"
    with pytest.raises(ValueError, match=re.escape(message)):
        tile_mlp(model, tokens)
    assert not any(isinstance(vars(module).get("forward"), TiledForward) for module in model.modules())


def test_an_unknown_model_type():
    model = tiny_model()
    model.config.model_type = "lama"
    with pytest.raises(ValueError, match="model type 'lama'"):
        tile_mlp(model, TILE)
