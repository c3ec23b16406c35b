"""The loss without full logits knows which heads it may replace; "full" is always a stock attention."""

import peft
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import hici
from helpers import difference, logits, random_ids, small_config, tiny_model
from hici.models.attach import attach, detach
from hici.models.lookup import get_decoder
from hici.models.loss import next_token_losses
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
