"""The loss without full logits knows which heads it may replace; "full" is always a stock attention."""

import peft
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

import hici
from helpers import difference, logits, random_ids, small_config, tiny_model
from hici.models import loss
from hici.models.attach import attach, detach
from hici.models.lookup import get_decoder
from hici.models.loss import IGNORE, next_token_losses, target_losses, token_scores
from hici.models.modes import attention_mode, set_attention

IDS = random_ids(1, 30)


def test_a_head_that_does_more_than_a_product_is_refused():
    config = GraniteConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                           num_attention_heads=4, logits_scaling=3.0)  # fmt: skip
    with pytest.raises(ValueError, match="unknown model type 'granite'"):
        next_token_losses(GraniteForCausalLM(config), IDS)
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output layer is a .*needs a plain Linear"):
        next_token_losses(wrapped, IDS)


def capped_model():
    """Gemma 2, whose logits are capped, here far below what they reach."""
    config = Gemma2Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
                          num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5)  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


@pytest.mark.parametrize("make", [tiny_model, capped_model])
@pytest.mark.parametrize("rows", [1, 7, 2**20])
def test_losses_of_targets_and_scores_are_those_of_whole_logits(monkeypatch, make, rows):
    """In pieces of some rows; targets that are left out, and targets that are no successors."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", rows * 97)
    model, targets = make(), random_ids(2, 30, seed=5)
    ids = random_ids(2, 30)
    with torch.no_grad():
        scores = model(ids).logits.double().log_softmax(-1)
        hidden = get_decoder(model)(ids).last_hidden_state
    expected = -scores.gather(2, targets[..., None])[..., 0]
    left_out = torch.rand(targets.shape) < 0.4
    found = target_losses(model, ids, targets.masked_fill(left_out, IGNORE))
    torch.testing.assert_close(found.double(), expected.masked_fill(left_out, 0), atol=1e-5, rtol=0)
    assert target_losses(model, ids, torch.full_like(ids, IGNORE)).tolist() == torch.zeros(2, 30).tolist()
    likeliest = scores.argmax(-1)
    mixed = torch.where(left_out, likeliest, targets)
    values, hits = token_scores(model, hidden.flatten(0, 1), mixed.flatten())
    torch.testing.assert_close(values.double(), scores.gather(2, mixed[..., None]).flatten(), atol=1e-5, rtol=0)
    assert hits.tolist() == (mixed == likeliest).flatten().tolist()
    assert 0 < sum(hits.tolist()) < 60


def test_a_model_loaded_in_hici_mode_still_has_a_full_mode():
    stock = logits(tiny_model(), IDS)
    model = tiny_model(attn_implementation="hici")
    attach(model, small_config())
    set_attention(model, "full")
    assert attention_mode(model) == "full"
    assert difference(logits(model, IDS), stock) == 0
    detach(model)
    assert model.config._attn_implementation == "sdpa"


def test_the_model_inside_peft_is_known_too():
    model = attach(tiny_model(), small_config())
    hici.add_lora(model)
    assert get_decoder(model) is model.model  # PEFT leaves a peft_config on the inner model
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) or unload\(\) first"):
        detach(model)


def test_partly_offloaded_models_are_refused():
    model = tiny_model()
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="1 of 2 layers are offloaded.*device_map"):
        attach(model, small_config())


def test_a_prompt_in_pieces_is_warned_about_once(caplog):
    model = attach(tiny_model(), small_config())
    cache = model(IDS, use_cache=True).past_key_values
    with caplog.at_level("INFO", logger="hici"), torch.no_grad():
        model(IDS, past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
    records = [r for r in caplog.records if "raw keys" in r.getMessage()]
    assert [r.levelname for r in records] == ["WARNING"]


def test_the_config_holds_the_mode_that_was_set():
    model = attach(tiny_model(), small_config())
    assert model.config.hici["attention"] == "hici"
    for mode in ("full", "hici_s2", "hici"):
        set_attention(model, mode)
        assert model.config.hici["attention"] == mode


def test_every_trainable_parameter_takes_part_in_shifted_sparse_attention_too():
    model = attach(tiny_model(), small_config()).train()
    set_attention(model, "hici_s2")
    model(IDS, labels=IDS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
