"""A resumed run is the uninterrupted one: batches, optimizer, rates, dropout, weights, bit for bit."""

import inspect
import logging
import shutil

import pytest
import torch
from transformers import Trainer, set_seed

from hici.cli.main import main
from hici.processes import only_run_in
from hici.train.checkpoint import problem_of
from hici.train.recipe import recipe_from_dict
from hici.train.rows import prepare_data
from hici.train.run import checkpoint_store, make_trainer, train
from hici.train.setup import load_base, prepare_model
from hici.train.trainer import HiCITrainer
from training_runs import (
    assert_same_run,
    checkpoints,
    curve,
    write_recipe,
)

STEPS = 8  # of whole_run

pytestmark = pytest.mark.usefixtures("no_picture")


def test_the_whole_run_is_one_in_which_randomness_matters(whole_run):
    steps = curve(whole_run)
    assert {step["segments"] for step in steps} == {2, 4}
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert checkpoints(whole_run) == [2, 4, 6, 8]
    assert all(problem_of(path) is None for path in (whole_run / "checkpoints").iterdir())


@pytest.mark.parametrize("step", [2, 6])
def test_resumed_from_a_checkpoint_it_is_the_same_run(recipe, stopped, whole_run, step, monkeypatch):
    run = stopped(step)
    trained = []
    original = HiCITrainer.training_step
    monkeypatch.setattr(
        HiCITrainer,
        "training_step",
        lambda self, *a, **k: (trained.append(self.state.global_step), original(self, *a, **k))[1],
    )
    train(recipe(), resume=True, progress=False)
    assert trained == [step for step in range(step, STEPS) for _ in range(2)]  # and no step again
    assert_same_run(run, whole_run)


