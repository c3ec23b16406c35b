"""In Python too, a result is taken over only from the same weights, settings and tokenizer."""

import numpy as np
import pytest
import torch

import hici
from helpers import strong_model
from hici.data.stream import Document
from hici.eval.inspection import inspection_plan
from hici.eval.measure import measure
from hici.eval.protocols import make_text, perplexity_plan
from hici.eval.retrieval.run import plan_retrieval
from hici.eval.retrieval.settings import Settings
from hici.models.fingerprint import weights_checksum
from hici.models.modes import set_attention
from prompt_tokenizers import KINDS, prompt_tokenizer

TOKENIZER = prompt_tokenizer(KINDS[0])
STREAM = np.arange(300) % 60


def plan(task, model, attention):
    if task == "perplexity":
        text = make_text([Document(STREAM, True)], "strict", bos_token_id=1, eos_token_id=None)
        return perplexity_plan(model, text, "strict", [64], [attention], about={"path": "mine"}, max_windows=1)
    if task == "retrieval":
        settings = Settings(("passkey",), (300,), (0.5,), samples=1)
        return plan_retrieval(model, TOKENIZER, {"path": "mine"}, settings, [attention])
    set_attention(model, "hici")
    return inspection_plan(model, STREAM, 64, about={"path": "mine"})


@pytest.fixture
def model():
    options = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 512}
    return strong_model(options=options, check=False, visibility="past", segment_size=16)


@pytest.mark.parametrize("task", ["perplexity", "retrieval", "inspect"])
def test_weights_and_settings_that_differ(task, model, tmp_path):
    first = measure(plan(task, model, "hici"), tmp_path / "a.json")
    assert first["model"]["path"] == "mine"
    assert measure(plan(task, model, "hici"), tmp_path / "a.json") == first
    with torch.no_grad():
        weights = model.model.layers[0].mlp.up_proj.weight.view(-1)
        before = weights[1].item()
        weights[1] += 0.01
    with pytest.raises(ValueError, match=r"of another measurement: its model\.weights_checksum is"):
        measure(plan(task, model, "hici"), tmp_path / "a.json")
    with torch.no_grad():
        weights[1] = before
    assert measure(plan(task, model, "hici"), tmp_path / "a.json") == first
    hici.reconfigure(model, segment_size=32)
    with pytest.raises(ValueError, match=r"of another measurement: its model\.hici\.segment_size is 16, now 32"):
        measure(plan(task, model, "hici"), tmp_path / "a.json")


def test_what_attention_full_does_not_use_does_not_count(model, tmp_path):
    first = measure(plan("perplexity", model, "full"), tmp_path / "a.json")
    hici.reconfigure(model, segment_size=32)
    with torch.no_grad():
        next(model.model.layers[0].self_attn.local_constructor.parameters()).add_(1)
    assert measure(plan("perplexity", model, "full"), tmp_path / "a.json") == first
    assert first["model"]["hici"] is None


def test_another_tokenizer_asks_other_prompts(model, tmp_path):
    measure(plan("retrieval", model, "full"), tmp_path / "a.json")
    settings = Settings(("passkey",), (300,), (0.5,), samples=1)
    other = plan_retrieval(model, prompt_tokenizer(KINDS[1]), {"path": "mine"}, settings, ["full"])
    with pytest.raises(ValueError, match=r"its model\.tokenizer_fingerprint is"):
        measure(other, tmp_path / "a.json")


def test_a_model_whose_weights_are_elsewhere_cannot_be_told(model):
    known = weights_checksum(model)
    assert known.startswith("sha256:")
    assert weights_checksum(model.to(torch.bfloat16)) != known
    assert weights_checksum(model.to("meta")) == "unknown"
