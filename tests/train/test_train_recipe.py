"""Recipes: YAML, overrides, types, and errors that name the key."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_recipes_of_the_repository_are_valid(path):
    recipe = load_recipe(path)
    known = {field.name for field in dataclasses.fields(Recipe)}
    assert set(yaml.safe_load(path.read_text())) <= known
    assert recipe.context_length >= 4096


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
