"""Adapters that a test may damage: a golden one, and one of ours."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest

import hici
from adapter_models import make_base, make_trained
from golden_checkpoint import CHECKPOINT, NEEDED


class Released(NamedTuple):
    """A writable copy of a golden adapter and its base."""

    adapter: object
    base: object

    def needed(self, **changes):
        return {**NEEDED, "base_model": str(self.base), **changes}


@pytest.fixture
def released(tmp_path):
    for name in ("peft_fp32", "base"):
        shutil.copytree(CHECKPOINT / name, tmp_path / name)
    return Released(tmp_path / "peft_fp32", tmp_path / "base")


@pytest.fixture
def llama(tmp_path):
    """(base directory, trained model, adapter directory)."""
    base = make_base(tmp_path / "base")
    model = make_trained(base)
    hici.save_pretrained(model, tmp_path / "adapter")
    return base, model, tmp_path / "adapter"


@pytest.fixture
def trained(tmp_path):
    """(trained model, adapter directory)."""
    model = make_trained(make_base(tmp_path / "base"))
    hici.save_pretrained(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"
