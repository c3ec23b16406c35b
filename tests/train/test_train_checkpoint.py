"""Checkpoints: whole or absent, read back, and refused for another run."""

import errno
import json
import logging
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hici.files import read_json
from hici.train import checkpoint
from hici.train.checkpoint import COMPLETE, CheckpointStore, Identity, problem_of

RECIPE = {"schedule": "constant", "max_steps": 10, "batch_size": 2, "gradient_accumulation_steps": 2, "seed": 0,
          "learning_rate": 2e-5, "hici": {"visibility": "past"}, "segment_counts": None, "max_grad_norm": "inf",
          "output_dir": "run", "save_steps": 2}  # fmt: skip
SAME = Identity(RECIPE, "d" * 64, "b" * 64, 4)


def identity(**changes):
    ours = {key: changes.pop(key) for key in ("data", "base", "rows_a_step") if key in changes}
    return Identity(**{"recipe": {**RECIPE, **changes}, "data": "d" * 64, "base": "b" * 64, "rows_a_step": 4, **ours})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, SAME, keep=2)


def filler(value):
    def fill(directory):
        save_file({"x": torch.full((8,), float(value))}, directory / "weights.safetensors")
        (directory / "trainer_state.json").write_text(f'{{"global_step": {value}}}')

    return fill


def names(store):
    return sorted(path.name for path in store.directory.iterdir())


def value(path):
    return int(load_file(path / "weights.safetensors")["x"][0])


def test_what_is_written_is_whole_and_is_the_last(store):
    assert store.last() is None
    for step in (2, 4):
        assert store.write(step, filler(step)) == store.path(step)
    assert store.last() == store.path(4)
    assert value(store.last()) == 4
    assert names(store) == ["step-00000002", "step-00000004"]
    facts = read_json(store.path(4) / COMPLETE)
    assert facts["step"] == 4
    assert set(facts["files"]) == {"weights.safetensors", "trainer_state.json"}


def test_numbers_are_compared_as_numbers(store):
    for step in (2, 10, 100_000):
        store.write(step, filler(step))
    assert names(store) == ["step-00000010", "step-00100000"]
    assert value(store.last()) == 100_000


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_writer_that_fails_midway_leaves_nothing_and_the_old_ones(store, error):
    store.write(2, filler(2))

    def fill(directory):
        filler(4)(directory)
        raise error

    with pytest.raises(type(error)):
        store.write(4, fill)
    assert names(store) == ["step-00000002"]
    assert value(store.last()) == 2


def test_a_full_disk_is_named_with_the_remedy_and_the_old_ones_stand(store):
    store.write(2, filler(2))

    def fill(directory):
        filler(4)(directory)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="checkpoint of step 4 could not be written in .*No space left.*--resume"):
        store.write(4, fill)
    assert names(store) == ["step-00000002"]
    assert problem_of(store.last()) is None


def test_a_full_disk_as_safetensors_tells_of_it(store):
    """It raises an error of its own, no OSError. The limit of a file's size stands for the disk's."""
    store.write(2, filler(2))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(ValueError, match="step 4 could not be written in .*File too large.*make room"):
            store.write(4, lambda directory: save_file({"x": torch.zeros(10_000)}, directory / "w.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(store) == ["step-00000002"]


FILES = ["weights.safetensors", "trainer_state.json", COMPLETE]


@pytest.mark.parametrize("file", FILES)
def test_one_other_bit_anywhere_is_passed_over_with_a_line(store, file, caplog):
    for step in (2, 4):
        store.write(step, filler(step))
    path = store.path(4) / file
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 40))
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hici.train.checkpoint"):
            found = store.last()
        # in complete.json a bit between spaces and brackets may be another way to write the same: never other values
        if found == store.path(4):
            assert file == COMPLETE
            assert json.loads(bytes(changed)) == json.loads(whole)
            continue
        assert found == store.path(2), place
        assert "step-00000004 is not whole" in caplog.text
        assert file in caplog.text
        assert "an older checkpoint is looked for" in caplog.text
    path.write_bytes(whole)
    assert store.last() == store.path(4)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "short"])
