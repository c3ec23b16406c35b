"""The plan of a recipe: counts, segments, work, memory, disk, and what stands against it."""

import json
import shutil
from collections import namedtuple

import pytest
import torch

from hici.adapters.lora import trainable_parameters
from hici.report.plan import print_plan
from hici.report.summary import summarise
from hici.train import dry_run as module
from hici.train.dry_run import dry_run
from hici.train.recipe import recipe_from_dict
from hici.train.run import train
from hici.train.setup import load_base, prepare_model

LLAMA = {
    "model": "meta-llama/Llama-2-7b-hf",
    "data": ["hub:somebody/books"],
    "output_dir": "runs/none",
    "context_length": 16384,
    "device": "cpu",
}


@pytest.fixture
def offline(monkeypatch):
    def no_config(name):
        raise ValueError(f"no config of {name!r} (no network); give a directory")

    monkeypatch.setattr(module, "load_config", no_config)


def problem(plan, text):
    """The one problem with that text."""
    found = [problem for problem in plan["problems"] if text in problem]
    assert len(found) == 1, plan["problems"]
    return found[0]


def test_llama_2_7b_as_published(offline):
    """The public counts, from the preset of the name, since the hub cannot be reached."""
    plan = dry_run(recipe_from_dict(LLAMA))
    assert plan["trained_parameters"] == {
        "HiCI modules": 389_128_224,
        "LoRA": 8 * 2 * 4096 * 4 * 32,
        "embeddings": 32000 * 4096,
        "norms": (2 * 32 + 1) * 4096,
    }
    assert plan["frozen_parameters"] == 6_738_415_616
    trained = sum(plan["trained_parameters"].values())
    assert plan["bytes_of_weights"] == {"trained": 4 * trained, "frozen": 2 * 6_738_415_616}
    assert plan["segments"] == [[[4, 4096]]]
    assert plan["rope"] == "4,096 positions, extended to 16,384 by linear, factor 4"
    assert plan["work"] == {
        "processes": 1, "steps": 1000, "sequences_per_step": 8, "tokens_per_step": 131072, "sequences": 8000,
        "tokens": 131_072_000, "epochs": None,
    }  # fmt: skip
    assert plan["rates"] == {
        "LoRA, embeddings, norms": {"learning_rate": 2e-5, "clip": 1.0},
        "HiCI modules": {"learning_rate": 2e-4, "clip": 0.3},
    }
    assert plan["disk"]["needed"] == 4 * trained * (1 + 3 * 3)  # an adapter and three checkpoints with two moments
    assert "numbers here are those of the preset llama-2-7b" in problem(plan, "no config of 'meta-llama/Llama-2-7b-hf'")
    assert json.loads(json.dumps(plan)) == plan


def test_the_memory_is_that_of_hici_info(values):
    recipe = recipe_from_dict({**values, "dtype": "bfloat16"})
    model_config = load_base(recipe)[1].config
    expected = summarise(model_config, recipe.hici_config(), context=64, dtype="bfloat16", batch=2)
    assert dry_run(recipe)["memory"] == expected.training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "hici_s2"},
        {"method": "full"},
        {"train_embeddings": False, "lora_r": 2},
        {"train_norms": False, "hici": {"num_heads": 4, "bottleneck_dim": 32, "compress_dim": None}},
    ],
    ids=str,
)
def test_counts_are_those_of_the_model_that_is_trained(values, changes):
    recipe = recipe_from_dict({**values, **changes})
    wrapped = prepare_model(recipe, load_base(recipe)[1])
    hici, others = (sum(p.numel() for p in group) for group in trainable_parameters(wrapped))
    parts = dry_run(recipe)["trained_parameters"]
    assert parts.get("HiCI modules", 0) == hici
    assert (hici > 0) == (recipe.method == "hici")
    assert sum(parts.values()) == hici + others
    assert ("embeddings" in parts, "norms" in parts) == (recipe.train_embeddings, recipe.train_norms)
    frozen = sum(p.numel() for p in wrapped.parameters() if not p.requires_grad)
    assert dry_run(recipe)["frozen_parameters"] == frozen
    assert not any(p.device.type == "meta" for p in wrapped.parameters())


def test_a_run_follows_its_plan(values):
    recipe = recipe_from_dict({**values, "max_steps": 3})
    plan = dry_run(recipe, data_summary={"sequences": 6})
    assert (plan["problems"], plan["work"]["epochs"]) == ([], 2.0)
    assert plan["segments"] == [[[4, 16]]]
    result = train(recipe, progress=False)
    assert len(result["steps"]) == plan["work"]["steps"] == 3
    counts = plan["trained_parameters"]
    others = sum(count for kind, count in counts.items() if kind != "HiCI modules")
    assert result["trainable_parameters"] == {"hici": counts["HiCI modules"], "other": others}
    assert {step["tokens"] for step in result["steps"]} == {plan["work"]["tokens_per_step"]}


