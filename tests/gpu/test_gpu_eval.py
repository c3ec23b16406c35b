"""Evaluation on a CUDA device, against the CPU: run with `pytest -m gpu`. Skipped without one."""

import numpy as np
import pytest
import torch

from helpers import VOCAB, strong_model
from hici.data.stream import Document
from hici.eval.inspection import inspection_plan
from hici.eval.measure import measure
from hici.eval.protocols import PROTOCOLS, make_text, perplexity_plan
from hici.machine import measured_peak
from hici.models.modes import set_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def documents():
    generator = np.random.default_rng(3)
    return [Document(generator.integers(3, VOCAB, length), True) for length in (300, 170)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_perplexity_is_that_of_the_cpu(protocol):
    text = make_text(documents(), protocol, bos_token_id=None, eos_token_id=1)
    found = {}
    for device in ("cpu", "cuda"):
        model = strong_model(visibility="past").to(device)
        plan = perplexity_plan(model, text, protocol, [40, 64], ["full", "hici", "hici_s2"], about={})
        found[device] = measure(plan)["conditions"]
    for here, there in zip(found["cpu"], found["cuda"], strict=True):
        assert (here["attention"], here["context"]) == (there["attention"], there["context"])
        assert there["mean_loss"] == pytest.approx(here["mean_loss"], abs=2e-3)
        assert there["peak_memory_bytes"] < here["peak_memory_bytes"]  # the allocator's, not the process's


def test_attention_shares_are_those_of_the_cpu():
    stream = documents()[0].tokens
    found = {}
    for device in ("cpu", "cuda"):
        model = strong_model(visibility="past").to(device)
        set_attention(model, "hici")
        found[device] = measure(inspection_plan(model, stream, 60, windows=2))["conditions"][0]
    for kind in ("global", "local", "tokens"):
        here, there = (np.array(found[device]["shares"][kind]) for device in ("cpu", "cuda"))
        assert np.abs(here - there).max() < 2e-3


def test_peak_memory_is_of_the_block():
    with measured_peak("cuda") as large:
        block = torch.empty(2**26, dtype=torch.uint8, device="cuda")
        del block
    with measured_peak("cuda") as small:
        torch.empty(2**10, dtype=torch.uint8, device="cuda")
    assert large.bytes - small.bytes >= 2**26 - 2**21
