"""`hici info`: the published numbers, directories without their base, refusals; memory against autograd."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

import hici
from helpers import SEGMENT, small_config, tiny_model
from hici import HiCIConfig
from hici.models.attach import attach, hici_state_dict
from hici.presets import preset_names
from hici.report.memory import Shape, bounded_memory, generation_memory
from hici.report.summary import _shape, describe_plan, segment_plan

# public parameter counts of the architectures
BASE = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini-4k": 3_821_079_552,
    "pythia-1.4b": 1_414_647_808,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


def test_llama_2_7b_prints_the_published_numbers(hici_command):
    done = hici_command("info", "--preset", "llama-2-7b", "--context", 16384)
    assert done.status == 0, done.err
    for text in ("389,128,224", "12,160,257", "4 segments of 4,096", "5.46 %", "visibility all", "not causal"):
        assert text in done.out


@pytest.mark.parametrize("preset", sorted(BASE))
def test_presets_have_the_public_parameter_counts(preset, hici_command):
    facts = json.loads(hici_command("info", "--preset", preset, "--json").out)
    assert facts["base_parameters"] == BASE[preset]
    assert facts["hici_parameters"] == facts["layers"] * facts["hici_parameters_per_layer"]
    assert sum(facts["modules"].values()) == facts["hici_parameters_per_layer"]
    assert facts["provenance"]["packages"]["torch"]


def test_the_list_of_presets_is_complete():
    assert preset_names() == sorted(BASE)


def test_config_flags(hici_command):
    flags = ["--num-local-slots", 4, "--compress-dim", "none", "--segment-size", 1000, "--visibility", "past"]
    facts = json.loads(hici_command("info", "--preset", "smollm2-135m", "--context", 2500, "--json", *flags).out)
    assert facts["hici"]["compress_dim"] is None
    assert (facts["hici"]["num_local_slots"], facts["visibility"]) == (4, "past")
    assert facts["segments"] == [[2, 1000], [1, 500]]


@pytest.mark.parametrize(
    "context, config, text",
    [
        (16384, HiCIConfig(), "4 segments of 4,096 tokens"),
        (10000, HiCIConfig(segment_size=4096), "2 segments of 4,096 tokens and a last one of 1,808"),
        (100, HiCIConfig(segment_size=4096), "1 segment of 100 tokens"),
        (4097, HiCIConfig(num_segments=4), "3 segments of 1,025 tokens and a last one of 1,022"),
    ],
)
def test_segment_plan(context, config, text):
    plan = segment_plan(context, config)
    assert sum(count * size for count, size in plan) == context
    assert describe_plan(plan) == text


def test_a_plain_directory(base_directory, hici_command):
    facts = json.loads(hici_command("info", base_directory, "--bottleneck-dim", 64, "--json").out)
    assert (facts["model_type"], facts["layers"], facts["context"]) == ("llama", 2, 128)


def test_the_home_directory_in_paths(base_directory, adapter_directory, monkeypatch, hici_command):
    monkeypatch.setenv("HOME", str(base_directory.parent))
    name = f"~/{base_directory.name}"
    assert json.loads(hici_command("info", name, "--json").out)["model_type"] == "llama"
    facts = json.loads(hici_command("info", adapter_directory, "--base-model", name, "--json").out)
    assert "base_not_read" not in facts


def test_an_adapter_directory(adapter_directory, hici_command):
    done = hici_command("info", adapter_directory)
    assert done.status == 0, done.err
    facts = json.loads(hici_command("info", adapter_directory, "--json").out)
    in_file = facts["directory"]["parameters"]
    assert in_file["HiCI modules"] == facts["hici_parameters"] > 0
    assert in_file["LoRA, embeddings, norms"] > 0
    assert (facts["visibility"], facts["segments"]) == ("past", [[8, 16]])
    assert f"{facts['hici_parameters']:,}" in done.out


def test_an_adapter_directory_whose_base_is_gone(adapter_directory, tmp_path, hici_command):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in adapter_directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    record = json.loads((copy / "hici_config.json").read_text())
    (copy / "hici_config.json").write_text(json.dumps({**record, "base_model": str(tmp_path / "gone")}))
    done = hici_command("info", copy)
    assert done.status == 0, done.err
    assert "8 segments of 16" in done.out
    assert "No counts for the base" in done.out
    assert "parameters in file: HiCI modules" in done.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "lama-2-7b"], "unknown preset 'lama-2-7b'; known: gemma-3-1b, llama-2-13b, llama-2-7b"),
        (["--preset", "lama-2-7b"], "Did you mean 'llama-2-7b'?"),
        ([], "give one of MODEL and --preset"),
        (["x", "--preset", "llama-2-7b"], "give one of MODEL and --preset"),
        (["/no/such/place"], "/no/such/place does not exist"),
        (["--preset", "llama-2-7b", "--num-segments", 2, "--segment-size", 9], "both given"),
        (["--preset", "llama-2-7b", "--num-heads", 7], "bottleneck_dim=512 is not a multiple of num_heads=7"),
        (["--preset", "llama-2-7b", "--no-slots", "--visibility", "past"], "no slot to see"),
        (["--preset", "llama-2-7b", "--base-model", "x"], "for an adapter only"),
    ],
    ids=str,
)
def test_refusals(arguments, message, hici_command):
    done = hici_command("info", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_refusals_of_directories(adapter_directory, base_directory, tmp_path, hici_command):
    assert "would need other modules" in hici_command("info", adapter_directory, "--num-heads", 2).err
    assert "holds no model" in hici_command("info", tmp_path).err
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "lacks adapter_model.bin and trainable_params.bin" in hici_command("info", tmp_path).err
    assert "is a file" in hici_command("info", base_directory / "config.json").err


def test_generation_memory_by_hand():
    shape = Shape(layers=2, width=8, mlp_width=16, heads=2, kv_heads=1, head_dim=4, vocabulary=10, local_scores=6,
                  parameters=1000, held_in_training=1100, trained=300, head_trains=True)  # fmt: skip
    generation = generation_memory(shape, 5, batch=3, number_bytes=2)
    assert (generation["weights"], generation["KV cache"]) == (2000, 2 * 15 * 2 * 1 * 4 * 2)
    plain = replace(shape, gated_mlp=False, window=3, window_layers=1)
    assert generation_memory(plain, 5, batch=3)["KV cache"] == 2 * 3 * (5 + 3) * 1 * 4 * 2


def test_flags_of_training(hici_command):
    arguments = ["info", "--preset", "smollm2-135m", "--context", 65536]
    plain = json.loads(hici_command(*arguments, "--json").out)
    flags = ["--method", "full", "--mlp-tile", 2048, "--optimizer", "adamw_8bit", "--quantization", "4bit",
             "--offload-checkpoints", "--processes", 2]  # fmt: skip
    facts = json.loads(hici_command(*arguments, *flags, "--json").out)
    assert facts["trained_as"] == {
        "method": "full", "gradient_checkpointing": True, "offload_checkpoints": True, "mlp_tile": 2048,
        "optimizer": "adamw_8bit", "quantization": "4bit", "processes": 2,
    }  # fmt: skip
    # without HiCI modules
    assert plain["trained_parameters"] - facts["trained_parameters"] == plain["hici_parameters"]
    assert facts["training"]["checkpoints"] * 10 == plain["training"]["checkpoints"] == facts["offloaded"]
    assert facts["training"]["checkpoints"] == 3 * 65536 * 576 * 4
    assert facts["training"]["gradients"] == 4 * facts["trained_parameters"] // 2
    shown = " ".join(hici_command(*arguments, *flags).out.split())
    assert (
        "trained parameters (LoRA, embeddings, norms), attention full, every layer checkpointed, checkpoints in the "
        "CPU's memory (4.22 GiB there), MLPs in tiles of 2,048 tokens, adamw_8bit, base in 4 bits, on each of 2 "
        "processes that share the parameters."
    ) in shown
    assert "activations" in hici_command(*arguments, "--no-checkpointing").out
    message = "offload_checkpoints without gradient_checkpointing: there are no checkpoints to move; turn it on"
    assert message in hici_command(*arguments, "--no-checkpointing", "--offload-checkpoints").err


@pytest.mark.parametrize(
    "preset, window, rope",
    [
        ("llama-3.1-8b", None, "131,072 positions; 262,144 needs llama3 scaling by 16"),
        ("pythia-1.4b", None, "2,048 positions; 262,144 needs linear scaling by 128"),
        ("phi-3-mini-4k", 2047, "4,096 positions; 262,144 needs linear scaling by 64"),
        ("gemma-3-1b", 512, "32,768 positions; 262,144 needs linear scaling by 8"),
    ],
)
def test_rope_and_windows_of_presets(preset, window, rope, hici_command):
    arguments = ("info", "--preset", preset, "--context", 262144)
    facts = json.loads(hici_command(*arguments, "--json").out)
    assert (facts["sliding_window"], facts["rope"]) == (window, rope)
    assert ("segments must not be longer" in hici_command(*arguments).out) == (window is not None)
    if preset == "gemma-3-1b":
        assert facts["generation"]["KV cache"] == 2 * (4 * 262144 + 22 * 512) * 256 * 2


def test_counts_are_those_of_real_modules(base_directory, hici_command):
    model = attach(LlamaForCausalLM.from_pretrained(base_directory), HiCIConfig(bottleneck_dim=64))
    facts = json.loads(hici_command("info", base_directory, "--bottleneck-dim", 64, "--json").out)
    assert facts["hici_parameters"] == sum(tensor.numel() for tensor in hici_state_dict(model).values())


@pytest.mark.parametrize("tokens", [5, 8, 29])
@pytest.mark.parametrize("options", [{}, {"use_global": False, "use_local": False}, {"use_global": False}], ids=str)
def test_bounded_memory_is_that_of_a_real_cache(tokens, options):
    config = small_config(visibility="past", **options)
    model = attach(tiny_model(), config)
    cache = hici.HiCICache(model)
    with torch.no_grad():
        for _ in range(tokens + SEGMENT - 1):  # the unfinished segment was at its longest but one
            model(torch.zeros(3, 1, dtype=torch.long), past_key_values=cache)
    shape = _shape(model.config, config, 0, held=0, trained=0)
    estimate = bounded_memory(shape, tokens + SEGMENT - 1, SEGMENT, batch=3, number_bytes=4)["HiCICache"]
    assert estimate == cache.nbytes


def test_bounded_memory_is_shown_where_it_can_be_had(hici_command):
    arguments = ["info", "--preset", "llama-2-7b", "--context", 102400]
    bounded = [*arguments, "--visibility", "past", "--segment-size", 4096]
    facts = json.loads(hici_command(*bounded, "--json").out)
    assert facts["generation"]["KV cache"] / facts["bounded"]["HiCICache"] > 24.5
    assert "a HiCICache, segment by segment" in hici_command(*bounded).out
    assert json.loads(hici_command(*arguments, "--json").out)["bounded"] is None
    assert "HiCICache" not in hici_command(*arguments).out
