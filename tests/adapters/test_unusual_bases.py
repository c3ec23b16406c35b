"""Tied heads trained apart, other bases than the recorded one, resized vocabularies: the right model, or an error."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hici
from adapter_models import make_base, make_trained
from golden_checkpoint import EXPECTED, IDS, TOLERANCE
from helpers import difference, logits, random_ids, randomise, small_config
from hici.adapters.contents import read_contents
from hici.adapters.load import install
from hici.adapters.plan import make_plan
from hici.models.lookup import attention_modules, is_attached

TEXT = random_ids(2, 30)


def on_tied_base(root, **lora):
    """An adapter by plain PEFT on a llama whose head is tied, with every trained weight far from its first value."""
    base = make_base(root / "base", tie=True)
    model = hici.attach(AutoModelForCausalLM.from_pretrained(base), small_config(visibility="past"))
    for attention in attention_modules(model):
        randomise(attention.local_constructor, seed=3)
        randomise(attention.global_integrator, seed=4)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **lora))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    hici.save_pretrained(wrapped.eval(), root / "adapter")
    return wrapped


APART = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "head": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    "head and embeddings": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings alone": {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:.*tie.*")
@pytest.mark.parametrize("lora", APART.values(), ids=APART.keys())
@pytest.mark.parametrize("kind", ["plain", "hici"])
def test_a_tied_head_that_was_trained_apart(tmp_path, lora, kind):
    model = on_tied_base(tmp_path, **lora)
    mode = "sdpa" if kind == "plain" else "hici"
    model.set_attn_implementation(mode)
    expected = logits(model, TEXT)
    loaded = hici.from_pretrained(tmp_path / "adapter", attention="full" if kind == "plain" else "hici")
    assert difference(logits(loaded, TEXT), expected) == 0
    hici.merge(tmp_path / "adapter", tmp_path / kind, kind)
    assert json.loads((tmp_path / kind / "config.json").read_text())["tie_word_embeddings"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / kind, trust_remote_code=True)
    assert difference(logits(merged, TEXT), expected) < 1e-4
    with pytest.raises(ValueError, match="lm_head is tied to the embeddings in the base and was trained apart"):
        hici.convert(tmp_path / "adapter", tmp_path / "released", "released")
    assert not (tmp_path / "released").exists()


def test_tied_embeddings_that_peft_would_untie(tmp_path):
    base = make_base(tmp_path / "base", "gpt_neox", tie=True)
    model = hici.attach(AutoModelForCausalLM.from_pretrained(base), small_config())
    with pytest.raises(
        ValueError, match="tied to embed_in, which PEFT would train apart from it; give embeddings=False"
    ):
        hici.add_lora(model)
    hici.save_pretrained(hici.add_lora(model, embeddings=False), tmp_path / "adapter")
    hici.merge(tmp_path / "adapter", tmp_path / "m")


def test_merge_and_convert_check_the_base_by_its_weights(trained, tmp_path):
    other = make_base(tmp_path / "other", seed=9)
    with pytest.raises(ValueError, match="fingerprint.*give the base that it was made on"):
        hici.merge(trained[1], tmp_path / "m", base_model=other)
    with pytest.raises(ValueError, match="fingerprint.*give the base that it was made on"):
        hici.convert(trained[1], tmp_path / "c", "released", base_model=other)
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "c").exists()


def test_a_moved_base_is_recorded_by_its_new_place(trained, tmp_path):
    moved = shutil.move(tmp_path / "base", tmp_path / "moved")
    hici.convert(trained[1], tmp_path / "c", "released", base_model=moved)
    hici.from_pretrained(tmp_path / "c")
    for directory in (tmp_path / "c",):
        record = json.loads((directory / "hici_config.json").read_text())
        lora = json.loads((directory / "adapter_config.json").read_text())
        assert record["base_model"] == lora["base_model_name_or_path"] == str(tmp_path / "moved")


def test_rows_that_a_damaged_base_lacks_are_not_made_up(released, tmp_path):
    file = released.base / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:50]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[50, 64\] instead of \[98, 64\]"):
        hici.merge(released.adapter, tmp_path / "m", **released.needed())


def test_tied_tensors_that_differ_in_the_files(tmp_path):
    make_base(tmp_path / "base", tie=True)
    hici.save_pretrained(make_trained(tmp_path / "base"), tmp_path / "adapter")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
    )
    hici.merge(tmp_path / "adapter", tmp_path / "twice")  # the same tensor twice is fine
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="ties lm_head.weight to model.embed_tokens.weight, but the files hold two diff"
    ):
        hici.merge(tmp_path / "adapter", tmp_path / "m")


def test_a_vocabulary_that_was_resized_by_hand(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base"))
    model.resize_token_embeddings(99, mean_resizing=False)
    hici.attach(model, small_config())
    with pytest.raises(ValueError, match="have 99 rows, but the base .* has 97.*grow_vocabulary"):
        hici.save_pretrained(hici.add_lora(model), tmp_path / "adapter")


@pytest.mark.parametrize("tie", [False, True])
def test_a_vocabulary_that_was_grown(tmp_path, tie):
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base", tie=tie))
    hici.grow_vocabulary(model, 99)
    assert model.get_output_embeddings().out_features == 99
    hici.attach(model, small_config())
    wrapped = hici.add_lora(model).eval()
    hici.save_pretrained(wrapped, tmp_path / "adapter")
    ids = torch.full((1, 20), 98)
    expected = logits(wrapped, ids)
    assert expected.shape[-1] == 99
    assert difference(logits(hici.from_pretrained(tmp_path / "adapter", attention="hici"), ids), expected) == 0
    hici.merge(tmp_path / "adapter", tmp_path / "m", "hici")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert difference(logits(merged, ids), expected) < 1e-5
    for later in (model, wrapped):
        with pytest.raises(ValueError, match="the vocabulary grows first, then comes hici.attach"):
            hici.grow_vocabulary(later, 120)
    with pytest.raises(ValueError, match="a vocabulary of 50 entries for a model with 97: entries would be lost"):
        hici.grow_vocabulary(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), 50)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox", "gemma3", "qwen3"])
def test_an_interrupt_leaves_a_base_as_it_was(tmp_path, architecture, monkeypatch):
    make_base(tmp_path / "base", architecture)
    hici.save_pretrained(make_trained(tmp_path / "base"), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected, config, names = logits(base, TEXT), base.config.to_dict(), set(vars(base))
    modules = [(name, id(module)) for name, module in base.named_modules()]
    trains = [parameter.requires_grad for parameter in base.parameters()]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hici.adapters.load._load_peft", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hici.from_pretrained(tmp_path / "adapter", base_model=base)
    assert not is_attached(base)
    assert base.config.to_dict() == config
    assert [(name, id(module)) for name, module in base.named_modules()] == modules
    assert [parameter.requires_grad for parameter in base.parameters()] == trains
    assert set(vars(base)) == names
    assert difference(logits(base, TEXT), expected) == 0


def test_an_interrupt_leaves_attached_modules_as_they_were(released, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(released.base)
    hici.attach(base, hici.HiCIConfig(num_heads=4, bottleneck_dim=32, compress_dim=16))
    expected = logits(base, IDS[:, :16] % 97)
    plan = make_plan(read_contents(released.adapter), base.config, context_length=64, config={"num_heads": 4})
    with monkeypatch.context() as patch:
        patch.setattr("hici.adapters.load._load_peft", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            install(base, plan)
    assert difference(logits(base, IDS[:, :16] % 97), expected) == 0
    assert base.config.vocab_size == 97
    hici.save_pretrained(base, released.adapter.parent / "as before")
    assert difference(logits(install(base, plan).eval(), IDS), EXPECTED["peft_fp32/none/logits"]) < TOLERANCE


# targets


def test_sources_are_never_what_is_replaced(trained, tmp_path):
    out = hici.merge(trained[1], tmp_path / "out")
    inside = shutil.copytree(trained[1], out / "adapter")
    for act in (lambda: hici.merge(inside, out, overwrite=True),
                lambda: hici.merge(inside, inside, overwrite=True)):  # fmt: skip
        with pytest.raises(ValueError, match=r"is or holds .*, which is read|holds no hici_merge.json"):
            act()
    (out / "hici_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is or holds .*, which is read; give a directory outside of it"):
        hici.convert(inside, out, "released", overwrite=True)
    assert len(list(inside.iterdir())) == len(list(trained[1].iterdir()))


def test_a_link_to_a_directory_stays_a_link(trained, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    hici.merge(trained[1], link)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
