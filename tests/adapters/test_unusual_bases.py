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
from golden_checkpoint import CHECKPOINT, EXPECTED, IDS, TOLERANCE
from helpers import difference, logits, random_ids, randomise, small_config, tiny_model
from hici.adapters.contents import read_contents
from hici.adapters.load import install
from hici.adapters.plan import make_plan
from hici.models.attach import attention_modules, is_attached

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


@pytest.fixture
def trained(tmp_path):
    model = make_trained(make_base(tmp_path / "base"))
    hici.save_pretrained(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


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


# values


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
    assert difference(logits(merged, TEXT), logits(wrapped, TEXT)) < 1e-5
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
