"""PeftModel.from_pretrained on registered bases: HiCI directories whole or not at all."""

import json
import shutil

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hici
import llama_attn_hici
import qwen3_attn_hici
from helpers import difference, golden_tensors, logits, random_ids, randomise, small_config, tiny_model
from hici.adapters.plan import peft_tensors
from hici.models.attach import hici_state_dict
from hici.models.lookup import attention_modules, hici_config
from hici.models.vocabulary import grow_vocabulary

CONTEXT = 64


@pytest.fixture
def golden(checkpoint):
    """A function: largest distance of a model from golden logits of peft_fp32."""
    tensors = golden_tensors("checkpoint/golden")

    def distance(model, mode="none"):
        return difference(logits(model, tensors["input_ids"]), tensors[f"peft_fp32/{mode}/logits"])

    return distance


@pytest.fixture
def context():
    llama_attn_hici.CONTEXT_LENGTH = CONTEXT


def refuse(model, directory, match, **options):
    """Refused with that message, and the registered base is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names, rope = [name for name, _ in model.named_modules()], dict(model.config.rope_parameters)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(model, directory, **options)
    assert [name for name, _ in model.named_modules()] == names
    assert model.config.rope_parameters == rope
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "peft_config")


# loading


@pytest.mark.usefixtures("context")
def test_everything_is_loaded(registered, checkpoint, golden):
    base = registered()
    model = PeftModel.from_pretrained(base, checkpoint / "peft_fp32")
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert model.get_base_model() is base
    assert golden(model) <= 5e-5
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (98, 64)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.peft_config["default"].inference_mode
    assert golden(model.merge_and_unload()) <= 5e-5


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize("call", ["subclass", "subfolder", "names", "hub"])
def test_ways_to_call(registered, checkpoint, golden, call, monkeypatch):
    base = registered()
    if call == "subclass":
        model = peft.PeftModelForCausalLM.from_pretrained(base, str(checkpoint / "peft_fp32"), "default", False)
    elif call == "subfolder":
        model = PeftModel.from_pretrained(base, checkpoint, subfolder="peft_fp32")
    elif call == "names":
        model = PeftModel.from_pretrained(
            model=base, model_id=checkpoint / "peft_fp32", autocast_adapter_dtype=False, token=None, key_mapping=None
        )
    else:
        asked = []
        monkeypatch.setattr("hici.dropin.loading.repository_kind", lambda *args: asked.append(args) or "adapter")
        monkeypatch.setattr(
            "hici.dropin.loading.find_directory", lambda *args: asked.append(args) or checkpoint / "peft_fp32"
        )
        model = PeftModel.from_pretrained(base, "owner/name", revision="v1")
        assert asked == [("owner/name", "v1", ""), ("owner/name", "v1")]
    assert golden(model) <= 5e-5


@pytest.mark.usefixtures("context")
def test_is_trainable_trains_all_that_was_trained(registered, checkpoint):
    model = PeftModel.from_pretrained(registered(), checkpoint / "peft_fp32", is_trainable=True)
    assert not model.peft_config["default"].inference_mode
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = json.loads((checkpoint / "keys.json").read_text())
    saved = {name for names in shapes.values() if isinstance(names, dict) for name in names}
    ours = {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        for name in trained
        if ".lora_" not in name
    }
    assert len(ours) == 42
    assert ours <= {name.removeprefix("base_model.model.") for name in saved}
    assert len(trained) == 42 + 48
    model.train()
    ids = random_ids(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def resize_as_published(model):
    """The published training's order: rows of [PAD] in both tables are the mean of the old rows."""
    model.resize_token_embeddings(98, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[97] = table.weight.data[:97].mean(0)


@pytest.mark.parametrize("rope", ["ours", "by hand", "by hand, context unknown"])
def test_the_published_order_by_hand(checkpoint, golden, rope):
    config = AutoConfig.from_pretrained(checkpoint / "base")
    if rope != "ours":
        config.rope_scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    if rope != "by hand, context unknown":
        llama_attn_hici.CONTEXT_LENGTH = CONTEXT
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "base", config=config, dtype=torch.float32)
    resize_as_published(model)
    llama_attn_hici.register_hici_to_model(model, num_heads=4, bottleneck_dim=32, shared_compress_dim=16)
    trained = torch.load(checkpoint / "peft_fp32" / "trainable_params.bin", weights_only=True)
    assert not model.load_state_dict(trained, strict=False).unexpected_keys
    model = PeftModel.from_pretrained(model, checkpoint / "peft_fp32")
    assert golden(model) <= 5e-5
    assert model.config.rope_parameters["factor"] == 4.0
    llama_attn_hici.replace_llama_attn(use_flash_attn=False, use_full=True)
    assert golden(model, "full") <= 5e-5


