"""The released format: the golden checkpoint loads whole, in every mode, and half of it never."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import hici
from golden_checkpoint import CASES, CHECKPOINT, EXPECTED, IDS, MODES, NEEDED, TOLERANCE
from helpers import difference, logits
from hici.adapters.expected import released_tensors
from hici.adapters.hub import context_of_name
from hici.models.attach import hici_state_dict
from hici.models.lookup import is_attached
from hici.presets import load_preset

FILES = ("adapter_config.json", "adapter_model.bin", "trainable_params.bin")


def set_mode(model, mode):
    if mode == "full":
        model.set_attn_implementation("sdpa")
        return
    visibility, use_global, use_local = MODES[mode]
    model.set_attn_implementation("hici")
    hici.reconfigure(model, visibility=visibility, use_global=use_global, use_local=use_local)


def load_bin(file):
    return torch.load(file, weights_only=True)


def edit_bin(file, change):
    tensors = load_bin(file)
    change(tensors)
    torch.save(tensors, file)


def refuse(released, match, **changes):
    with pytest.raises(ValueError, match=match):
        hici.from_pretrained(released.adapter, **released.needed(**changes))


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case):
    variant, mode = case.split("/")
    model = hici.from_pretrained(CHECKPOINT / variant, attention="hici", **NEEDED)
    set_mode(model, mode)
    assert difference(logits(model, IDS), EXPECTED[f"{case}/logits"]) < TOLERANCE
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_tensor_of_both_files_is_in_the_model(released):
    model = hici.from_pretrained(released.adapter, **released.needed())
    state = model.state_dict()
    for name, tensor in load_bin(released.adapter / "adapter_model.bin").items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor), name
    own = hici_state_dict(model)
    for name, tensor in load_bin(released.adapter / "trainable_params.bin").items():
        found = own.get(name)
        if found is None:
            module, _, last = f"base_model.model.{name}".rpartition(".")
            found = state[f"{module}.modules_to_save.default.{last}"]
        assert torch.equal(found, tensor), name
    assert len(own) == 36


def test_rope_and_vocabulary(released):
    model = hici.from_pretrained(released.adapter, **released.needed())
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert model.config.max_position_embeddings == 64
    assert model.config.vocab_size == 98
    head = model.get_output_embeddings().weight
    assert head.shape == (98, 64)
    assert torch.equal(head[97], head[:97].mean(0))


def test_the_loaded_model_is_saved_and_read_back(released, tmp_path):
    model = hici.from_pretrained(released.adapter, attention="hici", **released.needed())
    expected = logits(model, IDS)
    hici.save_pretrained(model, tmp_path / "ours")
    again = hici.from_pretrained(tmp_path / "ours", attention="hici")
    assert difference(logits(again, IDS), expected) == 0
    assert again.config.vocab_size == 98


def test_it_trains_on(released):
    model = hici.from_pretrained(released.adapter, attention="hici", **released.needed())
    names = ("lora_", "modules_to_save", "local_constructor", "global_integrator")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_loaded_base_is_used_in_place(released):
    base = AutoModelForCausalLM.from_pretrained(released.base)
    model = hici.from_pretrained(released.adapter, **released.needed(base_model=base))
    assert model.get_base_model() is base
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE


def test_safetensors_in_place_of_the_adapters_pickle(released):
    tensors = load_bin(released.adapter / "adapter_model.bin")
    save_file(tensors, released.adapter / "adapter_model.safetensors")
    hici.from_pretrained(released.adapter, **released.needed())  # both, and alike
    (released.adapter / "adapter_model.bin").unlink()
    model = hici.from_pretrained(released.adapter, **released.needed())
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE
    name = next(iter(tensors))
    torch.save({**tensors, name: tensors[name] + 1}, released.adapter / "adapter_model.bin")
    refuse(released, "adapter_model.bin and adapter_model.safetensors, and they differ")


# what the files don't say


def test_the_context_must_be_known(released, tmp_path):
    refuse(released, "does not tell the context.*-16k.*context_length", context_length=None)
    refuse(released, "a context of 15 is shorter than the 16 positions", context_length=15)
    named = shutil.copytree(released.adapter, tmp_path / "Tiny-HiCI-1k")
    model = hici.from_pretrained(named, **released.needed(context_length=None))
    assert model.config.max_position_embeddings == 1024
    assert model.config.rope_parameters["factor"] == 64.0


@pytest.mark.parametrize(
    "name, context",
    [
        ("ZengXiangyu/Llama-2-7b-HiCI-16k", 16384),
        ("/models/Llama-2-7b-HiCI-100K/", 102400),
        ("Llama-2-7b-hici-8k-sft", 8192),
        ("/hub/models--ZengXiangyu--Llama-2-7b-HiCI-32k/snapshots/0123abc", 32768),
        ("Llama-2-7b-8k-to-16k", 16384),  # the end counts
        ("Llama-2-7b-longlora-100k-ft", 102400),
        ("Phi-3-mini-4k-HiCI-16k", 16384),
        ("Phi-3-mini-4k-instruct-HiCI", None),  # the base's own
        ("HiCI-checkpoint-2k-steps", None),
        ("Llama-2-7b", None),
        ("model16k", None),
    ],
)
def test_context_of_a_name(name, context):
    assert context_of_name(name) == context


def test_a_factor_that_is_no_whole_number_is_rounded_up(released):
    model = hici.from_pretrained(released.adapter, **released.needed(context_length=50))
    assert model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == 50


def test_a_rope_that_was_set_by_hand_is_not_scaled_twice(released):
    config = AutoConfig.from_pretrained(released.base)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    base = AutoModelForCausalLM.from_pretrained(released.base, config=config)
    model = hici.from_pretrained(released.adapter, **released.needed(base_model=base))
    assert model.config.rope_parameters["factor"] == 4.0
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE


def test_heads_are_said_to_be_the_published_eight(released, caplog):
    with caplog.at_level(logging.WARNING, logger="hici"):
        model = hici.from_pretrained(released.adapter, attention="hici", **released.needed(config=None))
    assert "8 is taken, as published" in caplog.text
    assert model.config.hici["num_heads"] == 8
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/none/logits"]) > 0.1


def test_config_as_an_object_and_against_the_tensors(released):
    given = hici.HiCIConfig(num_heads=4, visibility="past", segment_size=16)
    model = hici.from_pretrained(released.adapter, attention="hici", **released.needed(config=given))
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/causal_shift/logits"]) < TOLERANCE
    refuse(released, "bottleneck_dim=64, but the tensors of .* have 32", config={"num_heads": 4, "bottleneck_dim": 64})
    refuse(released, "unknown HiCIConfig field 'num_head'.*Did you mean 'num_heads'", config={"num_head": 4})
    refuse(released, "is no HiCIConfig and no dict", config="past")


# half a checkpoint


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(released, file):
    (released.adapter / file).unlink()
    refuse(released, rf"lacks .*{file}")


def all_tensors():
    for file in FILES[1:]:
        for name in load_bin(CHECKPOINT / "peft_fp32" / file):
            yield file, name


@pytest.mark.parametrize("file, name", all_tensors(), ids=lambda x: str(x).removeprefix("base_model.model."))
def test_a_missing_tensor_is_named(released, file, name):
    edit_bin(released.adapter / file, lambda tensors: tensors.pop(name))
    base = AutoModelForCausalLM.from_pretrained(released.base)
    named = name.removeprefix("base_model.model.").replace(".", r"\.")
    refuse(released, named, base_model=base)
    assert not is_attached(base)


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.strange.weight", "model.layers.0.self_attn.v.lora_A.weight",
                                  "model.layers.0.self_attn.local_constructor.gate"])  # fmt: skip
def test_a_tensor_too_many_is_named(released, file, name):
    edit_bin(released.adapter / file, lambda tensors: tensors.update({name: torch.zeros(8, 64)}))
    refuse(released, "left over: model.layers.0.self_attn")


def test_a_weight_that_was_trained_besides_is_loaded_too(released):
    weight = torch.randn(128, 64)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_bin(released.adapter / "trainable_params.bin", lambda tensors: tensors.update({name: weight}))
    model = hici.from_pretrained(released.adapter, **released.needed())
    found = model.get_base_model().model.layers[1].mlp.up_proj.modules_to_save["default"].weight
    assert torch.equal(found, weight)


# another base than it was made on


def other_base(released, tmp_path, **changes):
    config = AutoConfig.from_pretrained(released.base)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"hidden_size": 128, "head_dim": 32}, "an adapter for hidden size 64, but the base .* has 128"),
        ({"num_hidden_layers": 3}, "an adapter for 2 layers, but the base .* has 3"),
        ({"num_hidden_layers": 1}, "an adapter for 2 layers, but the base .* has 1"),
        ({"vocab_size": 120}, "a vocabulary of 98 entries, but the base .* has 120"),
        ({"num_key_value_heads": 4}, "an adapter for 2 key/value heads of 16 .*, but the base .* has 4"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_wrong_base_is_refused_for_what_is_wrong(released, tmp_path, changes, match):
    refuse(released, match, base_model=other_base(released, tmp_path, **changes))


def test_an_adapter_of_another_architecture(released, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=128, max_position_embeddings=16)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    refuse(released, "an adapter of another architecture: model.* is no module of", base_model=tmp_path / "neox")


def test_another_rank_than_the_config_says(released):
    file = released.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))
    refuse(released, "says r=4, but .*lora_A.* in adapter_model.bin has rank 8")


def test_no_base_is_known(released):
    file = released.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    refuse(released, "does not record the name of its base model; give base_model=", base_model=None)


def test_a_base_that_is_not_there(released):
    refuse(released, "the base model 'base' of .* could not be loaded.*give base_model=", base_model=None)


# LongLoRA: the same files without HiCI modules


@pytest.fixture
def longlora(released):
    edit_bin(released.adapter / "adapter_model.bin", _without_modules)
    edit_bin(released.adapter / "trainable_params.bin", _without_modules)
    return released


def _without_modules(tensors):
    for name in [n for n in tensors if "local_constructor" in n or "global_integrator" in n]:
        del tensors[name]


def test_longlora_is_the_full_attention_model(longlora):
    model = hici.from_pretrained(longlora.adapter, **longlora.needed(config=None))
    assert not is_attached(model)
    assert difference(logits(model, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE
    refuse(longlora, "attention 'hici', but .* holds no HiCI modules", attention="hici", config=None)
    refuse(longlora, "config is given, but .* holds no HiCI modules")


# full size


@pytest.mark.parametrize(
    "preset, kv_rows, vocabulary, lora, hici_count",
    [
        # golden README, section 5: (262,144 + 180,224) x 32 of LoRA, 27.0 MiB in bfloat16; about 2 GB in float32
        ("llama-2-7b", 4096, 32001, (262_144 + 180_224) * 32, 389_128_224),
        # by hand: q, k, v, o are 8 (5120 + 5120) each; in HiCI 4 x 8 (5120 + 512) and 4 x 8 (512 + 512)
        ("llama-2-13b", 5120, 32001, (327_680 + 212_992) * 40, 596_838_440),
        # k and v are 8 (4096 + 1024) here
        ("llama-3-8b", 1024, 128257, (212_992 + 180_224) * 32, 389_128_224),
        ("qwen3-8b", 1024, 151936, (212_992 + 180_224) * 36, 12_160_257 * 36),
    ],
)
def test_names_and_shapes_at_full_size(preset, kv_rows, vocabulary, lora, hici_count):
    config = AutoConfig.for_model(**load_preset(preset))
    files = released_tensors(config, new_tokens=vocabulary - config.vocab_size)
    adapter, rest = files["adapter_model.bin"], files["trainable_params.bin"]
    layers, width = config.num_hidden_layers, config.hidden_size
    norms = 2 + 2 * (config.model_type == "qwen3")
    assert len(adapter) == 24 * layers
    assert len(rest) == (18 + norms) * layers + 2
    assert all(name.startswith("base_model.model.model.layers.") for name in adapter)
    assert not any(name.startswith("base_model") or "lora" in name or "lm_head" in name for name in rest)
    first = "base_model.model.model.layers.0.self_attn"
    assert adapter[f"{first}.k_proj.lora_B.weight"].shape == (kv_rows, 8)
    assert adapter[f"{first}.local_constructor.o_proj.lora_B.weight"].shape == (width, 8)
    assert adapter[f"{first}.global_integrator.q_proj.lora_A.weight"].shape == (8, 512)
    assert rest["model.embed_tokens.weight"].shape == (vocabulary, width)
    assert rest["model.layers.0.self_attn.local_constructor.memory_slots"].shape == (8, width)
    assert rest["model.layers.0.self_attn.global_integrator.expand_scale_param"].shape == ()
    assert rest["model.layers.0.self_attn.global_integrator.shared_compressor.0.weight"].shape == (128, width)
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    norm_count = (2 * width + (2 * head_dim if config.model_type == "qwen3" else 0)) * layers + width
    assert sum(tensor.numel() for tensor in adapter.values()) == lora
    hici = sum(t.numel() for n, t in rest.items() if "local_constructor" in n or "global_integrator" in n)
    assert hici == hici_count
    assert sum(tensor.numel() for tensor in rest.values()) == hici_count + vocabulary * width + norm_count


def test_the_golden_names_are_the_expected_ones():
    keys = json.loads((CHECKPOINT / "keys.json").read_text())
    config = AutoConfig.from_pretrained(CHECKPOINT / "base")
    small = hici.HiCIConfig(num_heads=4, bottleneck_dim=32, compress_dim=16)
    for file, tensors in released_tensors(config, small).items():
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == keys[file]


def test_plain_peft_on_an_unresized_base_drops_most_of_it(released):
    """Why hici loads these itself: no error, and 32 of 48 adapter tensors and all of trainable_params left out."""
    import peft

    base = AutoModelForCausalLM.from_pretrained(released.base)
    before = base.get_input_embeddings().weight.clone()
    model = peft.PeftModel.from_pretrained(base, str(released.adapter))
    loaded = [name for name in model.state_dict() if "lora_" in name]
    assert len(loaded) == 16
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not any("local_constructor" in name for name in model.state_dict())
