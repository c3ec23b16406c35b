"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # small tensors: one thread is fastest, and sums come in one order
settings.register_profile("hici", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("hici")


@pytest.fixture(autouse=True, scope="session")
def _own_token_cache(tmp_path_factory):
    """Tokens of the tests are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_as_a_library():
    """A test that ran the command has set up its log; the next one sees the library's again."""
    logger = logging.getLogger("hici")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder (published checkpoints, books): $HICI_SHARED, or ../shared beside the repository."""
    root = Path(__file__).resolve().parents[1]
    place = Path(os.environ.get("HICI_SHARED", root.parent / "shared"))
    if not place.is_dir():
        pytest.skip(f"no shared folder at {place}; set HICI_SHARED to the one that holds published/ and books/")
    return place
