"""Runs that are killed at any moment, resumed, and compared with the uninterrupted one: bit-equal."""

import contextlib
import json
import random
import signal
import subprocess
import time

import pytest

from hici.processes import only_run_in
from hici.train.checkpoint import problem_of
from hici.train.run import train
from training_runs import assert_same_run, checkpoints, leftovers, start_child, start_command, write_recipe

TIMEOUT = 240  # seconds; a hang must not hang the suite

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.mark.parametrize(
    "moment, left",
    [
        ("in a file", 2),
        pytest.param("before the rename", 2, marks=pytest.mark.slow),
        pytest.param("in removing an old one", 4, marks=pytest.mark.slow),
        pytest.param("in the adapter", 8, marks=pytest.mark.slow),
        pytest.param("before the log", 8, marks=pytest.mark.slow),
    ],
)
def test_killed_while_writing(recipe, random_values, whole_run, tmp_path, moment, left):
    keep = 1 if moment == "in removing an old one" else 9
    values = {**random_values, "output_dir": str(tmp_path / "run"), "keep_checkpoints": keep}
    child = start_child(write_recipe(values, tmp_path / "recipe.yaml"), moment)
    child.join(TIMEOUT)
    child.kill()
    assert child.exitcode == -signal.SIGKILL
    run = tmp_path / "run"
    whole = [step for step in checkpoints(run) if problem_of(run / "checkpoints" / f"step-{step:08d}") is None]
    assert whole[-1] == left
    assert not (run / "train.json").exists()
    if moment in ("in a file", "before the rename"):
        assert [name[:14] for name in leftovers(run)] == [".step-00000004"]
    train(recipe(keep_checkpoints=keep), resume=True, progress=False)
    assert_same_run(run, whole_run)


def test_killed_at_a_random_moment_after_the_first_checkpoint(recipe, random_values, whole_run, tmp_path):
    run = tmp_path / "run"
    seconds = sum(step["seconds"] for step in json.loads((whole_run / "train.json").read_text())["steps"])
    delay = random.SystemRandom().uniform(0, seconds)
    print(f"killed {delay:.4f} s after the first checkpoint")
    values = {**random_values, "output_dir": str(run)}
    child = start_child(write_recipe(values, tmp_path / "recipe.yaml"))
    ends = time.monotonic() + TIMEOUT
    while not checkpoints(run) and child.is_alive() and time.monotonic() < ends:
        time.sleep(0.002)
    time.sleep(delay)
    child.kill()
    child.join(TIMEOUT)
    assert checkpoints(run)
    train(recipe(), resume=True, progress=False)
    assert_same_run(run, whole_run)


@pytest.fixture(scope="module")
def whole_command(random_values, tmp_path_factory):
    """(the uninterrupted run by `python -m hici train`, its seconds from start to end)."""
    place = tmp_path_factory.mktemp("command")
    values = {**random_values, "output_dir": str(place / "run"), "keep_checkpoints": 2}
    begun = time.monotonic()
    finish_command(start_command(write_recipe(values, place / "recipe.yaml")))
    return place / "run", time.monotonic() - begun


def finish_command(process):
    try:
        out, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_any_moment(random_values, whole_command, tmp_path, number):
    """From the start of Python to the last file: the tenths of a run, each at a random place."""
    expected, seconds = whole_command
    delay = random.SystemRandom().uniform(number / 10, (number + 1) / 10) * seconds
    values = {**random_values, "output_dir": str(tmp_path / "run"), "keep_checkpoints": 2}
    path = write_recipe(values, tmp_path / "recipe.yaml")
    process = start_command(path)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=delay)
    process.kill()
    process.communicate(timeout=TIMEOUT)
    print(f"killed after {delay:.3f} of {seconds:.1f} s with {process.returncode}")
    finish_command(start_command(path, "--resume"))
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_seen_being_written(random_values, whole_command, tmp_path):
    """By its temporary name, from outside."""
    expected, _ = whole_command
    values = {**random_values, "output_dir": str(tmp_path / "run"), "keep_checkpoints": 2}
    path = write_recipe(values, tmp_path / "recipe.yaml")
    process = start_command(path)
    place, ends = tmp_path / "run" / "checkpoints", time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < ends:
        if checkpoints(tmp_path / "run") and any(place.glob(".step-*")):
            break
    process.kill()
    process.communicate(timeout=TIMEOUT)
    finish_command(start_command(path, "--resume"))
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
def test_killed_again_and_again(random_values, whole_command, tmp_path):
    expected, seconds = whole_command
    values = {**random_values, "output_dir": str(tmp_path / "run"), "keep_checkpoints": 2}
    path = write_recipe(values, tmp_path / "recipe.yaml")
    for _ in range(4):
        process = start_command(path, "--resume")
        time.sleep(random.SystemRandom().uniform(0.5, 1) * seconds)
        process.kill()
        process.communicate(timeout=TIMEOUT)
    finish_command(start_command(path, "--resume"))
    assert_same_run(tmp_path / "run", expected)


def test_a_killed_run_holds_no_lock(recipe, random_values, tmp_path):
    values = {**random_values, "output_dir": str(tmp_path / "run")}
    child = start_child(write_recipe(values, tmp_path / "recipe.yaml"))
    ends = time.monotonic() + TIMEOUT
    while not checkpoints(tmp_path / "run") and child.is_alive() and time.monotonic() < ends:
        time.sleep(0.002)
    with pytest.raises(ValueError, match="another run is writing into"), only_run_in(tmp_path / "run"):
        pass
    child.kill()
    child.join(TIMEOUT)
    with only_run_in(tmp_path / "run"):
        pass
