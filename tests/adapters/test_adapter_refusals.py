"""Our adapter directory: each refusal says what is wrong, and leaves the disk and a given base as they were."""

import json
import os
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hici
from adapter_models import IDS, make_base
from helpers import difference, logits, small_config, tiny_model
from hici.adapters.lora import trainable_parameters
from hici.models.attach import hici_state_dict
from hici.models.lookup import attention_modules, is_attached


def refuse(directory, match, base=None):
    with pytest.raises(ValueError, match=match):
        hici.from_pretrained(directory, base_model=base)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "hici_model.safetensors", "hici_config.json"]
)
def test_a_missing_file_is_named(llama, name):
    (llama[2] / name).unlink()
    refuse(llama[2], name)


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("file", ["hici_model.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "left over", "shape", "NaN"])
def test_a_wrong_tensor_is_named_and_the_base_untouched(llama, file, fault):
    base, _, directory = llama
    name = sorted(load_file(directory / file))[0]

    def change(tensors):
        if fault == "missing":
            del tensors[name]
        elif fault == "left over":
            tensors["some.other.tensor"] = torch.zeros(3)
        elif fault == "shape":
            tensors[name] = torch.zeros(*tensors[name].shape, 2)
        else:
            tensors[name].view(-1)[0] = float("nan")

    edit(directory / file, change)
    plain = AutoModelForCausalLM.from_pretrained(base)
    next(plain.parameters()).requires_grad_(False)
    trains = [parameter.requires_grad for parameter in plain.parameters()]
    expected, rope = logits(plain, IDS[:, :32]), dict(plain.config.rope_parameters)
    named = "some.other.tensor" if fault == "left over" else name.removeprefix("base_model.model.")
    refuse(directory, rf"{fault}.*{named}" if fault != "NaN" else rf"NaN.*{named}", plain)
    assert not is_attached(plain)
    assert plain.config.rope_parameters == rope
    assert plain.config.max_position_embeddings == 32
    assert [parameter.requires_grad for parameter in plain.parameters()] == trains
    assert difference(logits(plain, IDS[:, :32]), expected) == 0


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("adapter_config.json", lambda v: {**without(v, "lora_alpha"), "lora_alhpa": 16}, "'lora_alhpa'.*'lora_alpha'"),
        ("adapter_config.json", lambda v: without(v, "lora_alpha"), "lacks lora_alpha"),
        ("adapter_config.json", lambda v: without(v, "r"), "lacks r;"),
        ("hici_config.json", lambda v: {**v, "hici": without(v["hici"], "visibility")}, "hici lacks visibility"),
        ("hici_config.json", lambda v: {**v, "rope_parameters": {}}, "rope_parameters lacks rope_type, rope_theta"),
        ("hici_config.json", lambda v: {**v, "peft": False}, "no PEFT part, but adapter_config.json"),
    ],
)
def test_a_lost_or_misspelt_value_is_no_default(llama, file, change, match):
    path = llama[2] / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refuse(llama[2], match)


def without(values, key):
    return {name: value for name, value in values.items() if name != key}


def test_an_unknown_key_is_refused(llama):
    file = llama[2] / "hici_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "visibilty": 1}))
    refuse(llama[2], "unknown key 'visibilty'")
    file.write_text(json.dumps({**values, "hici": {**values["hici"], "visibilty": "past"}}))
    refuse(llama[2], "unknown HiCIConfig field 'visibilty'.*Did you mean 'visibility'")
    file.write_text("{")
    refuse(llama[2], "not valid JSON")


def test_another_base_is_refused(llama, tmp_path):
    other = make_base(tmp_path / "other", seed=9)
    refuse(llama[2], "fingerprint.*give the base that it was made on", other)
    refuse(llama[2], "mistral", make_base(tmp_path / "mistral", "mistral"))
    refuse(llama[2], "could not be loaded.*base_model=", tmp_path / "nothing")


def test_an_attached_or_wrapped_base_is_refused(llama):
    refuse(llama[2], "attached or wrapped already", llama[1])


def test_unknown_attention_and_no_directory(llama, tmp_path):
    with pytest.raises(ValueError, match="unknown attention 'hicy'.*Did you mean 'hici'"):
        hici.from_pretrained(llama[2], attention="hicy")
    refuse(tmp_path / "none", "is not a directory")


