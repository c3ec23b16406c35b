"""Values and files that are out of the ordinary: read as they are meant, or refused for what they are."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hici
from adapter_models import make_base, make_trained
from golden_checkpoint import CHECKPOINT, EXPECTED, IDS, TOLERANCE
from helpers import difference, logits, small_config, tiny_model


def test_dtypes_of_a_merge(trained, tmp_path, caplog):
    hici.merge(trained[1], tmp_path / "half", dtype="float16")
    assert "6 tensors that were trained in a finer dtype were rounded to torch.float16" in caplog.text
    for dtype in ("int8", torch.int8, "nothing", "float8_e4m3fn"):
        with pytest.raises(ValueError, match="is no floating-point dtype"):
            hici.from_pretrained(trained[1], dtype=dtype)
        with pytest.raises(ValueError, match="is no floating-point dtype"):
            hici.merge(trained[1], tmp_path / "x", dtype=dtype)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][5, 7] = 1e5  # no sample of the fingerprint, too large for float16
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the merge in torch.float16 holds NaN or infinity .*up_proj"):
        hici.merge(trained[1], tmp_path / "x", dtype="float16")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name, tensor, match",
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(()), "has shape .., but it must be a matrix"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(8, 64, dtype=torch.int64), "holds torch.int64"),
    ],
    ids=["scalar", "integers"],
)
def test_tensors_that_no_training_writes(released, name, tensor, match):
    path = released.adapter / "adapter_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, f"base_model.model.{name}": tensor}, path)
    with pytest.raises(ValueError, match=match):
        hici.from_pretrained(released.adapter, **released.needed())
    assert hici.verify(released.adapter).problems


def test_names_with_and_without_the_prefix(released):
    path = released.adapter / "trainable_params.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "base_model.model.model.norm.weight": tensors["model.norm.weight"] * 5}, path)
    with pytest.raises(ValueError, match=r"model.norm.weight: there with and without the prefix"):
        hici.from_pretrained(released.adapter, **released.needed())


def test_files_of_both_layouts(trained):
    shutil.copy(CHECKPOINT / "peft_fp32" / "trainable_params.bin", trained[1])
    with pytest.raises(ValueError, match="in our layout by its hici_config.json, but holds trainable_params.bin"):
        hici.from_pretrained(trained[1])


@pytest.mark.parametrize(
    "changes, match",
    [({"target_modules": 5}, "adapter_config.json"), ({"target_modules": ["nope"]}, "adapter_config.json"),
     ({"lora_alpha": "x"}, "adapter_config.json")],
    ids=str,
)  # fmt: skip
def test_lora_configs_that_peft_refuses(released, changes, match):
    file = released.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=match):
        hici.from_pretrained(released.adapter, **released.needed())


def test_contexts_that_are_no_numbers(released, trained, tmp_path):
    for value in ("64", 0, -5, True, 64.0):
        with pytest.raises(ValueError, match=r"context_length=.* is not an integer >= 1"):
            hici.from_pretrained(released.adapter, **released.needed(context_length=value))
    for value in (10**6, -5, "64"):
        with pytest.raises(ValueError, match="is not a number of tokens from 1 to the 64 positions"):
            hici.save_pretrained(trained[0], tmp_path / "x", context_length=value)


def test_verify_knows_lora_by_layer(tmp_path):
    base = make_base(tmp_path / "base")
    for i, lora in enumerate(({"layers_to_transform": [0]}, {"rank_pattern": {"model.layers.1.self_attn.q_proj": 2}})):
        model = hici.attach(AutoModelForCausalLM.from_pretrained(base), small_config())
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **lora))
        hici.save_pretrained(wrapped, tmp_path / str(i))
        assert hici.verify(tmp_path / str(i)).problems == []


def test_the_folder_one_stands_in_tells_its_name(released, tmp_path, monkeypatch):
    named = shutil.copytree(released.adapter, tmp_path / "Phi-3-mini-4k-HiCI-1k")
    monkeypatch.chdir(named)
    model = hici.from_pretrained(".", **released.needed(context_length=None))
    assert model.config.max_position_embeddings == 1024


def test_a_base_in_float16_has_the_fingerprint_of_its_files(tmp_path):
    base = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    hici.save_pretrained(hici.add_lora(hici.attach(model, small_config())), tmp_path / "adapter")
    hici.merge(tmp_path / "adapter", tmp_path / "m")


def test_index_files_that_are_none(released, tmp_path):
    index = released.base / "model.safetensors.index.json"
    shutil.move(released.base / "model.safetensors", released.base / "a.safetensors")  # a single file would count first
    index.write_text("[]")
    with pytest.raises(ValueError, match="has no weight_map"):
        hici.merge(released.adapter, tmp_path / "m", **released.needed())
    index.write_text(
        json.dumps({"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.bias": "a.safetensors"}})
    )
    with pytest.raises(ValueError, match="tensors that a LlamaForCausalLM does not have"):
        hici.merge(released.adapter, tmp_path / "m", **released.needed())
    weights = load_file(released.base / "a.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "up_proj" not in name}
    save_file(kept, released.base / "a.safetensors", metadata={"format": "pt"})
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors")}))
    with pytest.raises(ValueError, match="lacks model.layers.0.mlp.up_proj.weight, which its index names"):
        hici.merge(released.adapter, tmp_path / "m", **released.needed())


def test_float8_is_read(tmp_path):
    from hici.adapters.weights import bad_values, read_tensors

    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    assert bad_values(read_tensors(tmp_path / "x.safetensors")) == []
    save_file({"a": torch.ones(4, dtype=torch.uint16)}, tmp_path / "y.safetensors")
    assert read_tensors(tmp_path / "y.safetensors", data=False)["a"].dtype == torch.uint16


def test_the_files_that_transformers_reads(released, tmp_path):
    """A single file counts before an index, as in transformers: a stale index beside it is harmless."""
    stale = {name: tensor + 1 for name, tensor in load_file(released.base / "model.safetensors").items()}
    save_file(stale, released.base / "stale.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(stale, "stale.safetensors")}
    (released.base / "model.safetensors.index.json").write_text(json.dumps(index))
    hici.merge(released.adapter, tmp_path / "m", **released.needed())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert difference(logits(merged, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE
    hici.convert(released.adapter, tmp_path / "c", "hici", **released.needed())
    hici.from_pretrained(tmp_path / "c")


def test_a_tied_base_that_stores_the_head_alone(tmp_path):
    base = make_base(tmp_path / "base", tie=True)
    model = hici.attach(AutoModelForCausalLM.from_pretrained(base), small_config(visibility="past"))
    wrapped = hici.add_lora(model, embeddings=False).eval()
    hici.save_pretrained(wrapped, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    hici.merge(tmp_path / "adapter", tmp_path / "m", "hici")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert difference(logits(merged, IDS % 97), logits(wrapped, IDS % 97)) < 1e-5
    assert hici.verify(tmp_path / "m").problems == []


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [None, torch.float16, torch.bfloat16], ids=str)
def test_the_base_is_known_in_every_dtype(tmp_path, stored, trained):
    tiny_model(max_position_embeddings=32).to(stored).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=trained or "auto")
    hici.save_pretrained(hici.add_lora(hici.attach(model, small_config())), tmp_path / "adapter")
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        hici.from_pretrained(tmp_path / "adapter", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float16)
    hici.from_pretrained(tmp_path / "adapter", base_model=loaded)
    hici.merge(tmp_path / "adapter", tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float16)
    loaded.model.norm.weight.data.mul_(2)
    with pytest.raises(ValueError, match="give the base that it was made on"):
        hici.from_pretrained(tmp_path / "adapter", base_model=loaded)


def test_the_base_is_never_what_is_replaced(tmp_path):
    run = tmp_path / "run"
    model = make_trained(make_base(run / "base"))
    hici.save_pretrained(model, tmp_path / "adapter")
    for file in ("hici_config.json",):
        shutil.copy(tmp_path / "adapter" / file, run)  # looks like an adapter directory
    with pytest.raises(ValueError, match="is or holds .*base, which is read"):
        hici.convert(tmp_path / "adapter", run, "released", overwrite=True)
    with pytest.raises(ValueError, match="is or holds .*base, which is read"):
        hici.save_pretrained(model, run, overwrite=True)
    assert (run / "base" / "model.safetensors").is_file()


def test_the_current_directory_is_no_target(trained, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for act in (lambda: hici.merge(trained[1], "."), lambda: hici.save_pretrained(trained[0], ".")):
        with pytest.raises(ValueError, match="is the current directory, which cannot be replaced"):
            act()
    assert not list((tmp_path / "empty").iterdir())


def test_a_fingerprint_that_could_not_be_taken_is_said(released, tmp_path, caplog):
    file = released.base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    hici.convert(released.adapter, tmp_path / "c", "hici", **released.needed())
    assert "no fingerprint could be taken of the base" in caplog.text
    assert json.loads((tmp_path / "c" / "hici_config.json").read_text())["base_fingerprint"] == "unknown"


def test_shards_of_no_size(trained, tmp_path):
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"max_shard_size={size} is below 1 byte"):
            hici.merge(trained[1], tmp_path / "x", max_shard_size=size)
