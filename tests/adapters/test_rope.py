"""Context extension through the model's own rope parameters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hici
from helpers import difference, logits, random_ids, tiny_model
from hici.rope import check_context, extended_rope


@pytest.mark.parametrize("method", ["linear", "yarn"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "qwen2"])
def test_extended_in_place_equals_loaded_with_the_parameters(architecture, method, tmp_path):
    model = tiny_model(architecture, max_position_embeddings=32)
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 80)
    stock = logits(model, ids)
    hici.extend_rope(model, 80, method=method)
    # as published: qwen3 divides, the others round up
    assert model.config.rope_parameters["factor"] == (2.5 if architecture == "qwen3" else 3.0)
    assert model.config.max_position_embeddings == 80
    config = AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = extended_rope(config, 80, method)
    config.max_position_embeddings = 80
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert difference(logits(model, ids), logits(loaded, ids)) == 0
    assert difference(logits(model, ids), stock) > 0.01
    model.save_pretrained(tmp_path / "extended")
    assert (
        difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "extended"), ids), logits(loaded, ids)) == 0
    )


def test_linear_divides_positions_by_the_factor():
    model = tiny_model(max_position_embeddings=32)
    before = model.model.rotary_emb.inv_freq.clone()
    hici.extend_rope(model, 64)
    assert torch.allclose(model.model.rotary_emb.inv_freq, before / 2)


def test_nothing_happens_within_the_positions():
    model = tiny_model(max_position_embeddings=32)
    rotary = model.model.rotary_emb
    hici.extend_rope(model, 32)
    assert model.model.rotary_emb is rotary
    assert model.config.max_position_embeddings == 32


def test_refusals():
    model = tiny_model(max_position_embeddings=32)
    with pytest.raises(ValueError, match="33 tokens are more than the 32 positions.*extend_rope"):
        check_context(model.config, 33)
    with pytest.raises(ValueError, match="unknown rope method 'linaer'.*Did you mean 'linear'"):
        hici.extend_rope(model, 64, method="linaer")
    hici.extend_rope(model, 64)
    with pytest.raises(ValueError, match=r"scaled already \(linear, 64 positions\)"):
        hici.extend_rope(model, 128)
