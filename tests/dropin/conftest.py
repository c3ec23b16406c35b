"""Fixtures: the two modules as imported, and golden shapes registered on the golden base."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import llama_attn_hici
import qwen3_attn_hici
from helpers import GOLDEN

CHECKPOINT = GOLDEN / "checkpoint"
SHAPES = {"num_heads": 4, "bottleneck_dim": 32, "shared_compress_dim": 16}


@pytest.fixture(autouse=True)
def _constants_as_imported():
    before = [(module, dict(vars(module))) for module in (llama_attn_hici, qwen3_attn_hici)]
    yield
    for module, values in before:
        vars(module).update(values)


@pytest.fixture
def checkpoint():
    return CHECKPOINT


@pytest.fixture
def registered():
    """A function: the golden base, registered with the golden shapes (or others)."""

    def make(**options):
        base = AutoModelForCausalLM.from_pretrained(CHECKPOINT / "base", dtype=torch.float32)
        return llama_attn_hici.register_hici_to_model(base, **{**SHAPES, **options})

    return make


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A copy of the golden released directory, to be damaged."""
    shutil.copytree(checkpoint / "peft_fp32", tmp_path / "adapter")
    return tmp_path / "adapter"