def test_a_finished_run_resumed_gives_the_same(recipe, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    train(recipe(), resume=True, progress=False)
    assert_same_run(tmp_path / "run", whole_run)


def test_without_a_checkpoint_it_starts_from_the_beginning(recipe, whole_run, tmp_path):
    train(recipe(), resume=True, progress=False)
    assert_same_run(tmp_path / "run", whole_run)


def test_a_damaged_checkpoint_is_passed_over(recipe, stopped, whole_run, caplog):
    run = stopped(6)
    (run / "checkpoints" / "step-00000006" / "optimizer.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="hici"):
        train(recipe(), resume=True, progress=False)
    assert "step-00000006 is not whole (optimizer.safetensors has another SHA-256" in caplog.text
    assert_same_run(run, whole_run)
    assert checkpoints(run) == [2, 4, 6, 8]


def test_more_steps_at_constant_rates_are_the_longer_run(recipe, stopped, whole_run):
    """whole_run is the longer one of a run of 4 steps."""
    run = stopped(0)
    train(recipe(max_steps=4), progress=False)
    assert curve(run) == curve(whole_run)[:4]
    train(recipe(), resume=True, progress=False)
    assert_same_run(run, whole_run)


def test_rows_may_be_dealt_out_otherwise(recipe, stopped, whole_run):
    """One sequence at a time, four times: the same rows a step (dropout falls on other elements)."""
    run = stopped(6)
    train(recipe(batch_size=1, gradient_accumulation_steps=4), resume=True, progress=False)
    for ours, expected in zip(curve(run), curve(whole_run), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert (ours["tokens"], ours["segments"]) == (256, expected["segments"])


def test_save_steps_of_the_resuming_recipe_count(recipe, stopped):
    run = stopped(4)
    train(recipe(save_steps=5, keep_checkpoints=2), resume=True, progress=False)
    assert checkpoints(run) == [5, 8]


def test_an_interrupt_leaves_whole_checkpoints(recipe, random_values, whole_run, tmp_path, monkeypatch, capsys):
    original = HiCITrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    path = write_recipe({**random_values, "output_dir": str(tmp_path / "run")}, tmp_path / "recipe.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(HiCITrainer, "training_step", interrupted)
        assert main(["train", str(path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    run = tmp_path / "run"
    assert checkpoints(run) == [2, 4]
    assert all(problem_of(place) is None for place in (run / "checkpoints").iterdir())
    assert main(["train", str(path), "--resume"]) == 0
    assert_same_run(run, whole_run)


# --- refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 1e-3}, "now different: learning_rate: 0.002 -> 0.001. Resume with what wrote it"),
        ({"segment_counts": [2]}, r"segment_counts: \[2, 4\] -> \[2\]"),
        ({"batch_size": 4}, "rows a step: 4 -> 8"),
        ({"max_steps": 7}, "max_steps: 8 -> 7"),
        ({"seed": 1}, "seed: 0 -> 1; training rows .fingerprint."),
    ],
)
def test_resumed_with_another_recipe_it_says_what_differs(recipe, stopped, changes, message):
    run = stopped(4)
    with pytest.raises(ValueError, match=message):
        train(recipe(**changes), resume=True, progress=False)
    assert checkpoints(run) == [2, 4]


def test_resumed_with_other_data_or_another_base_it_says_so(recipe, random_values, stopped, tmp_path, base, text):
    """The same paths with other content."""
    from safetensors.torch import load_file, save_file

    for name, source in (("base", base), ("text", text)):
        shutil.copytree(source, tmp_path / name)
    paths = {"model": str(tmp_path / "base"), "data": [str(tmp_path / "text")], "max_steps": 2}
    train(recipe(**paths), progress=False)
    (tmp_path / "text" / "00.txt").write_text("the a cat dog river")
    with pytest.raises(ValueError, match=r"now different: training rows .fingerprint.: \w{12} -> \w{12}\. Resume"):
        train(recipe(**paths), resume=True, progress=False)
    shutil.copy(text / "00.txt", tmp_path / "text")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"now different: base weights .fingerprint.: \w{12} -> \w{12}\. Resume"):
        train(recipe(**paths), resume=True, progress=False)


def test_checkpoints_without_resume_are_refused_before_any_work(recipe, stopped):
    run = stopped(4)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="checkpoints holds checkpoints of an earlier run.*--resume.*--overwrite true"):
        train(recipe(model="does/not/exist"), progress=False)
    assert checkpoints(run) == [2, 4]


def test_overwrite_starts_anew_and_removes_the_old_checkpoints(recipe, stopped):
    run = stopped(8)
    (run / "train.json").write_text("old")
    train(recipe(overwrite=True, max_steps=3, seed=1), progress=False)
    assert checkpoints(run) == [2, 3]
    assert len(curve(run)) == 3


def test_two_runs_in_one_place_are_refused(recipe, tmp_path):
    with (
        only_run_in(tmp_path / "run"),
        pytest.raises(ValueError, match="another run is writing into .*run; wait for it, stop it, or give another"),
    ):
        train(recipe(), progress=False)
    train(recipe(max_steps=1), progress=False)  # free again


def test_a_disk_without_room_is_known_before_training(recipe, stopped, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    began = []
    monkeypatch.setattr(HiCITrainer, "train", lambda self, **_: began.append(1))
    with pytest.raises(ValueError, match="run has 0.0 GB free, but the run writes up to .* GB .adapter and 9 check.*"
                       "make room, lower keep_checkpoints, or give another output_dir"):  # fmt: skip
        train(recipe(), progress=False)
    assert began == []
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_that_are_there_make_room_for_a_resumed_runs(recipe, stopped, whole_run, monkeypatch):
    """Of a disk that a whole run fills, nothing is free but what the last part of it needs."""
    run = stopped(6)
    adapter = sum(path.stat().st_size for path in (whole_run / "adapter").iterdir())
    one = sum(path.stat().st_size for path in (whole_run / "checkpoints" / "step-00000006").iterdir())
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=adapter + 2 * one))
    train(recipe(), resume=True, progress=False)
    assert_same_run(run, whole_run)


def test_a_cuda_recipe_on_a_cpu_machine(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but torch sees no CUDA device here.*--device cpu"):
        train(recipe(device="cuda", model="does/not/exist"), progress=False)
    assert not (tmp_path / "run").exists()


# --- what is used of Trainer


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("create_accelerator_and_postprocess", ["self"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
    ],
)
def test_methods_of_trainer_that_are_overridden(name, parameters):
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
    ours = getattr(HiCITrainer, name)
    assert theirs == parameters
    assert ours is not getattr(Trainer, name)
    inspect.signature(ours).bind(*theirs)  # ours can be called as Trainer calls its own


def test_trainer_writes_nothing_of_its_own(recipe, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("Trainer's own saving was called")

    for name in ("_save", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler", "save_model"):
        assert hasattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, refuse)
    called = []
    for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"):
        assert hasattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, refuse)
        ours = getattr(HiCITrainer, name)
        monkeypatch.setattr(
            HiCITrainer, name, lambda self, *a, name=name, ours=ours: (called.append(name), ours(self, *a))[1]
        )
    settings = recipe(max_steps=4)
    for resume in (False, True):
        set_seed(0)
        tokenizer, model = load_base(settings)
        data = prepare_data(settings, tokenizer, model.config.vocab_size)
        model = prepare_model(settings, model)
        store = checkpoint_store(settings, tmp_path / "run", model, data)
        scratch = tmp_path / f"scratch{resume}"
        trainer = make_trainer(settings, model, data, str(scratch), store=store, base_loss=None)
        called.clear()
        trainer.train(resume_from_checkpoint=str(store.path(2)) if resume else None)
        assert [path for path in scratch.rglob("*") if path.is_file()] == []
        expected = {"_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"} if resume else set()
        assert {name for name in called if resume} == expected
    assert sorted(path.name for path in store.path(4).iterdir()) == [
        "complete.json", "optimizer.json", "optimizer.safetensors", "random.pt", "trainer_state.json",
        "weights.safetensors",
    ]  # fmt: skip


def test_clips_of_infinity_can_be_written(recipe, tmp_path):
    """JSON knows no infinity."""
    result = train(recipe(max_grad_norm=float("inf"), hici_max_grad_norm=float("inf"), max_steps=2), progress=False)
    assert result["recipe"]["max_grad_norm"] == "inf"
    assert recipe_from_dict(result["recipe"]).max_grad_norm == float("inf")
    assert checkpoints(tmp_path / "run") == [2]
