"""Convert is lossless both ways; merged models give the adapted model's logits, without hici and with it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hici
from adapter_models import make_base, make_trained
from golden_checkpoint import CASES, CHECKPOINT, EXPECTED, IDS, MODES, NEEDED, TOLERANCE, VARIANTS
from helpers import difference, logits, random_ids
from hici.adapters.contents import read_contents
from hici.adapters.merge import MERGE_FILE

ARCHITECTURES = ("llama", "llama-tied", "qwen3", "mistral", "qwen2", "gpt_neox", "phi3", "gemma2-tied", "gemma3-tied")


def run(code):
    """The code in a process of its own; its last line of output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request, tmp_path_factory):
    """(trained model, adapter directory) of an architecture."""
    architecture, _, tied = request.param.partition("-")
    root = tmp_path_factory.mktemp(request.param)
    model = make_trained(make_base(root / "base", architecture, tie=bool(tied)))
    hici.save_pretrained(model, root / "adapter")
    return model, root / "adapter"


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.reshape(-1), other[name].reshape(-1)), name


# convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    for variant in VARIANTS:
        hici.convert(CHECKPOINT / variant, root / variant, "hici", **NEEDED)
        hici.convert(root / variant, root / f"{variant}-back", "released")
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_converting_to_ours_and_back_keeps_every_bit(converted, variant):
    source = read_contents(CHECKPOINT / variant)
    same_tensors(source.tensors, read_contents(converted / variant).tensors)
    for file in ("adapter_model.bin", "trainable_params.bin"):
        before = torch.load(CHECKPOINT / variant / file, weights_only=True)
        after = torch.load(converted / f"{variant}-back" / file, weights_only=True)
        same_tensors(before, after)
        assert all(before[name].shape == after[name].shape for name in before)
    old = json.loads((CHECKPOINT / variant / "adapter_config.json").read_text())
    new = json.loads((converted / f"{variant}-back" / "adapter_config.json").read_text())
    assert new.keys() == old.keys()  # what the published PEFT reads
    assert {key for key in old if old[key] != new[key]} <= {"base_model_name_or_path", "target_modules"}
    assert set(old["target_modules"]) == set(new["target_modules"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("back", ["", "-back"])
def test_converted_logits(converted, case, back):
    variant, mode = case.split("/")
    model = hici.from_pretrained(converted / f"{variant}{back}", attention="full" if mode == "full" else "hici")
    if mode != "full":
        visibility, use_global, use_local = MODES[mode]
        hici.reconfigure(model, visibility=visibility, use_global=use_global, use_local=use_local)
    assert difference(logits(model, IDS), EXPECTED[f"{case}/logits"]) < TOLERANCE


def test_a_converted_directory_knows_its_base(converted, tmp_path):
    record = json.loads((converted / "peft_fp32" / "hici_config.json").read_text())
    assert record["base_fingerprint"].startswith("sha256:")
    assert record["vocab_size"] == 98
    base = AutoModelForCausalLM.from_pretrained(CHECKPOINT / "base")
    base.model.layers[0].mlp.up_proj.weight.data.add_(0.5)
    with pytest.raises(ValueError, match="fingerprint"):
        hici.from_pretrained(converted / "peft_fp32", base_model=base)
    assert base.config.vocab_size == 97


@pytest.mark.parametrize("file", ["adapter_model.bin", "trainable_params.bin", "adapter_config.json"])
def test_a_lost_file_of_a_converted_directory_is_named(converted, tmp_path, file):
    hici.convert(converted / "peft_fp32", tmp_path / "x", "released")
    (tmp_path / "x" / file).unlink()
    with pytest.raises(ValueError, match=rf"lacks .*{file}"):
        hici.from_pretrained(tmp_path / "x")


def test_our_adapters_of_every_architecture_convert_there_and_back(trained, tmp_path):
    model, directory = trained
    hici.convert(directory, tmp_path / "released", "released")
    hici.convert(tmp_path / "released", tmp_path / "back", "hici")
    same_tensors(read_contents(directory).tensors, read_contents(tmp_path / "back").tensors)
    for name in ("released", "back"):
        loaded = hici.from_pretrained(tmp_path / name, attention="hici")
        model.set_attn_implementation("hici")
        assert difference(logits(loaded, random_ids(2, 45)), logits(model, random_ids(2, 45))) == 0


def test_refusals_of_convert(converted, tmp_path):
    ours = converted / "peft_fp32"
    with pytest.raises(ValueError, match="unknown layout 'relased'.*Did you mean 'released'"):
        hici.convert(ours, tmp_path / "x", "relased")
    with pytest.raises(ValueError, match="is in the layout 'hici' already"):
        hici.convert(ours, tmp_path / "x", "hici")
    with pytest.raises(ValueError, match="not empty.*overwrite"):
        hici.convert(CHECKPOINT / "peft_fp32", converted, "hici", **NEEDED)
    assert not (tmp_path / "x").exists()


def test_lora_that_the_published_code_cannot_express(tmp_path):
    import peft

    base = make_base(tmp_path / "base")
    model = hici.attach(AutoModelForCausalLM.from_pretrained(base), hici.HiCIConfig(num_heads=4, bottleneck_dim=32))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    hici.save_pretrained(wrapped, tmp_path / "dora")
    with pytest.raises(ValueError, match="cannot express use_dora=True"):
        hici.convert(tmp_path / "dora", tmp_path / "x", "released")
    with pytest.raises(ValueError, match=r"use_dora=True is more than W \+ s B A"):
        hici.merge(tmp_path / "dora", tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "dora"}


# merge


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    for variant in VARIANTS:
        for kind in ("plain", "hici"):
            hici.merge(CHECKPOINT / variant, root / f"{variant}-{kind}", kind, max_shard_size=100_000, **NEEDED)
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_in_stock_transformers_without_hici(merged, variant, tmp_path):
    torch.save((IDS, EXPECTED[f"{variant}/full/logits"]), tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['hici'] = None  # importing it fails\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(merged / f'{variant}-plain')!r})\n"
        f"ids, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "with torch.no_grad(): print((model(ids).logits - expected).abs().max().item())\n"
    )
    assert float(run(code)) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_hici_through_automodel_with_remote_code(merged, variant, tmp_path):
    torch.save((IDS, EXPECTED[f"{variant}/none/logits"], EXPECTED[f"{variant}/full/logits"]), tmp_path / "expected.pt")
    code = (
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"where = {str(merged / f'{variant}-hici')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)\n"
        "assert model.config._attn_implementation == 'hici', model.config._attn_implementation\n"
        f"ids, hici, full = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "with torch.no_grad():\n"
        "    gap = (model(ids).logits - hici).abs().max()\n"
        "    model.set_attn_implementation('sdpa')\n"
        "    print(max(gap, (model(ids).logits - full).abs().max()).item())\n"
    )
    assert float(run(code)) < TOLERANCE


def test_the_class_that_transformers_serve_asks_for(merged):
    import transformers

    automodel = getattr(transformers, "AutoModelForDecision", None)
    if automodel is None:
        pytest.skip("this transformers has no AutoModelForDecision; its server loads the full-attention model")
    model = automodel.from_pretrained(merged / "peft_fp32-hici", trust_remote_code=True)
    assert model.config._attn_implementation == "hici"
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/none/logits"]) < TOLERANCE


def test_it_starts_in_the_mode_that_was_asked_for(merged, tmp_path):
    where = merged / "peft_fp32-hici"
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, attn_implementation="sdpa")
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE
    model.save_pretrained(tmp_path / "again")  # as it is: full
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.config._attn_implementation == "sdpa"
    again.set_attn_implementation("hici")
    assert difference(logits(again, IDS), EXPECTED["peft_fp32/none/logits"]) < TOLERANCE


@pytest.mark.parametrize("attention, case", [("hici", "none"), ("full", "full")])
def test_hici_reads_its_own_merges(merged, attention, case):
    model = hici.from_pretrained(merged / "peft_fp32-hici", attention=attention)
    assert difference(logits(model, IDS), EXPECTED[f"peft_fp32/{case}/logits"]) < TOLERANCE
    changed = hici.from_pretrained(merged / "peft_fp32-hici", attention="hici", config={"visibility": "past"})
    assert difference(logits(changed, IDS), EXPECTED["peft_fp32/causal_shift/logits"]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_every_case_after_a_merge(merged, case):
    variant, mode = case.split("/")
    if mode == "full":
        model = hici.from_pretrained(merged / f"{variant}-hici", attention="full")
    else:
        visibility, use_global, use_local = MODES[mode]
        config = {"visibility": visibility, "use_global": use_global, "use_local": use_local}
        model = hici.from_pretrained(merged / f"{variant}-hici", attention="hici", config=config)
    assert difference(logits(model, IDS), EXPECTED[f"{case}/logits"]) < TOLERANCE


def test_without_remote_code_it_is_the_full_attention_model(merged):
    model = AutoModelForCausalLM.from_pretrained(merged / "peft_fp32-hici")
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE


def test_what_is_in_a_merged_directory(merged):
    plain, kept = merged / "peft_fp32-plain", merged / "peft_fp32-hici"
    index = json.loads((plain / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1  # in shards
    assert not any("local_constructor" in name or "lora" in name for name in index)
    state = {name: tensor for file in set(index.values()) for name, tensor in load_file(plain / file).items()}
    assert state["model.embed_tokens.weight"].shape == state["lm_head.weight"].shape == (98, 64)
    assert torch.equal(state["lm_head.weight"][97], state["lm_head.weight"][:97].mean(0))
    config = json.loads((plain / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == 4.0  # both generations read it
    assert "hici" not in config
    config = json.loads((kept / "config.json").read_text())
    assert config["hici"]["attention"] == "hici"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hici.LlamaForCausalLM"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (kept / "modeling_hici.py").is_file()
    assert json.loads((kept / MERGE_FILE).read_text())["context_length"] == 64


@pytest.mark.parametrize("kind", ["plain", "hici"])
def test_every_architecture_merges(trained, tmp_path, kind):
    model, directory = trained
    hici.merge(directory, tmp_path / kind, kind)
    ids = random_ids(2, 45)
    if kind == "plain":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        model.set_attn_implementation(loaded.config._attn_implementation)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind, trust_remote_code=True)
        assert loaded.config._attn_implementation == "hici"
        model.set_attn_implementation("hici")
    assert difference(logits(loaded, ids), logits(model, ids)) < 1e-5 * max(1, logits(model, ids).abs().max().item())
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert difference(logits(again, ids), logits(loaded, ids)) == 0


def test_a_merged_model_generates_and_trains(merged):
    model = AutoModelForCausalLM.from_pretrained(merged / "peft_fp32-hici", trust_remote_code=True)
    out = model.generate(IDS[:, :40], attention_mask=torch.ones_like(IDS[:, :40]), max_new_tokens=3, do_sample=False,
                         pad_token_id=0)  # fmt: skip
    assert out.shape == (2, 43)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dtype_and_attention_of_a_merge(tmp_path):
    hici.merge(CHECKPOINT / "peft_fp32", tmp_path / "x", "hici", dtype=torch.bfloat16, attention="full", **NEEDED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    assert difference(logits(model, IDS).float(), EXPECTED["peft_fp32/full/logits"]) < 0.5


def test_a_base_in_one_pickle_and_in_sharded_pickles(released, tmp_path):
    tensors = load_file(released.base / "model.safetensors")
    (released.base / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old checkpoints have
    torch.save(tensors, released.base / "pytorch_model.bin")
    hici.merge(released.adapter, tmp_path / "one", **released.needed())
    names = sorted(tensors)
    parts = {"a.bin": names[:9], "b.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, released.base / file)
    (released.base / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = released.base / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hici.merge(released.adapter, tmp_path / "two", **released.needed())
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    same_tensors(one, two)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE
    (released.base / "b.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks b.bin, which pytorch_model.bin.index.json names"):
        hici.merge(released.adapter, tmp_path / "three", **released.needed())


def test_the_tokenizer_and_its_length(released, tmp_path, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", model_max_length=16)
    tokenizer.save_pretrained(released.base)
    hici.merge(released.adapter, tmp_path / "bases", **released.needed())
    assert AutoTokenizer.from_pretrained(tmp_path / "bases").model_max_length == 64
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(released.adapter)
    hici.merge(released.adapter, tmp_path / "adapters", **released.needed())
    assert AutoTokenizer.from_pretrained(tmp_path / "adapters").pad_token == "[PAD]"
    assert "has a tokenizer, so the merged directory has none" not in caplog.text
    hici.merge(CHECKPOINT / "peft_fp32", tmp_path / "none", **NEEDED)
    assert "has a tokenizer, so the merged directory has none" in caplog.text


def test_refusals_of_merge(released, tmp_path, monkeypatch):
    def refuse(match, target=tmp_path / "x", **changes):
        with pytest.raises(ValueError, match=match):
            hici.merge(released.adapter, target, **released.needed(**changes))

    refuse("unknown kind of merge 'plane'.*Did you mean 'plain'", kind="plane")
    refuse("attention=hici with a plain merge", attention="hici")
    refuse("exists and is not empty", target=released.base)
    refuse("holds no hici_merge.json, so it is no directory of this kind", target=released.base, overwrite=True)
    refuse("shorter than the 16 positions", context_length=8)
    tensors = load_file(released.base / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "up_proj" not in n}, released.base / "model.safetensors")
    refuse("lacks model.layers.0.mlp.up_proj.weight, a weight of the model")
    save_file({**tensors, "strange.weight": torch.zeros(2)}, released.base / "model.safetensors")
    refuse("1 tensors that a LlamaForCausalLM does not have .strange.weight.")
    config = json.loads((released.base / "config.json").read_text())
    (released.base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refuse("is quantised, and LoRA can't be folded")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "peft_fp32"}


def test_a_failed_merge_leaves_nothing_and_an_earlier_one_whole(released, tmp_path, monkeypatch):
    hici.merge(released.adapter, tmp_path / "out", **released.needed())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hici.adapters.merge.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hici.merge(released.adapter, tmp_path / "out", overwrite=True, **released.needed())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        hici.merge(released.adapter, tmp_path / "new", **released.needed())
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    hici.merge(released.adapter, tmp_path / "out", overwrite=True, **released.needed())


def test_incomplete_merged_weights_are_refused(merged, tmp_path):
    import shutil

    where = shutil.copytree(merged / "peft_fp32-hici", tmp_path / "x")
    index = json.loads((where / "model.safetensors.index.json").read_text())
    name = "model.layers.1.self_attn.global_integrator.expand.weight"
    file = where / index["weight_map"].pop(name)
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks or misshapes 1 tensors .*expand.weight"):
        hici.from_pretrained(where)
    with pytest.raises(ValueError, match="base_model=base, but .* is a merged model"):
        hici.from_pretrained(where, base_model="base")


def test_a_config_without_hici_is_refused_by_the_class(released):
    from hici.models.merged import merged_class

    config = AutoConfig.from_pretrained(released.base)
    with pytest.raises(ValueError, match="needs a config with a HiCIConfig in `hici`"):
        merged_class(config)(config)
