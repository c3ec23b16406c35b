"""Merged HiCI models are models like others: trained and saved again, copied, pickled, quantised, sharded."""

import copy
import io
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hici
from golden_checkpoint import CHECKPOINT, EXPECTED, IDS, NEEDED, TOLERANCE
from helpers import difference, logits
from hici.adapters.hub import repository_kind
from hici.adapters.lora import trainable_parameters
from hici.models.lookup import attention_modules
from hici.models.merged import HiCIMixin

NONE, PAST = EXPECTED["peft_fp32/none/logits"], EXPECTED["peft_fp32/causal_shift/logits"]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    directory = tmp_path_factory.mktemp("merged") / "m"
    return hici.merge(CHECKPOINT / "peft_fp32", directory, "hici", **NEEDED)


def remote(where, **options):
    return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, **options)


@pytest.mark.parametrize("load", [remote, lambda where: hici.from_pretrained(where, attention="hici")],
                         ids=["remote code", "hici"])  # fmt: skip
def test_it_is_trained_on_and_saved_as_an_adapter(where, load, tmp_path):
    model = hici.add_lora(load(where))
    optimizer = torch.optim.SGD([p for group in trainable_parameters(model) for p in group], lr=0.05)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval(), IDS)
    assert difference(expected, NONE) > 1e-3
    hici.save_pretrained(model, tmp_path / "adapter")
    again = hici.from_pretrained(tmp_path / "adapter", attention="hici")
    assert difference(logits(again, IDS), expected) == 0
    hici.merge(tmp_path / "adapter", tmp_path / "twice", "hici")
    assert difference(logits(remote(tmp_path / "twice"), IDS), expected) < TOLERANCE
    assert hici.verify(tmp_path / "twice").problems == []


@pytest.mark.parametrize("load", [remote, lambda where: hici.from_pretrained(where, attention="hici")],
                         ids=["remote code", "hici"])  # fmt: skip
def test_it_is_saved_with_its_code(where, load, tmp_path):
    load(where).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_hici.py").is_file()
    assert difference(logits(remote(tmp_path / "again"), IDS), NONE) < TOLERANCE
    assert hici.verify(tmp_path / "again").problems == []
    (tmp_path / "again" / "modeling_hici.py").unlink()
    report = hici.verify(tmp_path / "again")
    assert "names the code modeling_hici.py, which is not there" in report.problems[0].text


def test_copies_and_pickles(where):
    model = hici.from_pretrained(where, attention="hici")
    assert isinstance(model, HiCIMixin)
    assert type(model) is type(hici.from_pretrained(where))
    assert difference(logits(copy.deepcopy(model), IDS), NONE) < TOLERANCE
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert difference(logits(torch.load(buffer, weights_only=False), IDS), NONE) < TOLERANCE


def test_gates_are_as_in_other_models(where):
    for model in (remote(where), hici.from_pretrained(where)):
        gates = [attention.global_integrator.expand_scale_param for attention in attention_modules(model)]
        assert all(gate.shape == (1,) for gate in gates)  # FSDP2 refuses scalars
        state = model.state_dict()
        assert state["model.layers.0.self_attn.global_integrator.expand_scale_param"].shape == ()


def test_use_is_changed_as_for_adapters(where):
    for config in ({"visibility": "past"}, hici.HiCIConfig(visibility="past")):
        for directory, options in ((where, {}), (CHECKPOINT / "peft_fp32", {**NEEDED, "config": None})):
            given = config if directory == where else {"visibility": "past", "num_heads": 4}
            model = hici.from_pretrained(directory, attention="hici", **{**options, "config": given})
            assert difference(logits(model, IDS), PAST) < TOLERANCE
    with pytest.raises(ValueError, match="bottleneck_dim=64 instead of 32 needs other modules"):
        hici.from_pretrained(where, config={"bottleneck_dim": 64})


def test_a_quantised_one_keeps_its_modules_whole(where):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'hici[quantization]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    options = {"quantization_config": config, "dtype": torch.float32}
    for model in (remote(where, **options),
                  hici.from_pretrained(where, attention="hici", **options)):  # fmt: skip
        assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
        assert type(model.model.layers[0].self_attn.local_constructor.q_proj) is torch.nn.Linear
        assert type(model.lm_head) is torch.nn.Linear
        gap = (logits(model, IDS) - NONE).abs().mean() / NONE.abs().mean()
        assert gap < 0.06


def test_hub_names_are_known_by_their_files(where, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    for source, name in ((where, "merged"), (CHECKPOINT / "peft_fp32", "adapter"), (CHECKPOINT / "base", "plain")):
        repository = tmp_path / f"models--someone--{name}"
        snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(source, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(snapshot.name)
        assert repository_kind(f"someone/{name}") == name
    assert repository_kind("nobody/nothing") == "plain"
    model = hici.from_pretrained("someone/merged", attention="hici")
    assert difference(logits(model, IDS), NONE) < TOLERANCE


@pytest.mark.parametrize(
    "content, match",
    [
        (b"<!DOCTYPE html>", "could not be read.*copy them again"),
        (b"", "could not be read"),
        (None, "could not be read"),
    ],
    ids=["html", "empty", "truncated"],
)
def test_damaged_files_are_errors_of_ours(where, tmp_path, content, match):
    directory = shutil.copytree(where, tmp_path / "x")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=match):
        hici.from_pretrained(directory)
    base = shutil.copytree(CHECKPOINT / "base", tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=match):
        hici.from_pretrained(CHECKPOINT / "peft_fp32", **{**NEEDED, "base_model": base})


def test_wrong_shapes_and_configs(where, tmp_path):
    directory = shutil.copytree(where, tmp_path / "x")
    config = json.loads((directory / "config.json").read_text())
    changed = {**config, "hici": {**config["hici"], "num_local_slots": 5}}
    (directory / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="lacks or misshapes 2 tensors .*memory_slots"):
        hici.from_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({**config, "hici": "x"}))
    with pytest.raises(ValueError, match="hici='x' is no dict of HiCIConfig's fields"):
        hici.from_pretrained(directory)
    assert "hici='x' is no dict" in hici.verify(directory).problems[0].text
    base = shutil.copytree(CHECKPOINT / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:5]}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights or has them in another shape .*up_proj"):
        hici.from_pretrained(CHECKPOINT / "peft_fp32", **{**NEEDED, "base_model": base})


def test_plain_peft_goes_on_a_merged_model(where):
    wrapped = peft.get_peft_model(remote(where), peft.LoraConfig(target_modules=["up_proj"]))
    assert difference(logits(wrapped.eval(), IDS), NONE) < TOLERANCE


def test_a_detached_one_is_saved_as_a_plain_model(where, tmp_path):
    for i, model in enumerate((remote(where), hici.from_pretrained(where))):
        hici.detach(model).save_pretrained(tmp_path / str(i))
        assert not (tmp_path / str(i) / "modeling_hici.py").exists()
        assert "auto_map" not in json.loads((tmp_path / str(i) / "config.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert difference(logits(plain, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE


def test_verify_and_other_peoples_code(where, tmp_path):
    directory = shutil.copytree(where, tmp_path / "x")
    config = json.loads((directory / "config.json").read_text())
    auto_map = {**config["auto_map"], "AutoTokenizer": ["t.X", None], "AutoModel": "owner/repo--modeling_x.X"}
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert hici.verify(directory).problems == []
    (directory / "config.json").write_text(json.dumps({"model_type": "t5", "hici": config["hici"]}))
    assert "t5 is no causal language model" in hici.verify(directory).problems[0].text
