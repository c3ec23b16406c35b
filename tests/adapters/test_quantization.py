"""A 4- or 8-bit base under a released adapter (bitsandbytes, on the CPU too)."""

import pytest
import torch
from transformers import BitsAndBytesConfig

import hici
from golden_checkpoint import CHECKPOINT, EXPECTED, IDS, NEEDED
from helpers import logits, tiny_model
from hici.models.attach import hici_state_dict

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'hici[quantization]'")

CONFIGS = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


def load(bits, **changes):
    return hici.from_pretrained(CHECKPOINT / "peft_fp32", **{**NEEDED, "dtype": torch.float32, **changes},
                                quantization_config=CONFIGS[bits])  # fmt: skip


@pytest.mark.parametrize("bits, layer", [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
@pytest.mark.parametrize("attention, case", [("hici", "none"), ("full", "full")])
def test_the_base_is_quantised_and_the_rest_whole(bits, layer, attention, case):
    model = load(bits, attention=attention)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj).__name__ == layer
    assert all(tensor.dtype == torch.float32 for tensor in hici_state_dict(model).values())
    expected = EXPECTED[f"peft_fp32/{case}/logits"]
    gap = (logits(model, IDS) - expected).abs().mean() / expected.abs().mean()
    assert gap < (0.06 if bits == "8bit" else 0.7)  # 4 bits of random weights are coarse; other weights would give 1.4
    assert model.config.vocab_size == 98


def test_it_saves_and_trains(tmp_path):
    model = load("4bit", attention="hici")
    hici.save_pretrained(model, tmp_path / "ours")
    assert '"base_fingerprint": "unknown"' in (tmp_path / "ours" / "hici_config.json").read_text()
    again = hici.from_pretrained(tmp_path / "ours", attention="hici", dtype=torch.float32,
                                 quantization_config=CONFIGS["4bit"])  # fmt: skip
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 1e-4


def test_a_library_that_is_not_there(monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", missing)
    with pytest.raises(ValueError, match="requires bitsandbytes.*install what it asks for"):
        load("4bit")
    with pytest.raises(ValueError, match=r"(?s)quantization_config=.* with a loaded base_model"):
        load("4bit", base_model=tiny_model(), dtype=None)
    with pytest.raises(ValueError, match="base_model is a Linear, but it must be a causal LM"):
        hici.from_pretrained(CHECKPOINT / "peft_fp32", torch.nn.Linear(1, 1), 64)
