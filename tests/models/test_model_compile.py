"""torch.compile with fullgraph=True: one graph, equal logits and gradients."""

import pytest
import torch

from helpers import assert_same_gradients, difference, logits, loss_and_gradients, padded, random_ids, strong_model


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _inputs(masked):
    ids = random_ids(2, 29)
    return padded([ids[0], ids[1, :13]], "left") if masked else (ids, None)


@pytest.mark.parametrize(
    "architecture, way, masked",
    [
        ("llama", "all", False),
        ("llama", "past", True),
        ("qwen3", "past", False),
        ("qwen3", "current", True),
        ("llama", "s2", True),
        ("gpt_neox", "past", True),
        ("phi3", "past", True),
        ("gemma2", "past", True),
        ("gemma3", "past", True),
    ],
)
def test_fullgraph(architecture, way, masked):
    model = strong_model(architecture, visibility="all" if way == "s2" else way)
    if way == "s2":
        model.set_attn_implementation("hici_s2")
    ids, mask = _inputs(masked)
    expected = logits(model, ids, mask)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(logits(compiled, ids, mask), expected) < 1e-5


@pytest.mark.parametrize("masked", [False, True], ids=["unpadded", "mask"])
def test_fullgraph_gradients(masked):
    model = strong_model(visibility="past").train()
    ids, mask = _inputs(masked)
    expected_loss, expected = loss_and_gradients(model, ids, mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    loss = compiled(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert difference(loss, expected_loss) < 1e-5
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(gradients, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["unpadded", "mask"])
def test_inductor(masked):
    model = strong_model(visibility="past")
    ids, mask = _inputs(masked)
    compiled = torch.compile(model, fullgraph=True)
    assert difference(logits(compiled, ids, mask), logits(model, ids, mask)) < 1e-4
