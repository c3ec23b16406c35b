"""A model that tests of refusals may change: it is put back behind each."""

import pytest

from helpers import strong_model
from hici import reconfigure


@pytest.fixture(scope="module")
def shared_model():
    return strong_model(visibility="past")


@pytest.fixture
def model(shared_model):
    yield shared_model
    shared_model.set_attn_implementation("hici")
    reconfigure(shared_model, visibility="past", segment_size=8, decode="auto")
    shared_model.requires_grad_(True)