def test_a_file_that_is_missing_or_cut_off_is_passed_over(store, file, damage):
    for step in (2, 4):
        store.write(step, filler(step))
    path = store.path(4) / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -3])
    assert file in problem_of(store.path(4)).text
    assert store.last() == store.path(2)


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"files": 3, "sha256": "x"}', "{}"])
def test_a_marker_that_is_something_else(store, content):
    store.write(2, filler(2))
    (store.path(2) / COMPLETE).write_text(content)
    assert COMPLETE in problem_of(store.path(2)).text
    with pytest.raises(ValueError, match=r"none of .* is whole .step-00000002: complete\.json.*restore one"):
        store.last()


def test_another_format_version_is_passed_over(store, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    store.write(2, filler(2))
    monkeypatch.undo()
    assert problem_of(store.path(2)) == ("format_version 2; this hici reads 1", False)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_one_is_written_anew_and_does_not_count(store, file):
    """Resumed from the older one, the run comes to the damaged one's step again."""
    for step in (2, 4):
        store.write(step, filler(step))
    (store.path(4) / file).unlink()
    again = CheckpointStore(store.directory.parent, SAME, keep=2)
    assert again.last() == store.path(2)
    again.write(4, filler(4))
    assert problem_of(store.path(4)) is None
    assert names(store) == ["step-00000002", "step-00000004"]


def test_a_damaged_one_takes_no_place_of_a_whole_one(store):
    for step in (2, 6):
        store.write(step, filler(step))
    (store.path(6) / FILES[0]).write_bytes(b"")
    again = CheckpointStore(store.directory.parent, SAME, keep=2)
    assert again.last() == store.path(2)
    again.write(3, filler(3))
    assert names(store) == ["step-00000002", "step-00000003"]
    assert again.last() == store.path(3)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_stay_as_are_kept(tmp_path, keep):
    store = CheckpointStore(tmp_path, SAME, keep)
    for step in range(1, 6):
        store.write(step, filler(step))
    assert names(store) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_old_ones_go_only_after_the_new_one_was_read_back(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, SAME, keep=1)
    store.write(2, filler(2))
    seen = []

    def watched(path):
        seen.append((path.name, names(store)))
        return problem_of(path)

    monkeypatch.setattr(checkpoint, "problem_of", watched)
    store.write(4, filler(4))
    assert seen == [("step-00000004", ["step-00000002", "step-00000004"])]
    assert names(store) == ["step-00000004"]


def test_a_disk_that_gives_back_something_else_keeps_the_old_ones(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, SAME, keep=1)
    store.write(2, filler(2))
    written = checkpoint.file_sha256

    def bad_disk(path):
        # under its temporary name what went in; under its own name what comes out
        if path.parent.name == "step-00000004" and path.name == "weights.safetensors":
            path.write_bytes(b"something else")
        return written(path)

    monkeypatch.setattr(checkpoint, "file_sha256", bad_disk)
    with pytest.raises(ValueError, match="step-00000004 was written but does not read back .weights.safetensors has "
                       "another SHA-256.*check the disk. Older checkpoints were kept"):  # fmt: skip
        store.write(4, filler(4))
    assert store.last() == store.path(2)
    assert value(store.path(2)) == 2


def test_the_marker_goes_first_when_one_is_removed(tmp_path, monkeypatch):
    """Killed in the middle of removing, it leaves a directory that nobody takes for whole."""
    store = CheckpointStore(tmp_path, SAME, keep=1)
    store.write(2, filler(2))
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((path.name, (path / COMPLETE).exists())))
    store.write(4, filler(4))
    assert ("step-00000002", False) in seen
    monkeypatch.undo()
    assert COMPLETE in problem_of(store.path(2)).text
    assert store.last() == store.path(4)
    store.write(6, filler(6))  # and the rest of it goes with the next one
    assert names(store) == ["step-00000006"]


def test_what_killed_writers_left_is_no_checkpoint_and_is_cleaned(store):
    store.write(2, filler(2))
    left = store.directory / ".step-00000004.abc"
    left.mkdir()
    filler(4)(left)
    assert store.last() == store.path(2)
    store.clean()
    assert names(store) == ["step-00000002"]
    checkpoint.remove_checkpoints(store.directory)
    assert not store.directory.exists()
    store.clean()  # nothing there: no error


