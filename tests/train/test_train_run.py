"""Training end to end on a tiny model and text, and the parts of it."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
from transformers import set_seed

import hici
from helpers import logits, random_ids, small_config, tiny_model
from hici.adapters.lora import trainable_parameters
from hici.cli.main import main
from hici.models.attach import attach
from hici.models.lookup import attention_modules
from hici.report.runs import read_run
from hici.train.checkpoint import CheckpointStore
from hici.train.recipe import recipe_from_dict
from hici.train.rows import prepare_data
from hici.train.run import make_trainer, train
from hici.train.setup import load_base, prepare_model
from hici.train.steps import TrainingDivergedError
from hici.train.trainer import LanguageModel


@pytest.fixture
def parts(values, tmp_path):
    """(recipe, model, data, trainer) of the tiny recipe."""

    def make(**changes):
        recipe = recipe_from_dict({**values, **changes})
        set_seed(recipe.seed)
        tokenizer, model = load_base(recipe)
        data = prepare_data(recipe, tokenizer, model.config.vocab_size)
        model = prepare_model(recipe, model)
        return recipe, model, data, make_trainer(recipe, model, data, str(tmp_path / "scratch"))

    return make


def test_training_lowers_the_heldout_loss_and_saves_what_was_trained(values, tmp_path):
    result = train(recipe_from_dict(values), progress=False)
    before, after = result["heldout_loss"]["before"], result["heldout_loss"]["after"]
    assert after["hici"] < before["hici"] - 0.3
    assert after["full"] < before["full"] - 0.3
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        ".lock", "adapter", "checkpoints", "metrics.jsonl", "train.json", "train.png",
    }  # fmt: skip
    saved = json.loads((run / "train.json").read_text())
    assert saved["visibility"] == "past"
    assert len(saved["steps"]) == 12
    assert {"loss", "learning_rate", "hici_learning_rate", "hici_grad_norm", "other_grad_norm"} <= set(
        saved["steps"][3]
    )
    assert saved["data"]["documents"] + saved["data"]["heldout_documents"] == 20
    model = hici.from_pretrained(run / "adapter", attention="hici")
    assert model.config.max_position_embeddings == 64
    assert model.config.rope_parameters["factor"] == 2.0
    windows = prepare_data(recipe_from_dict(values), *_tokenizer_and_size(values)).heldout
    with torch.no_grad():
        losses = [float(LanguageModel(model)(row["input_ids"][None])["loss"]) for row in windows]
    assert np.mean(losses) == pytest.approx(after["hici"], abs=1e-4)


def _tokenizer_and_size(values):
    tokenizer, model = load_base(recipe_from_dict(values))
    return tokenizer, model.config.vocab_size


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi3", "gemma2"])
def test_another_architecture_trains(architecture, values, tokenizer, tmp_path):
    base = tmp_path / "base"
    tied = architecture == "gemma2"
    tiny_model(architecture, tie_word_embeddings=tied, max_position_embeddings=32, vocab_size=len(tokenizer)
               ).save_pretrained(base)  # fmt: skip
    tokenizer.save_pretrained(base)
    result = train(recipe_from_dict({**values, "model": str(base), "dtype": "bfloat16"}), progress=False)
    before, after = result["heldout_loss"]["before"], result["heldout_loss"]["after"]
    assert after["hici"] < before["hici"] - 0.3
    assert after["full"] < before["full"] - 0.3
    model = hici.from_pretrained(tmp_path / "run" / "adapter", attention="hici", dtype=torch.float32)
    assert model.config.max_position_embeddings == 64


def test_the_same_seed_gives_the_same_run(values):
    first = train(recipe_from_dict(values), progress=False)
    again = train(recipe_from_dict({**values, "overwrite": True}), progress=False)
    other = train(recipe_from_dict({**values, "overwrite": True, "seed": 1}), progress=False)
    losses = [[step["loss"] for step in result["steps"]] for result in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]


def test_an_existing_adapter_is_refused_before_any_work(values, tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty.*--overwrite true"):
        train(recipe_from_dict({**values, "model": "does/not/exist"}), progress=False)
    assert (tmp_path / "run" / "adapter" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["train.json", "train.png"])
def test_results_of_another_run_are_refused_before_any_work(values, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    with pytest.raises(ValueError, match=f"{name} exists.*another output_dir or --overwrite true"):
        train(recipe_from_dict({**values, "model": "does/not/exist"}), progress=False)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(values, tmp_path):
    (tmp_path / "file").write_text("a file")
    output = {"output_dir": str(tmp_path / "file" / "run"), "model": "does/not/exist"}
    with pytest.raises(ValueError, match="nothing can be written in .*file is a file; give another place"):
        train(recipe_from_dict({**values, **output}), progress=False)


def test_a_directory_in_the_place_of_a_result_is_refused_before_any_work(values, tmp_path):
    (tmp_path / "run" / "train.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="train.json is a directory.*give another output_dir"):
        train(recipe_from_dict({**values, "model": "does/not/exist", "overwrite": True}), progress=False)


def test_the_home_directory_in_paths(values, text, base, tmp_path, monkeypatch):
    for name, target in (("base", base), ("text", text)):
        (tmp_path / name).symlink_to(target)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"model": "~/base", "data": ["~/text"], "output_dir": "~/run", "max_steps": 1}
    result = train(recipe_from_dict({**values, **paths}), progress=False)
    assert result["adapter"] == str(tmp_path / "run" / "adapter")
    assert (tmp_path / "run" / "train.json").is_file()
    assert hici.from_pretrained(result["adapter"]).config.max_position_embeddings == 64


def test_two_groups_have_their_own_rate_and_warm_up(parts):
    recipe, model, _, trainer = parts(warmup_steps=4)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    hici_parameters, others = trainable_parameters(model)
    groups = trainer.optimizer.param_groups
    assert [{id(p) for p in g["params"]} for g in groups] == [{id(p) for p in x} for x in (others, hici_parameters)]
    rates = []
    for _ in range(6):
        trainer.optimizer.step()
        rates.append([group["lr"] for group in groups])
        trainer.lr_scheduler.step()
    assert rates[4] == rates[5] == [recipe.learning_rate, recipe.hici_learning_rate]
    assert rates[2] == [recipe.learning_rate / 2, recipe.hici_learning_rate / 2]


def test_a_linear_schedule_ends_at_zero(parts):
    _, _, _, trainer = parts(warmup_steps=2, schedule="linear")
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    factors = [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(7)]
    assert factors == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]


def test_each_group_is_clipped_by_its_own_norm(parts):
    _, _, _, trainer = parts(max_grad_norm=0.5, hici_max_grad_norm=0.125, max_steps=1)
    seen = {}

    def record(optimizer, *args):
        for name, group in zip(("other", "hici"), optimizer.param_groups, strict=True):
            seen[name] = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in group["params"]])).item()

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(record)
    trainer.train()
    assert seen["other"] == pytest.approx(0.5, rel=1e-3)
    assert seen["hici"] == pytest.approx(0.125, rel=1e-3)
    assert trainer.step_log["other_grad_norm"] > 0.5
    assert trainer.step_log["hici_grad_norm"] > 0.125


def test_a_nan_gradient_stops_the_run(parts):
    _, model, _, trainer = parts()
    attention_modules(model)[0].local_constructor.memory_slots.data[0, 0] = math.nan
    with pytest.raises(
        TrainingDivergedError,
        match="of the hici parameters is nan at step 1, in .*, on row .*The last whole checkpoint stands",
    ):
        trainer.train()


def test_the_loss_is_transformers_own(parts):
    _, model, _, trainer = parts()
    ids = random_ids(2, 64) % 22
    expected = model(ids, labels=ids).loss
    assert trainer.model(ids)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    labels = ids.clone()
    labels[:, :32] = -100
    expected = model(ids, labels=labels).loss
    assert trainer.model(ids, labels)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_accumulated_gradients_equal_one_large_batch(parts):
    gradients = []
    for batch, accumulation in ((4, 1), (1, 4)):
        _, model, _, trainer = parts(batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
                                     max_grad_norm=1e9, hici_max_grad_norm=1e9)  # fmt: skip
        trainer.create_optimizer()
        found = {}
        trainer.optimizer.register_step_pre_hook(
            lambda *args, m=model, f=found: f.update(
                {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}
            )
        )
        trainer.train()
        gradients.append(found)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-3), name


def test_bfloat16_keeps_trained_parameters_in_float32(values):
    recipe = recipe_from_dict({**values, "dtype": "bfloat16", "max_steps": 2})
    _, model = load_base(recipe)
    wrapped = prepare_model(recipe, model)
    for name, parameter in wrapped.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    lm = wrapped.get_base_model()
    assert lm.get_input_embeddings().weight.data_ptr() == lm.get_output_embeddings().weight.data_ptr()
    result = train(recipe, progress=False)
    assert all(math.isfinite(step["loss"]) for step in result["steps"])
    assert logits(hici.from_pretrained(result["adapter"]), random_ids(1, 40) % 22).isfinite().all()


def test_a_context_beyond_the_rope_is_an_error_without_extension(values):
    with pytest.raises(ValueError, match="64 tokens are more than the 32 positions"):
        train(recipe_from_dict({**values, "rope": "none"}), progress=False)


def test_a_model_that_is_not_there(values):
    with pytest.raises(ValueError, match="no model .does/not/exist.*give a directory with config.json"):
        train(recipe_from_dict({**values, "model": "does/not/exist"}), progress=False)


def test_heldout_data_of_its_own(values, text):
    files = sorted(text.glob("*.txt"))
    recipe = recipe_from_dict(
        {**values, "data": [str(f) for f in files[:10]], "heldout_data": [str(f) for f in files[10:]]}
    )
    data = prepare_data(recipe, *_tokenizer_and_size(values))
    assert (data.summary["documents"], data.summary["heldout_documents"]) == (10, 10)
    assert [len(row["input_ids"]) for row in data.heldout] == [64, 64, 64]
    assert data.summary["tokens_outside_of_whole_sequences"] < 64


def test_heldout_data_that_is_trained_on_is_refused(values, text):
    files = [str(f) for f in sorted(text.glob("*.txt"))]
    recipe = recipe_from_dict({**values, "data": files, "heldout_data": files[:1]})
    with pytest.raises(ValueError, match="1 held-out documents are in the training data too.*heldout_data"):
        prepare_data(recipe, *_tokenizer_and_size(values))


def test_the_command(values, tmp_path, capsys):
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--max_steps", "2", "--hici.visibility", "all"]) == 0
    out = capsys.readouterr().out
    assert "held-out loss, hici attention, visibility all: sees the future: " in out
    assert "held-out loss, full attention: " in out
    saved = json.loads((tmp_path / "run" / "train.json").read_text())
    assert (saved["visibility"], len(saved["steps"])) == ("all", 2)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--max_stps", "2"]) == 2
    assert "Did you mean 'max_steps'" in capsys.readouterr().err


def test_a_real_layer_learns_slots():
    """The HiCI modules alone, on a frozen base, lower the loss: gradients reach them and help."""
    model = tiny_model()
    attach(model, small_config(visibility="all"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("local_constructor" in name or "global_integrator" in name)
    ids = random_ids(4, 32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_a_heldout_part_that_is_too_small_is_named(values):
    with pytest.raises(ValueError, match="the held-out part .heldout_fraction 0.01.* fewer than one sequence of 400"):
        prepare_data(
            recipe_from_dict({**values, "heldout_fraction": 0.01, "context_length": 400}), *_tokenizer_and_size(values)
        )


def test_every_method_begins_with_the_same_lora(parts):
    """So that methods of one seed differ in nothing else."""
    found = {}
    for method in ("hici", "hici_s2", "full"):
        _, model, _, _ = parts(method=method)
        found[method] = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_A." in n}
    assert len(found["full"]) > 4
    for method in ("hici", "hici_s2"):
        assert found[method].keys() == found["full"].keys()
        assert all(torch.equal(value, found["full"][name]) for name, value in found[method].items())


@pytest.fixture
def refused(values):
    """train() must refuse these changes, with the message."""

    def check(message, resume=False, **changes):
        with pytest.raises(ValueError, match=message):
            train(recipe_from_dict({**values, **changes}), resume=resume, progress=False)

    return check


def test_nothing_of_an_earlier_run_is_lost_unasked(refused, values, tmp_path):
    board = tmp_path / "run" / "tensorboard" / "events.out.tfevents.1"
    board.parent.mkdir(parents=True)
    board.write_text("precious")
    refused("tensorboard holds TensorBoard's files of an earlier run")
    board.rename(board.with_name("notes.txt"))
    (tmp_path / "run" / "train.json").write_text("precious")
    refused("holds the train.json of an earlier run and no checkpoint, so there is nothing to go on from", resume=True)
    refused("train.json exists, and nothing is overwritten silently")
    result = train(recipe_from_dict({**values, "overwrite": True, "max_steps": 1}), progress=False)
    assert result["seconds"] > 0
    assert (board.with_name("notes.txt")).read_text() == "precious"


def test_what_is_read_is_not_replaced(refused, text, base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(text, run / "checkpoints" / "text")
    shutil.copytree(base, run / "adapter" / "base")
    refused("checkpoints is or holds .*text, which is read", data=[str(run / "checkpoints" / "text")], overwrite=True)
    refused("adapter is or holds .*base, which is read", model=str(run / "adapter" / "base"), overwrite=True)
    assert (run / "adapter" / "base" / "config.json").is_file()


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision 'bf16', but precision is the recipe's key dtype"),
        ("FSDP_VERSION", "1", "says version 1, but only FSDP2 trains"),
        ("FSDP_VERSION", None, "says version 1, but only FSDP2 trains"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "True", "says cpu_ram_efficient_loading true, but every process makes"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config .* hici divides a step by sequences only"),
    ],
)
def test_launch_settings_that_do_not_go(refused, monkeypatch, setting, value, message):
    if setting.startswith("FSDP"):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.delenv(setting, raising=False) if value is None else monkeypatch.setenv(setting, value)
    refused(message)


@pytest.mark.parametrize("engine, name", [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
@pytest.mark.parametrize("changes", [{"quantization": "4bit"}, {"optimizer": "adamw_8bit"}], ids=str)
def test_bitsandbytes_is_refused_where_parameters_are_divided(refused, monkeypatch, engine, name, changes):
    monkeypatch.setenv(engine, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    refused(f"with {name}, which divides tensors that bitsandbytes keeps in blocks", **changes)


def test_offloaded_checkpoints_on_a_cpu_are_refused_before_any_work(refused):
    refused("offload_checkpoints=true on the CPU.*take it out", offload_checkpoints=True, model="not/there")


def test_rates_that_are_never_reached_are_said(values, caplog):
    train(recipe_from_dict({**values, "max_steps": 2, "heldout_windows": 0}), progress=False)
    assert "warmup_steps=2 is not below max_steps=2" in caplog.text


def test_writing_a_checkpoint_is_no_part_of_a_step(values, monkeypatch):
    """By a clock on which writing takes 1,000 seconds."""
    write, clock, late = CheckpointStore.write, time.perf_counter, [0.0]

    def slow(self, step, fill):
        late[0] += 1000
        return write(self, step, fill)

    monkeypatch.setattr(CheckpointStore, "write", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    result = train(recipe_from_dict({**values, "max_steps": 6, "save_steps": 2, "heldout_windows": 0}), progress=False)
    assert late == [3000]
    assert result["seconds"] < 900


def test_sections_that_mean_the_same_may_be_spelt_otherwise(values, tmp_path):
    short = {**values, "max_steps": 4, "save_steps": 2, "heldout_windows": 0}
    whole = train(recipe_from_dict(short), progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    again = {**short, "hici": {**values["hici"], "decode": "auto", "use_local": True}}
    assert (
        train(recipe_from_dict(again), resume=True, progress=False)["steps"][-1]["loss"] == whole["steps"][-1]["loss"]
    )
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    other = {**short, "hici": {**values["hici"], "segment_size": 32}}
    with pytest.raises(ValueError, match="written by another run; now different: hici"):
        train(recipe_from_dict(other), resume=True, progress=False)


def test_a_report_after_a_longer_resume(values, tmp_path):
    short = {**values, "max_steps": 4, "save_steps": 2, "heldout_windows": 0}
    train(recipe_from_dict(short), progress=False)
    assert (read_run(tmp_path / "run").total_steps, read_run(tmp_path / "run").ended) == (4, True)
    train(recipe_from_dict({**short, "max_steps": 6}), resume=True, progress=False)
    run = read_run(tmp_path / "run")
    assert (run.total_steps, run.ended, run.method, run.resumes) == (6, True, "hici", (4,))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    assert not read_run(tmp_path / "run").ended  # the end of before the resume does not count
