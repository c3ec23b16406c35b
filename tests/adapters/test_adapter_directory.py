"""Our adapter directory: everything comes back, or an error names what is wrong and nothing changes."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hici
from adapter_models import IDS, make_base, make_trained
from helpers import difference, logits, randomise, small_config
from hici.adapters.weights import tensor_shapes
from hici.models.attach import hici_state_dict
from hici.models.lookup import attention_modules
from hici.models.modes import set_attention
from hici.rope import far_rope

NEW = ("llama3", "gpt_neox", "phi3", "gemma2-tied", "gemma3-tied")


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen3", "mistral", "qwen2", *NEW])
def saved(request, tmp_path_factory):
    """(base directory, trained model, adapter directory)."""
    architecture, _, tied = request.param.partition("-")
    root = tmp_path_factory.mktemp(request.param)
    base = make_base(root / "base", architecture, tie=bool(tied))
    model = make_trained(base)
    hici.save_pretrained(model, root / "adapter")
    return base, model, root / "adapter"


def test_directory_has_exactly_its_files(saved):
    assert {path.name for path in saved[2].iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "hici_model.safetensors", "hici_config.json", "README.md",
    }  # fmt: skip
    assert not list(saved[2].parent.glob(".adapter*"))


@pytest.mark.parametrize("attention", ["hici", "full"])
def test_loaded_model_equals_the_saved_one(saved, attention):
    _, model, directory = saved
    loaded = hici.from_pretrained(directory, attention=attention)
    set_attention(model, attention)
    assert difference(logits(loaded, IDS), logits(model, IDS)) == 0
    assert loaded.config.max_position_embeddings == 64
    scaled_before = loaded.config.rope_parameters.get("rope_type") == "llama3"  # by 2
    assert far_rope(loaded.config.rope_parameters)["factor"] == (4.0 if scaled_before else 2.0)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_plain_peft_loads_its_part_as_the_full_attention_model(saved):
    base, model, directory = saved
    plain = AutoModelForCausalLM.from_pretrained(base)
    hici.extend_rope(plain, 64)
    loaded = peft.PeftModel.from_pretrained(plain, directory)
    set_attention(model, "full")
    assert difference(logits(loaded, IDS), logits(model, IDS)) == 0
    assert not any("local_constructor" in name for name in load_file(directory / "adapter_model.safetensors"))


def test_hici_file_holds_the_published_names(saved):
    _, model, directory = saved
    shapes = tensor_shapes(directory / "hici_model.safetensors")
    assert shapes == {name: list(tensor.shape) for name, tensor in hici_state_dict(model).items()}
    layer = "gpt_neox.layers.1.attention" if model.config.model_type == "gpt_neox" else "model.layers.1.self_attn"
    assert shapes[f"{layer}.global_integrator.expand_scale_param"] == []
    assert len(shapes) == 36


def test_a_new_process_gives_the_same_logits(llama, tmp_path):
    _, model, directory = llama
    torch.save(logits(model, IDS), tmp_path / "expected.pt")
    code = (
        "import torch, hici; torch.set_num_threads(1)\n"
        f"model = hici.from_pretrained({str(directory)!r}, attention='hici')\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        "with torch.no_grad(): got = model(ids).logits\n"
        "print('difference', (got - expected).abs().max().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "difference 0.0" in done.stdout


def is_tied(model):
    lm = model.get_base_model() if hasattr(model, "peft_config") else model
    return lm.get_input_embeddings().weight.data_ptr() == lm.get_output_embeddings().weight.data_ptr()


def test_tied_embeddings_stay_tied_through_training_save_load_and_merge(tmp_path):
    base = make_base(tmp_path / "base", tie=True)
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.clone()
    model = make_trained(base)
    assert is_tied(model)
    assert difference(model.get_base_model().get_input_embeddings().weight, before) > 1e-4  # it did train
    hici.save_pretrained(model, tmp_path / "adapter")
    loaded = hici.from_pretrained(tmp_path / "adapter", attention="hici")
    assert is_tied(loaded)
    merged = loaded.merge_and_unload()
    assert is_tied(merged)
    assert difference(logits(merged, IDS), logits(model, IDS)) < 1e-4
    merged.set_attn_implementation("sdpa")
    model.set_attn_implementation("sdpa")
    assert difference(logits(merged, IDS), logits(model, IDS)) < 1e-4


def test_lora_is_on_the_attention_only_and_everything_else_that_trains_is_named(llama):
    _, model, _ = llama
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    lora = {name for name in trainable if "lora_" in name}
    assert len(lora) == 2 * 4 * 2
    assert all(name.split(".self_attn.")[1].split("_proj")[0] in "qkvo" for name in lora)
    rest = trainable - lora
    assert sum("local_constructor" in n or "global_integrator" in n for n in rest) == 36
    saved = {n for n in rest if "modules_to_save" in n}
    assert len(saved) == 1 + 2 * 2 + 1  # embeddings, two norms a layer, the last norm
    assert len(rest) == 36 + len(saved)


def test_without_embeddings_and_norms(tmp_path):
    base = make_base(tmp_path / "base")
    model = make_trained(base, embeddings=False, norms=False, r=4, alpha=4)
    hici.save_pretrained(model, tmp_path / "adapter")
    loaded = hici.from_pretrained(tmp_path / "adapter", attention="hici")
    assert difference(logits(loaded, IDS), logits(model, IDS)) == 0
    assert not any("modules_to_save" in name for name, _ in loaded.named_parameters())


def test_without_lora_only_the_modules_are_saved(tmp_path):
    base = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    hici.attach(model, small_config())
    hici.save_pretrained(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    loaded = hici.from_pretrained(tmp_path / "adapter", attention="hici")
    assert difference(logits(loaded, IDS[:, :32]), logits(model, IDS[:, :32])) == 0


def test_lora_inside_the_modules_survives_too(tmp_path):
    base = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    hici.attach(model, small_config())
    for attention in attention_modules(model):
        randomise(attention.local_constructor)
        randomise(attention.global_integrator)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    hici.save_pretrained(wrapped, tmp_path / "adapter")
    loaded = hici.from_pretrained(tmp_path / "adapter", attention="hici")
    assert difference(logits(loaded, IDS[:, :32]), logits(wrapped.eval(), IDS[:, :32])) == 0


def test_dtype_and_a_loaded_base(llama):
    base, _, directory = llama
    assert hici.from_pretrained(directory, dtype=torch.bfloat16).get_base_model().dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(base)
    loaded = hici.from_pretrained(directory, base_model=plain)
    assert loaded.get_base_model() is plain


@pytest.mark.parametrize("version", [1, 2])
def test_a_directory_of_an_older_format_is_read(llama, version):
    _, model, directory = llama
    file = directory / "hici_config.json"
    values = json.loads(file.read_text())
    del values["hici"]["decode"]
    if version == 1:
        for key in ("vocab_size", "layout", "modules_to_save", "training"):
            del values[key]
    file.write_text(json.dumps({**values, "format_version": version}))
    loaded = hici.from_pretrained(directory, attention="hici")
    assert difference(logits(loaded, IDS), logits(model, IDS)) == 0
    file.write_text(json.dumps(values))  # format 3 without them is not whole
    with pytest.raises(ValueError, match="lacks (vocab_size, layout, modules_to_save, training|decode)"):
        hici.from_pretrained(directory)