def test_nothing_is_overwritten_silently(llama):
    _, model, directory = llama
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(ValueError, match="not empty.*overwrite=True"):
        hici.save_pretrained(model, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    hici.save_pretrained(model, directory, overwrite=True)
    assert not list(directory.parent.glob(".*"))


def test_a_failed_save_leaves_the_old_directory_whole(llama, monkeypatch):
    _, model, directory = llama
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("hici.adapters.write.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        hici.save_pretrained(model, directory, overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert not list(directory.parent.glob(".*"))


def test_nan_is_not_saved(llama, tmp_path):
    _, model, _ = llama
    attention_modules(model)[0].local_constructor.memory_slots.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinity.*memory_slots"):
        hici.save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_changed_base_weights_are_not_lost_silently(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base"))
    hici.attach(model, small_config())
    model.model.norm.weight.data.add_(1.0)
    with pytest.raises(ValueError, match="own weights changed since hici.attach.*add_lora"):
        hici.save_pretrained(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_one_changed_number_is_noticed(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base"))
    hici.attach(model, small_config())
    model.model.embed_tokens.weight.data[5, 3] += 1e-3
    with pytest.raises(ValueError, match=r"1 of the model's own weights changed.*embed_tokens"):
        hici.save_pretrained(model, tmp_path / "adapter")
    model.to(torch.bfloat16)  # a cast is no change that would be lost
    hici.save_pretrained(model, tmp_path / "adapter")


@pytest.mark.parametrize("changed", [True, False])
def test_weights_that_train_outside_of_peft_are_not_lost_silently(llama, tmp_path, changed):
    _, model, _ = llama
    head = model.get_base_model().lm_head.weight
    if changed:
        head.data[3, 4] += 1.0
    else:
        head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"changed since hici.attach, or train \(.*lm_head.*add_lora"):
        hici.save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_merged_layers_can_be_saved(llama, tmp_path):
    _, model, _ = llama
    expected = logits(model, IDS)
    model.merge_adapter()
    hici.save_pretrained(model, tmp_path / "new")
    assert difference(logits(hici.from_pretrained(tmp_path / "new", attention="hici"), IDS), expected) == 0


def test_rounding_to_the_base_is_said(tmp_path, caplog):
    base = tmp_path / "base"
    tiny_model(max_position_embeddings=32).to(torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    hici.attach(model, small_config(segment_size=16))
    wrapped = hici.add_lora(model)
    for group in trainable_parameters(wrapped):
        for parameter in group:
            parameter.data = parameter.data.float() + 1e-3
    hici.save_pretrained(wrapped, tmp_path / "adapter")
    hici.from_pretrained(tmp_path / "adapter")
    assert "are finer than the base's torch.bfloat16 and were rounded" in caplog.text
    caplog.clear()
    exact = hici.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert not caplog.text
    saved = load_file(tmp_path / "adapter" / "hici_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in hici_state_dict(exact).items())


def test_a_path_from_home(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hici.save_pretrained(llama[1], "~/mine") == tmp_path / "mine"
    hici.from_pretrained("~/mine")


def test_save_and_lora_need_an_attached_plain_model(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="not attached"):
        hici.save_pretrained(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="not attached"):
        hici.add_lora(model)
    hici.attach(model, small_config())
    wrapped = hici.add_lora(model)
    with pytest.raises(ValueError, match="PEFT model already"):
        hici.add_lora(wrapped)


def test_offloaded_layers_are_refused(llama, monkeypatch):
    base, _, directory = llama
    meta = AutoModelForCausalLM.from_pretrained(base).to("meta")
    monkeypatch.setattr("hici.adapters.load.check_fingerprint", lambda *args: None)
    monkeypatch.setattr("hici.adapters.load.set_rope", lambda *args: None)
    refuse(directory, "device_map keeps layers off every device", meta)


def test_directory_can_be_moved(llama, tmp_path):
    base, model, directory = llama
    moved = shutil.move(directory, tmp_path / "moved")
    loaded = hici.from_pretrained(moved, base_model=base, attention="hici")
    assert difference(logits(loaded, IDS), logits(model, IDS)) == 0


def test_overwriting_deletes_nothing_but_an_adapter_directory(llama, tmp_path):
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "precious.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no hici_config.json.*would delete"):
        hici.save_pretrained(llama[1], tmp_path / "runs", overwrite=True)
    assert (tmp_path / "runs" / "other" / "precious.txt").read_text() == "precious"


def test_an_interrupt_while_moving_keeps_the_old_directory(llama, monkeypatch):
    _, model, directory = llama
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    rename, calls = os.rename, []

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == 2:  # the old one has stepped aside, the new one is about to come
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("hici.files.os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hici.save_pretrained(model, directory, overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_damaged_files_are_named_and_leave_the_base_alone(llama):
    base, _, directory = llama
    plain = AutoModelForCausalLM.from_pretrained(base)
    record = json.loads((directory / "hici_config.json").read_text())
    for value, message in (
        ([1], "holds a list instead of keys and values"),
        ({**record, "rope_parameters": None}, "rope_parameters=None is no dict"),
        ({**record, "context_length": "64"}, "context_length='64' is no int"),
        ({**record, "format_version": 4}, "format_version 4, but this hici reads 1 to 3"),
    ):
        (directory / "hici_config.json").write_text(json.dumps(value))
        refuse(directory, message, plain)
    (directory / "hici_config.json").write_text(json.dumps(record))
    file = directory / "hici_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(directory, "is damaged.*copy the file again", plain)
    assert not is_attached(plain)


def test_a_loaded_base_has_its_own_dtype(llama):
    base, _, directory = llama
    with pytest.raises(ValueError, match="with a loaded base_model, which has both already"):
        hici.from_pretrained(directory, AutoModelForCausalLM.from_pretrained(base), dtype=torch.bfloat16)


def test_another_adapter_than_one_lora_is_not_saved(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base"))
    hici.attach(model, small_config())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(ValueError, match="has the PEFT adapters mine.*one LoRA called 'default'"):
        hici.save_pretrained(wrapped, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_base_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("base")
    hici.attach(model, small_config())
    hici.save_pretrained(model, "adapter")
    hici.save_pretrained(hici.add_lora(model), "with_lora")
    recorded = json.loads((tmp_path / "with_lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert is_attached(hici.from_pretrained("../adapter"))
