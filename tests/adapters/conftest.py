"""A golden adapter that a test may damage."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest

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