def test_rope_by_hand_alone(checkpoint, golden):
    config = AutoConfig.from_pretrained(checkpoint / "base")
    config.rope_scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "base", config=config, dtype=torch.float32)
    llama_attn_hici.register_hici_to_model(model, num_heads=4, bottleneck_dim=32, shared_compress_dim=16)
    assert golden(PeftModel.from_pretrained(model, checkpoint / "peft_fp32")) <= 5e-5


def test_the_name_tells_the_context(registered, checkpoint, tmp_path):
    shutil.copytree(checkpoint / "peft_fp32", tmp_path / "Tiny-HiCI-1k")
    model = PeftModel.from_pretrained(registered(), tmp_path / "Tiny-HiCI-1k")
    assert model.config.rope_parameters["factor"] == 64.0
    assert model.config.max_position_embeddings == 1024


@pytest.mark.usefixtures("context")
def test_bfloat16_as_in_the_card(checkpoint):
    base = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.bfloat16, device_map="auto")
    llama_attn_hici.register_hici_to_model(base, num_heads=4, bottleneck_dim=32, shared_compress_dim=16)
    model = PeftModel.from_pretrained(base, checkpoint / "peft_bf16_adapter")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tensors = golden_tensors("checkpoint/golden")
    expected = tensors["peft_bf16_adapter/none/logits"]
    assert difference(logits(model, tensors["input_ids"]).float(), expected) < 0.3  # rounding only; the std is 1.2


@pytest.mark.parametrize("mode", ["none", "causal_shift"])
@pytest.mark.parametrize("fixed", [False, True])
def test_generation_decodes_over_raw_keys(registered, checkpoint, mode, fixed):
    llama_attn_hici.CONTEXT_LENGTH = CONTEXT
    llama_attn_hici.CAUSAL_CONTEXT_MODE = mode
    llama_attn_hici.USE_FIXED_SEGMENT_SIZE, llama_attn_hici.USE_FULL_ATTN_WITH_HICI = fixed, False
    model = PeftModel.from_pretrained(registered(), checkpoint / "peft_fp32")
    out = model.generate(input_ids=random_ids(1, 20), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 24)
    assert type(out.past_key_values) is DynamicCache


@pytest.mark.usefixtures("context")
def test_saving_keeps_everything(registered, checkpoint, tmp_path, golden):
    llama_attn_hici.CAUSAL_CONTEXT_MODE = "causal_shift"
    model = PeftModel.from_pretrained(registered(), checkpoint / "peft_fp32")
    hici.save_pretrained(model, tmp_path / "ours")
    loaded = hici.from_pretrained(tmp_path / "ours", base_model=checkpoint / "base", attention="hici")
    assert hici_config(loaded).visibility == "past"
    assert golden(loaded, "causal_shift") <= 5e-5


# directories of ours


def save_ours(base, directory, architecture="llama"):
    model = AutoModelForCausalLM.from_pretrained(base)
    hici.extend_rope(model, 48)
    hici.attach(model, small_config(segment_size=12, visibility="past"))
    for attention in attention_modules(model):
        randomise(attention.local_constructor, seed=3)
        randomise(attention.global_integrator, seed=4)
    wrapped = hici.add_lora(model).eval()
    hici.save_pretrained(wrapped, directory)
    return wrapped


SMALL = {"num_local_slots": 3, "global_slots": 2, "num_heads": 4, "bottleneck_dim": 32, "shared_compress_dim": 16}


