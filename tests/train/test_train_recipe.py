"""Recipes: YAML, overrides, types, and errors that name the key."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig

from hici.data.sources import resolve
from hici.presets import load_preset
from hici.rope import extended_rope
from hici.train.recipe import Recipe, load_recipe, recipe_from_dict

MINIMAL = {"model": "m", "data": ["d"], "output_dir": "o", "context_length": 8}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "hici": {"visibility": "all", "segment_size": 4}}))
    return path


def test_defaults_are_the_published_ones():
    recipe = recipe_from_dict(MINIMAL)
    assert (recipe.learning_rate, recipe.hici_learning_rate, recipe.hici_max_grad_norm) == (2e-5, 2e-4, 0.3)
    assert (recipe.warmup_steps, recipe.max_steps, recipe.lora_r, recipe.lora_alpha) == (20, 1000, 8, 16)
    assert recipe.rope == "auto"


def test_overrides(recipe_file):
    recipe = load_recipe(
        recipe_file,
        ["--max-steps", "5", "--learning_rate=1e-3", "--hici.visibility", "past", "--data", "[a.txt, b.txt]",
         "--overwrite", "true", "--heldout_data", "c.txt"],
    )  # fmt: skip
    assert (recipe.max_steps, recipe.learning_rate, recipe.overwrite) == (5, 1e-3, True)
    assert (recipe.data, recipe.heldout_data) == (["a.txt", "b.txt"], ["c.txt"])
    assert recipe.hici == {"visibility": "past", "segment_size": 4}
    assert recipe.hici_config().visibility == "past"


def test_a_recipe_is_yaml_again():
    recipe = recipe_from_dict(MINIMAL)
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
PUBLISHED = {  # file: (base, context, rope factor)
    "llama2-7b-8k": ("meta-llama/Llama-2-7b-hf", 8192, 2),
    "llama2-7b-16k": ("meta-llama/Llama-2-7b-hf", 16384, 4),
    "llama2-7b-32k": ("meta-llama/Llama-2-7b-hf", 32768, 8),
    "llama2-7b-100k": ("meta-llama/Llama-2-7b-hf", 102400, 25),
    "llama2-13b-16k": ("meta-llama/Llama-2-13b-hf", 16384, 4),
    "llama2-13b-64k": ("meta-llama/Llama-2-13b-hf", 65536, 16),
    "llama3-8b-32k": ("meta-llama/Meta-Llama-3-8B", 32768, 4),
    "qwen3-8b-48k": ("Qwen/Qwen3-8B", 49152, 1.2),
}
PRESETS = {"llama2-7b": "llama-2-7b", "llama2-13b": "llama-2-13b", "llama3-8b": "llama-3-8b", "qwen3-8b": "qwen3-8b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_of_the_repository_are_valid(path):
    text = path.read_text()
    recipe = load_recipe(path)
    known = {field.name for field in dataclasses.fields(Recipe)}
    assert set(yaml.safe_load(text)) <= known
    assert recipe.context_length >= 4096
    assert recipe.output_dir == f"runs/{path.stem}"  # no two recipes write to one place
    assert (recipe.lora_r, recipe.lora_alpha, recipe.warmup_steps, recipe.schedule) == (8, 16, 20, "constant")
    assert (recipe.learning_rate, recipe.hici_learning_rate, recipe.hici_max_grad_norm) == (2e-5, 2e-4, 0.3)
    commands = re.findall(r"^#   .*(hici train (?:recipes/)?\S+.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 2  # one process and several
    for command in commands:
        words = command.replace("...", "x").split()[2:]
        assert words[0] == f"recipes/{path.name}"
        values = [word.strip("'") for word in words[1:]]
        load_recipe(path, values)
    for key in re.findall(r"^# *([a-z_]+): ", text, flags=re.MULTILINE):  # keys that are proposed in comments
        assert key in known, key


def test_every_published_size_has_its_recipe_and_no_other_file_is_there():
    small = {"smollm2-8k", "smollm2-16k", "smollm2-8k-from-2k"}
    assert {path.stem for path in RECIPES} == {*PUBLISHED, *small, "llama2-7b-16k-sft"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyperparameters(name):
    base, context, factor = PUBLISHED[name]
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert (recipe.model, recipe.context_length, recipe.rope) == (base, context, "linear")
    assert recipe.max_steps == 1000
    assert 8 * recipe.batch_size * recipe.gradient_accumulation_steps == 64  # on 8 GPUs
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.weight_decay) == (0.9, 0.95, 0.0)
    assert (recipe.train_embeddings, recipe.train_norms, recipe.lora_dropout) == (True, True, 0.0)
    assert (recipe.dtype, recipe.device, recipe.gradient_checkpointing) == ("bfloat16", "cuda", True)
    config = recipe.hici_config()
    assert (config.num_segments, config.visibility, config.num_local_slots, config.num_global_slots) == (4, "all", 8, 4)
    assert (config.num_heads, config.bottleneck_dim, config.compress_dim) == (8, 512, 128)
    preset = AutoConfig.for_model(**load_preset(PRESETS[name.rpartition("-")[0]]))
    assert extended_rope(preset, context, recipe.rope)["factor"] == pytest.approx(factor)
    assert f"factor {factor} =" in (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert context % 4 == 0  # whole segments
    long = context > 60000
    assert (recipe.offload_checkpoints, recipe.mlp_tile) == ((True, 4096) if long else (False, None))


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_that_was_not_set_is_named(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    with pytest.raises(ValueError, match="SET-ME/long-documents.jsonl"):
        resolve(recipe.data)


def test_the_instruction_recipe():
    recipe = load_recipe(ROOT / "recipes" / "llama2-7b-16k-sft.yaml")
    assert (recipe.data_format, recipe.prompt, recipe.packing, recipe.data) == (
        "instruction", "llama2", "document", ["LongAlpaca-12k.json"])  # fmt: skip
    assert recipe.hici_config().segment_size == 4096


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_launch_configs_are_accelerates(name):
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 8
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type.value == kinds.get(name, "DEEPSPEED")
    assert config.mixed_precision == "no"  # the recipe decides
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section) <= set(known), "accelerate launch takes a key that it does not know without a word"
    if name == "fsdp2":
        assert (config.fsdp_config["fsdp_version"], config.fsdp_config["fsdp_reshard_after_forward"]) == (2, True)
        assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        assert config.deepspeed_config["gradient_accumulation_steps"] == "auto"  # a number would overrule the recipe


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learnig_rate": 1.0}, "unknown recipe key 'learnig_rate'.*Did you mean 'learning_rate'"),
        ({"hici": {"visibilty": "past"}}, "unknown HiCIConfig field 'visibilty'.*Did you mean 'visibility'"),
        ({"hici": {"num_segments": 2, "segment_size": 4}}, "num_segments=2 and segment_size=4 are both given"),
        ({"max_steps": "many"}, "max_steps='many' is str, but int is needed"),
        ({"max_steps": 1.5}, "max_steps=1.5 is float, but int is needed"),
        ({"max_steps": True}, "max_steps=True is bool, but int is needed"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is str, but float is needed"),
        ({"overwrite": "yes please"}, "overwrite='yes please' is str, but bool is needed"),
        ({"hici": "past"}, "hici='past' is str, but dict is needed"),
        ({"max_steps": 0}, "max_steps=0 is no finite number >= 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is no finite number >= 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is no finite number >= 0"),
        ({"hici_learning_rate": float("inf")}, "hici_learning_rate=inf is no finite number >= 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan is no finite"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is no finite number >= 0"),
        ({"context_length": 1}, "context_length=1 is no finite number >= 2"),
        ({"lora_alpha": 0}, "lora_alpha=0 is no finite number >= 1"),
        ({"lora_r": 0}, "lora_r=0 is no finite number >= 1"),
        ({"logging_steps": 0}, "logging_steps=0 is no finite number >= 1"),
        ({"heldout_fraction": float("nan")}, r"heldout_fraction=nan is not in \[0, 1\)"),
        ({"adam_beta1": float("nan")}, r"adam_beta1=nan is not in \[0, 1\)"),
        ({"adam_beta1": -0.1}, r"adam_beta1=-0.1 is not in \[0, 1\)"),
        ({"lora_dropout": 5.0}, r"lora_dropout=5.0 is not in \[0, 1\)"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0 is not in \[0, 1\)"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan would stop all learning"),
        ({"hici_max_grad_norm": float("nan")}, "hici_max_grad_norm=nan would stop all learning"),
        ({"hici_max_grad_norm": 0.0}, "hici_max_grad_norm=0.0 would stop all learning"),
        ({"rope": "liner"}, "unknown rope 'liner'.*Did you mean 'linear'"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"context_length": None}, "context_length=None is NoneType"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({**MINIMAL, **change})


def test_missing_keys_and_files_are_named(tmp_path, recipe_file):
    with pytest.raises(ValueError, match="lacks data, output_dir, context_length.*--data"):
        recipe_from_dict({"model": "m"})
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="holds list, but a recipe is keys and values"):
        load_recipe(tmp_path / "list.yaml")
    for words, message in (
        (["--max_steps"], "--max_steps has no value"),
        (["max_steps", "3"], "'max_steps' is not an override"),
        (["--maxsteps", "3"], "unknown recipe key 'maxsteps'.*Did you mean 'max_steps'"),
        (["--model.x", "3"], "'model' is not a section"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(recipe_file, words)


@pytest.mark.parametrize("value", ["[a", "2024-99-99"])
def test_a_malformed_override_is_named_in_one_line(recipe_file, value):
    with pytest.raises(ValueError, match=rf"^--data {re.escape(value)} is not valid YAML \(.*\); quote the value$"):
        load_recipe(recipe_file, ["--data", value])


@pytest.mark.parametrize("content", [b"a: [", b"a: 2024-99-99", b"model: \xff"], ids=["open", "date", "not utf-8"])
def test_a_malformed_recipe_is_named_in_one_line(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"^recipe .*bad\.yaml is not valid YAML \(.*\); correct it$"):
        load_recipe(tmp_path / "bad.yaml")


def test_the_home_directory_in_the_recipes_path(recipe_file, monkeypatch):
    monkeypatch.setenv("HOME", str(recipe_file.parent))
    assert load_recipe("~/recipe.yaml") == load_recipe(recipe_file)