def test_another_run_is_refused(store):
    store.write(2, filler(2))
    other = CheckpointStore(store.directory.parent, identity(seed=1, data="e" * 64), keep=2)
    with pytest.raises(ValueError, match="step-00000002 was written by another run; now different: seed: 0 -> 1; "
                       "training rows .fingerprint.: dddddddddddd -> eeeeeeeeeeee. Resume with what wrote it, or start "
                       "anew in another output_dir .or with --overwrite true"):  # fmt: skip
        other.last()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 1e-3}, "learning_rate: 2e-05 -> 0.001"),
        ({"hici": {"visibility": "all"}}, "hici: {'visibility': 'past'} -> {'visibility': 'all'}"),
        ({"segment_counts": [2, 4]}, "segment_counts: None -> [2, 4]"),
        ({"schedule": "linear"}, "schedule: 'constant' -> 'linear'"),
        ({"max_steps": 9}, "max_steps: 10 -> 9"),
        ({"a_key_of_later": 1}, "a_key_of_later: None -> 1"),
        ({"data": "e" * 64}, "training rows (fingerprint): dddddddddddd -> eeeeeeeeeeee"),
        ({"base": "c" * 64}, "base weights (fingerprint): bbbbbbbbbbbb -> cccccccccccc"),
        ({"rows_a_step": 8}, "rows a step: 4 -> 8"),
    ],
)
def test_each_difference_is_named(changes, message):
    assert SAME.differences(identity(**changes)) == [message]


def test_all_differences_are_named():
    assert len(SAME.differences(identity(seed=1, learning_rate=1.0, base="c", rows_a_step=1))) == 4


@pytest.mark.parametrize("key", sorted(checkpoint._FREE + checkpoint._DEALT))
def test_keys_that_change_nothing_may_differ(key):
    assert SAME.differences(identity(**{key: "other"})) == []


def test_more_steps_only_at_constant_rates():
    assert SAME.differences(identity(max_steps=20)) == []
    linear = identity(schedule="linear")
    assert linear.differences(identity(schedule="linear", max_steps=20)) == ["max_steps: 10 -> 20"]
    assert SAME.differences(identity(max_steps=5)) == ["max_steps: 10 -> 5"]


@pytest.mark.parametrize("rows", [{"packing": "document"}, {"data_format": "instruction"}], ids=str)
def test_rows_that_are_padded_together_and_cut_by_number_stay_together(rows):
    """What a padded row gives depends on the longest row beside it, unless segments have a fixed size."""
    by_number, by_size = {**rows, "hici": {}}, {**rows, "hici": {"segment_size": 16}}
    assert identity(**by_number).differences(identity(**by_number, batch_size=4)) != []
    assert identity(**by_size).differences(identity(**by_size, batch_size=4)) == []
    full = {**by_number, "method": "full"}
    assert identity(**full).differences(identity(**full, batch_size=4)) == []


def test_a_checkpoint_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch, caplog):
    """A disk that does not answer, or a format of a later version: nobody knows that it is worthless."""
    store = CheckpointStore(tmp_path, SAME, keep=1)
    for step in (2, 4, 6):
        CheckpointStore(tmp_path, SAME, keep=9).write(step, filler(step))
    real = checkpoint.file_sha256

    def no_answer(path):
        if path.parent.name == "step-00000006":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "file_sha256", no_answer)
    assert store.last() == store.path(4)
    assert "step-00000006 is not whole" in caplog.text
    monkeypatch.setattr(checkpoint, "file_sha256", real)
    store.keep = 9
    store.write(8, filler(8))
    assert store.path(6).is_dir()


def test_foreign_files_beside_checkpoints_stay(tmp_path):
    store = CheckpointStore(tmp_path, SAME, keep=2)
    store.write(2, filler(2))
    (store.directory / "mine.pt").write_text("precious")
    checkpoint.remove_checkpoints(store.directory)
    assert [path.name for path in store.directory.iterdir()] == ["mine.pt"]
    (store.directory / "mine.pt").unlink()
    checkpoint.remove_checkpoints(store.directory)
    assert not store.directory.exists()