def test_a_directory_of_ours(tmp_path):
    tiny_model(max_position_embeddings=32).save_pretrained(tmp_path / "base")
    model = save_ours(tmp_path / "base", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    llama_attn_hici.register_hici_to_model(base, **SMALL)
    llama_attn_hici.CONTEXT_LENGTH = 64
    refuse(base, tmp_path / "adapter", "llama_attn_hici.CONTEXT_LENGTH=64, but .* records 48; set it to None")
    llama_attn_hici.CONTEXT_LENGTH = None
    llama_attn_hici.CAUSAL_CONTEXT_MODE = "causal_shift"
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert hici_config(loaded).num_segments == 4  # the constants decide, not the record
    ids = random_ids(2, 48)
    assert difference(logits(loaded, ids), logits(model, ids)) < 1e-6  # 4 segments of 12 either way


def test_another_base_is_refused(tmp_path):
    tiny_model(max_position_embeddings=32).save_pretrained(tmp_path / "base")
    save_ours(tmp_path / "base", tmp_path / "adapter")
    other = tiny_model(seed=9, max_position_embeddings=32)
    llama_attn_hici.register_hici_to_model(other, **SMALL)
    refuse(other, tmp_path / "adapter", "fingerprint.*give the base that it was made on")


# qwen3


@pytest.fixture
def qwen3(tmp_path):
    """(base directory, trained model, released directory): LoRA inside the modules, a row for [PAD], factor 1.5."""
    tiny_model("qwen3", max_position_embeddings=32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    hici.extend_rope(model, 48)
    grow_vocabulary(model, 98)
    hici.attach(model, small_config(segment_size=12, visibility="current"))
    for attention in attention_modules(model):
        randomise(attention.local_constructor, seed=3)
        randomise(attention.global_integrator, seed=4)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    norms = ["input_layernorm", "post_attention_layernorm", "model.norm", "q_norm", "k_norm"]
    config = peft.LoraConfig(
        r=4, target_modules=projections, modules_to_save=["embed_tokens", *norms], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    tensors = {name: tensor.clone() for name, tensor in {**hici_state_dict(wrapped), **peft_tensors(wrapped)}.items()}
    directory = tmp_path / "adapter"
    directory.mkdir()
    lora = {f"base_model.model.{name}": tensor for name, tensor in tensors.items() if ".lora_" in name}
    torch.save(lora, directory / "adapter_model.bin")
    torch.save({name: t for name, t in tensors.items() if ".lora_" not in name}, directory / "trainable_params.bin")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": projections}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return tmp_path / "base", wrapped, directory


@pytest.mark.parametrize("rope", ["ours", "by hand"])
def test_qwen3(qwen3, rope):
    base, model, directory = qwen3
    config = AutoConfig.from_pretrained(base)
    if rope == "by hand":  # not rounded up in the published code of this family
        config.rope_scaling = {"rope_type": "linear", "factor": 1.5, "rope_theta": config.rope_parameters["rope_theta"]}
    else:
        qwen3_attn_hici.CONTEXT_LENGTH = 48
    qwen3_attn_hici.replace_qwen3_attn(use_flash_attn=False, use_hierarchical_forward=True)
    plain = AutoModelForCausalLM.from_pretrained(base, config=config)
    register = qwen3_attn_hici.register_hici_to_model
    register(plain, num_memory_slots=3, global_slots=2, num_heads=4, bottleneck_dim=32, shared_compress_dim=16)
    loaded = PeftModel.from_pretrained(plain, directory)
    assert loaded.config.rope_parameters["factor"] == 1.5
    ids = random_ids(2, 48)
    for mode, visibility in (("causal_gi", "current"), ("none", "all"), ("causal_shift", "past")):
        qwen3_attn_hici.CAUSAL_CONTEXT_MODE = mode
        hici.reconfigure(model, visibility=visibility)
        assert difference(logits(loaded, ids), logits(model, ids)) < 5e-6
    qwen3_attn_hici.replace_qwen3_attn(use_flash_attn=False, use_full=True)
    hidden = logits(model, ids)
    model.set_attn_implementation("sdpa")
    assert difference(logits(model, ids), hidden) > 0.1
    assert difference(logits(loaded, ids), logits(model, ids)) < 5e-6


# refusals


def test_an_unknown_context(registered, checkpoint):
    refuse(registered(), checkpoint / "peft_fp32", r"does not tell the context.*llama_attn_hici.CONTEXT_LENGTH = 16384")
    llama_attn_hici.CONTEXT_LENGTH = "16k"
    refuse(registered(), checkpoint / "peft_fp32", "llama_attn_hici.CONTEXT_LENGTH='16k' is not an integer >= 1")
    llama_attn_hici.CONTEXT_LENGTH = 8
    refuse(registered(), checkpoint / "peft_fp32", "a context of 8 is shorter than the 16 positions")


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_local_slots": 16}, "registered with num_local_slots=16, but .*peft_fp32 has 8"),
        ({"num_memory_slots": 16}, "registered with num_local_slots=16, but .*peft_fp32 has 8"),
        ({"global_slots": 2}, "global_slots=2, but .* has 4"),
        ({"bottleneck_dim": 64}, "bottleneck_dim=64, but .* has 32.*register it with the directory's values"),
        ({"shared_compress_dim": 8}, "shared_compress_dim=8, but .* has 16"),
        ({"use_shared_compressor": False}, r"shared_compress_dim=none \(use_shared_compressor=False\), but .* has 16"),
        ({"use_bottleneck": False}, r"bottleneck_dim=none \(use_bottleneck=False\), but .* has 32"),
        ({"num_local_slots": 4, "global_slots": 2}, "num_local_slots=4, but .* has 8; global_slots=2, but .* has 4"),
    ],
)
def test_other_shapes_than_registered(registered, checkpoint, options, match):
    refuse(registered(**options), checkpoint / "peft_fp32", match)


def test_independent_compressors_of_another_width(registered, checkpoint, adapter, context):
    """Width and kind of the integrator: from one released with five compressors of 32."""
    trained = torch.load(adapter / "trainable_params.bin", weights_only=True)
    for layer in (0, 1):
        place = f"model.layers.{layer}.self_attn.global_integrator."
        for name in [name for name in trained if name.startswith((place + "shared", place + "stat"))]:
            del trained[name]
        for i in range(5):
            trained[f"{place}stat_compressors.{i}.0.weight"] = torch.randn(32, 64)
            trained[f"{place}stat_compressors.{i}.1.weight"] = torch.ones(32)
            trained[f"{place}stat_compressors.{i}.1.bias"] = torch.zeros(32)
    torch.save(trained, adapter / "trainable_params.bin")
    refuse(registered(use_shared_compressor=False, compress_dim=64), adapter, "compress_dim=64, but .* has 32")
    model = PeftModel.from_pretrained(registered(use_shared_compressor=False, compress_dim=32), adapter)
    assert hici_config(model).compress_dim is None


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adapter_name": "mine"}, "adapter_name='mine', but .* holds HiCI modules.*leave it out"),
        ({"low_cpu_mem_usage": True}, "low_cpu_mem_usage=True, but .* holds HiCI modules.*leave it out"),
        ({"ephemeral_gpu_offload": True}, "ephemeral_gpu_offload=True"),
        ({"torch_device": "cpu"}, r"torch_device='cpu'.*known: adapter_name, is_trainable"),
        ({"key_mapping": {"a": "b"}}, "key_mapping="),
        ({"config": peft.LoraConfig()}, "config="),
        ({"token": "x"}, "token='x'"),
        ({"revision": "main"}, "revision='main'.*is a directory on this machine"),
    ],
)
def test_arguments_that_would_be_ignored(registered, checkpoint, options, match):
    refuse(registered(), checkpoint / "peft_fp32", match, **options)


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize("file", ["adapter_model.bin", "trainable_params.bin", "adapter_config.json"])
@pytest.mark.parametrize("fault", ["missing", "cut off"])
def test_half_a_directory(registered, adapter, file, fault):
    path = adapter / file
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refuse(registered(), adapter, rf"{file}|not valid JSON")


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize("file", ["adapter_model.bin", "trainable_params.bin"])
def test_a_tensor_missing_or_left_over(registered, adapter, file):
    tensors = torch.load(adapter / file, weights_only=True)
    name = min(name for name in tensors if "local_constructor" in name)
    torch.save({key: tensor for key, tensor in tensors.items() if key != name}, adapter / file)
    refuse(registered(), adapter, f"missing: {name.removeprefix('base_model.model.')}")
    torch.save({**tensors, "model.stranger": torch.zeros(2)}, adapter / file)
    refuse(registered(), adapter, "left over: model.stranger")


@pytest.mark.usefixtures("context")
def test_a_peft_model_is_refused(registered, checkpoint):
    wrapped = peft.get_peft_model(registered(), peft.LoraConfig(target_modules=r".*self_attn\.q_proj"))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ValueError, match="is a PEFT model already, but .* holds HiCI modules"):
            PeftModel.from_pretrained(model, checkpoint / "peft_fp32")