def test_nothing_is_read_or_written(values, base, tmp_path, monkeypatch):
    directory = tmp_path / "base"
    directory.mkdir()
    shutil.copy(base / "config.json", directory)  # no weights, no tokenizer
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan = dry_run(recipe_from_dict({**values, "model": str(directory)}))
    assert plan["problems"] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_segments_that_a_step_may_have(values):
    hici = {name: value for name, value in values["hici"].items() if name != "segment_size"}
    plan = dry_run(recipe_from_dict({**values, "hici": hici, "segment_counts": [1, 3]}))
    assert plan["segments"] == [[[1, 64]], [[2, 22], [1, 20]]]
    assert "segments drawn from [1, 3]" in plan["method"]
    assert dry_run(recipe_from_dict({**values, "method": "full"}))["segments"] == []


def test_several_processes_share_a_step(values, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    work = dry_run(recipe_from_dict(values))["work"]
    assert (work["processes"], work["sequences_per_step"], work["tokens_per_step"]) == (8, 32, 2048)


def test_a_cuda_recipe_on_a_machine_without(values, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = dry_run(recipe_from_dict({**values, "device": "cuda"}))
    assert "--device cpu" in problem(plan, "device='cuda', but torch sees no CUDA device here")
    assert plan["devices"] == []


def test_a_step_that_is_larger_than_the_device(offline, monkeypatch):
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: namedtuple("Memory", "total")(8 * 2**30))
    plan = dry_run(recipe_from_dict({**LLAMA, "gradient_accumulation_steps": 1}))
    assert "but the device has 8.0 GiB; shard over several" in problem(plan, "a step needs about")


def test_not_enough_disk(values, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 50, 50))
    plan = dry_run(recipe_from_dict(values))
    assert plan["disk"]["free"] == 50
    assert "make room, lower keep_checkpoints" in problem(plan, "0.0 GB free, but the run writes up to")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope": "none"}, "64 tokens are more than the 32 positions"),
        ({"data": ["nowhere/*.txt"]}, "nowhere/*.txt names no file; give data that is there"),
        ({"heldout_data": ["gone.txt"]}, "gone.txt names no file"),
        ({"warmup_steps": 12}, "warmup_steps=12 is not below max_steps=12"),
    ],
    ids=str,
)
def test_problems_that_are_known_before(values, changes, message):
    plan = dry_run(recipe_from_dict({**values, **changes}))
    assert plan["problems"] == [problem(plan, message)]


def test_a_rope_that_cannot_be_extended(values, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = dry_run(recipe_from_dict({**values, "model": str(tmp_path)}))
    assert plan["problems"] == [problem(plan, "the model's rope is scaled already (dynamic, 32 positions)")]
    assert plan["rope"] == "32 positions"


def test_results_that_are_there_already(values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_text("precious")
    problem(dry_run(recipe_from_dict(values)), "train.json exists, and nothing is overwritten silently")
    problem(dry_run(recipe_from_dict(values), resume=True), "train.json of an earlier run and no checkpoint")
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "hici_config.json").write_text("{}")
    problem(dry_run(recipe_from_dict({**values, "overwrite": True})), "adapter and the other results there will be")
    assert (tmp_path / "run" / "train.json").read_text() == "precious"


@pytest.mark.parametrize(
    "changes, package, message",
    [
        ({"tensorboard": True}, "tensorboard", r"hici[tracking]"),
        ({"quantization": "4bit"}, "bitsandbytes", r"hici[quantization]"),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes", r"hici[quantization]"),
    ],
)
def test_packages_that_are_not_installed(values, changes, package, message, monkeypatch):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name))
    problem(dry_run(recipe_from_dict({**values, **changes})), message)


@pytest.mark.parametrize(
    "changes", [{"mlp_tile": 256}, {"offload_checkpoints": True}, {"optimizer": "adamw_8bit"}, {"quantization": "4bit"},
                {"method": "full"}], ids=str)  # fmt: skip
def test_the_estimate_knows_the_keys_that_save_memory(offline, changes):
    def needed(**more):
        return sum(dry_run(recipe_from_dict({**LLAMA, "context_length": 65536, **more}))["memory"].values())

    assert needed(**changes) < needed() - 2**28


def test_a_model_that_is_not_there(values, tmp_path):
    with pytest.raises(ValueError, match="no config of"):
        dry_run(recipe_from_dict({**values, "model": str(tmp_path / "Llama-2-7b-hf")}))  # a path is no preset
    with pytest.raises(ValueError, match="no config of"):
        dry_run(recipe_from_dict({**values, "model": "./nothing/here"}))


def test_what_is_printed(values, capsys):
    hici = {name: value for name, value in values["hici"].items() if name != "segment_size"}
    changes = {"hici": hici, "segment_counts": [2, 4], "max_grad_norm": "inf", "data": ["gone"], "device": "cpu"}
    print_plan(dry_run(recipe_from_dict({**values, **changes}), data_summary={"sequences": 24}))
    out = capsys.readouterr().out
    for text in (
        "nothing is trained, this is the plan",
        "2 segments of 32 tokens",
        "4 segments of 16 tokens",
        "4 sequences, 256 tokens",
        "12 steps, 48 sequences, 3,072 tokens",
        "passes over the data",
        "2.00",
        "0.002, gradient clip none",
        "0.005, gradient clip 0.3",
        "HiCI modules",
        "optimizer",
        "1 problem",
        "gone names no file",
    ):
        assert text in out, text
    assert "problem" not in print_of(values, capsys)


def print_of(values, capsys):
    print_plan(dry_run(recipe_from_dict(values)))
    return capsys.readouterr().out
