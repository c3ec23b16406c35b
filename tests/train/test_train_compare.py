"""benchmarks/compare.py: what it makes before the runs, the whole of it on a tiny model and books, and its worker."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import compare
import compare_setup
import compare_worker
from hici.data.documents import map_token_file
from hici.data.stream import load_stream
from hici.files import read_json, write_json

TEXT = "the a cat dog river mountain runs sees under over quickly slowly and then while blue old house"

# ---- what is made before the runs


def test_the_cut_base_is_the_model_with_another_context(base, tmp_path):
    cut = compare_setup.cut_base(base, 16, tmp_path)
    assert AutoConfig.from_pretrained(cut).max_position_embeddings == 16
    assert AutoConfig.from_pretrained(base).max_position_embeddings == 32
    for file in base.iterdir():
        if file.name != "config.json":
            assert (cut / file.name).read_bytes() == file.read_bytes()
    assert (cut / "model.safetensors").is_symlink()
    assert compare_setup.cut_base(base, 16, tmp_path) == cut
    with pytest.raises(ValueError, match="--base-context 33, but .* represents 32 positions.*smaller"):
        compare_setup.cut_base(base, 33, tmp_path)
    with pytest.raises(ValueError, match=r"holds no config.json; give a model's directory"):
        compare_setup.cut_base(tmp_path / "none", 16, tmp_path)


def test_token_files_hold_the_books_and_not_the_one_left_out(books, base, tokenizer, tmp_path):
    data = compare_setup.prepare_data(books, "03", base, tmp_path)
    training = sorted(path for path in books.iterdir() if path.name != "03.txt")
    vocabulary = {"tokenizer": tokenizer, "vocab_size": len(tokenizer)}
    expected = [load_stream([path], **vocabulary)[0] for path in training]
    found = [map_token_file(path, len(tokenizer)) for path in sorted(data.train.iterdir())]
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]
    test, _ = load_stream([books / "03.txt"], **vocabulary)
    assert map_token_file(data.test, len(tokenizer)).tolist() == test.tolist()
    assert data.facts["test_book"] == "03.txt"
    assert data.facts["test_tokens"] == len(test)
    assert data.facts["training_tokens"] == sum(len(x) for x in expected)
    (books / "00.txt").write_text("the cat runs " * 100)
    assert compare_setup.prepare_data(books, "03", base, tmp_path).facts["sha256"] != data.facts["sha256"]


def test_books_are_refused(books, base, tmp_path):
    with pytest.raises(ValueError, match=r"--test-book 99 is 0 of the books.*00.txt, 01.txt"):
        compare_setup.find_books(books, "99")
    with pytest.raises(ValueError, match="is no folder"):
        compare_setup.find_books(books / "00.txt", "00")
    (books / "copy.txt").write_text((books / "03.txt").read_text())
    with pytest.raises(ValueError, match=r"03.txt has the text of .*copy.txt, which is trained on"):
        compare_setup.prepare_data(books, "03", base, tmp_path)
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.txt").write_text("the cat")
    with pytest.raises(ValueError, match="holds a.txt only, which leaves none to train on"):
        compare_setup.find_books(only, "a")


def test_recipes_of_all_methods_differ_in_method_and_visibility_alone(base, tmp_path):
    shared = compare_setup.shared_values(["--learning_rate", "1e-3", "--hici.num_local_slots", "4"], 64)
    recipes = {
        method: compare_setup.make_recipe(shared, method, 1, base=base, data=tmp_path, context=64, steps=5,
                                          output=tmp_path).to_dict()
        for method in compare_setup.METHODS
    }  # fmt: skip
    assert {name: recipe.pop("method") for name, recipe in recipes.items()} == {
        "full": "full", "hici_s2": "hici_s2", "hici-all": "hici", "hici-current": "hici", "hici-past": "hici",
    }  # fmt: skip
    visible = {name: recipe["hici"].pop("visibility", None) for name, recipe in recipes.items()}
    assert visible == {"full": None, "hici_s2": None, "hici-all": "all", "hici-current": "current", "hici-past": "past"}
    assert all(recipe == recipes["full"] for recipe in recipes.values())
    assert recipes["full"]["learning_rate"] == 1e-3
    assert recipes["full"]["hici"] == {"num_local_slots": 4, "segment_size": 16}
    assert recipes["full"]["heldout_windows"] == 0  # nothing of the books is held out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--context", "16"], "--context 16 is no longer than --base-context 16"),
        (["--eval-lengths", "64", "128"], "--eval-lengths 128 is beyond --context 64"),
        (["--eval-lengths", "32", "32"], "--eval-lengths 32 32 names one twice"),
        (["--seeds", "1", "1"], "--seeds 1 1 names one twice"),
        (["--methods", "hici-past", "--equal-time"], "add full and a hici- method"),
        (["--methods", "full", "--equal-time"], "add full and a hici- method"),
        (["--jobs", "2", "--profile-steps", "0"], "--profile-steps 0 with --jobs 2, where a step must be timed"),
        (["--profile-steps", "-1"], "--profile-steps -1 is below 0; give 0 for none"),
        (["--max_steps", "3"], "--max_steps is set by the comparison itself; use --steps"),
        (["--hici.visibility", "all"], "--hici.visibility is set by the comparison itself; use --methods"),
        (["--learning_rat", "1"], "unknown recipe key 'learning_rat'.*learning_rate"),
        (["--test-book", "nobody"], "--test-book nobody is 0 of the books"),
        (["--context", "4096"], "304 tokens, fewer than one window of 512"),
    ],
)
def test_bad_options_are_refused_before_any_run(options, message, command, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main([*command, *options])
    assert error.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


# ---- the whole


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    words = TEXT.split()
    for i in range(5):
        text = " ".join(words[(i + (3 + i) * j) % len(words)] for j in range(300 + i))
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture
def command(base, books, tmp_path):
    """Options of a tiny comparison: 16 positions to 64, 4 windows of 64 tokens."""
    return [
        "--model", str(base), "--books", str(books), "--test-book", "03.txt", "--context", "64", "--base-context", "16",
        "--eval-windows", "6",
        "--steps", "4", "--methods", "hici-all", "hici-past", "--scratch", str(tmp_path / "scratch"),
        "--out", str(tmp_path / "out"), "--dtype", "float32", "--device", "cpu", "--batch_size", "2",
        "--hici.num_local_slots", "3", "--hici.num_global_slots", "2", "--hici.num_heads", "4",
        "--hici.bottleneck_dim", "32", "--hici.compress_dim", "16",
    ]  # fmt: skip


@pytest.fixture
def worked(monkeypatch):
    """(task, folder name) of each piece of work, done in this process; names in `fail` fail instead."""
    done = []
    fail = set()

    def in_process(task, spec_file, result_file, log):
        done.append((task, Path(result_file).parent.name))
        if Path(result_file).parent.name in fail:
            Path(log).write_text("Traceback\nValueError: no luck today\n")
            return 1
        spec = read_json(spec_file)
        result = {"train": compare_worker.train_one, "evaluate": compare_worker.evaluate}[task](spec)
        write_json(result_file, {"spec": compare_setup.spec_key(spec), **result})
        Path(log).write_text("done\n")
        return 0

    monkeypatch.setattr(compare, "start_worker", in_process)
    return done, fail


def result_of(tmp_path):
    (file,) = (tmp_path / "out").glob("compare-cpu-64-*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_a_comparison_end_to_end_and_finished_runs_are_not_repeated(command, worked, tmp_path, capsys):
    done, _ = worked
    methods = ["full", "hici_s2", "hici-past"]
    command = [*command, "--methods", *methods]
    assert compare.main(command) == 0
    result, text = result_of(tmp_path)
    assert [(run["method"], run["seed"]) for run in result["runs"]] == [
        (method, seed) for seed in (0, 1) for method in methods
    ]
    first, shifted, past, other_seed, *_ = result["runs"]
    assert first["trained"]["seen"] == shifted["trained"]["seen"] == past["trained"]["seen"]  # at each step
    assert first["trained"]["losses"] != shifted["trained"]["losses"]  # and yet another attention
    trainable = {run["method"]: run["trained"]["trainable_parameters"] for run in result["runs"]}
    assert trainable["full"] == trainable["hici_s2"]
    assert trainable["full"]["hici"] == 0 < trainable["hici-past"]["hici"]
    assert len(set(first["trained"]["seen"])) == 4
    assert first["trained"]["seen"] != other_seed["trained"]["seen"]
    assert first["trained"]["tokens"] == 4 * 2 * 64
    assert [each["attention"] for each in first["evaluations"]] == ["full"] * 3
    assert [each["windows"]["context"] for each in past["evaluations"]] == [16, 32, 64] * 2
    assert {each["attention"]: each["leaks_future"] for each in past["evaluations"]} == {"full": False, "hici": False}
    assert all(math.isfinite(loss) for each in past["evaluations"] for loss in each["losses"])
    assert len(past["evaluations"][0]["losses"]) == len(past["evaluations"][0]["windows"]["starts"]) == 6
    assert set(result["baselines"]) == {"base, untouched", "base, rope extended"}
    untouched, extended = (result["baselines"][name][2]["mean_loss"] for name in result["baselines"])
    assert untouched != extended  # at 64 tokens, the base cut to 16
    assert {
        "hici-past - full",
        "hici-past - hici_s2",
        "hici_s2 - full",
        "hici-past, in hici attention - hici-past",
        "hici_s2 - base, untouched",
    } <= {f"{each['a']} - {each['minus']}" for each in result["comparisons"]}
    assert "git_revision" in result["made_with"]
    assert str(tmp_path) not in json.dumps({key: result[key] for key in ("recipe", "settings", "runs", "baselines")})
    assert [
        line.split(" | ")[6] for line in text.splitlines() if line.startswith("| hici-past, in hici attention |")
    ] == ["-"]  # 16 tokens are one segment
    assert "then, `with seeds`, one over windows and seeds" in text
    assert f"compare.py {' '.join(command)}` at revision" in text
    assert "seeds 0, 1; the same tokens in every step" in text
    assert list((tmp_path / "out").glob("*.png"))

    trainings = [entry for entry in done if entry[0] == "train"]
    assert len(trainings) == 6
    done.clear()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        compare.main(command)
    assert "holds runs; give --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([*command, "--resume"])
    assert "nothing is overwritten silently" in capsys.readouterr().err
    (tmp_path / "scratch" / "runs" / "hici-past-seed1" / "trained.json").unlink()  # as if it had been killed
    assert compare.main([*command, "--resume", "--overwrite"]) == 0
    assert done == [("train", "hici-past-seed1"), ("evaluate", "hici-past-seed1")]
    assert result_of(tmp_path)[0]["comparisons"] == result["comparisons"]
    other = tmp_path / "scratch" / "runs" / "hici_s2-seed0" / "trained.json"
    found = read_json(other)
    write_json(other, {**found, "seen": [*found["seen"][:2], "x", "y"]})
    with pytest.raises(SystemExit):
        compare.main([*command, "--resume", "--overwrite"])
    assert "no comparison at equal data: hici_s2 seed 0 saw other tokens than full from step 3" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        compare.main([*command, "--resume", "--overwrite", "--learning_rate", "0.5"])
    assert "begun with other settings (learning_rate: 0.0003 then, 0.5 now)" in capsys.readouterr().err


def test_a_run_that_fails_is_reported_and_the_others_go_on(command, worked, tmp_path, capsys):
    done, fail = worked
    fail.add("hici-all-seed0")
    options = ["--eval-lengths", "64", "--seeds", "0", "--steps", "2", "--profile-steps", "1"]
    assert compare.main([*command, *options]) == 1
    result, text = result_of(tmp_path)
    assert [run["method"] for run in result["runs"]] == ["hici-past"]
    assert "ValueError: no luck today (exit code 1) in runs/hici-all-seed0/trained.log" in result["failures"][0]
    assert "hici-all-seed0: train failed" in text
    assert "seeds 0 (one seed alone: what another would change is not in the intervals)" in text
    assert "a verdict is about them, not about the methods" in text
    assert "with seeds" not in text
    assert {name: len(one["step_seconds"]) for name, one in result["profile"].items()} == {
        "hici-all": 2, "hici-past": 2,
    }  # fmt: skip
    assert result["costs"]["hici-past"]["timed"] == "solo"
    assert result["costs"]["hici-past"]["seconds_per_step"] == result["profile"]["hici-past"]["step_seconds"][1]
    assert {each["minus"] for each in result["comparisons"]} == {"base, untouched", "base, rope extended", "hici-past"}
    fail.clear()
    done.clear()
    assert compare.main([*command, *options, "--resume", "--overwrite"]) == 0
    assert done == [("train", "hici-all-seed0"), ("evaluate", "hici-all-seed0")]
    assert result_of(tmp_path)[0]["failures"] == []


def test_equal_time_gives_full_attention_the_steps_of_the_slowest_hici():
    class Timed(compare.Comparison):
        def __init__(self, steps, **seconds):
            self.args = SimpleNamespace(steps=steps)
            self.profile = {
                name.replace("hici_a", "hici-a").replace("hici_p", "hici-p"): {"step_seconds": [99.0, x], "warm_up": 1}
                for name, x in seconds.items()
            }

        def say(self, line):
            pass

    assert Timed(100, full=4.0, hici_s2=9.0, hici_past=1.0, hici_all=2.0).equal_time_steps() == 50
    assert Timed(100, full=1.0, hici_past=2.0).equal_time_steps() == 100  # never more than the others
    with pytest.raises(ValueError, match=r"takes 4.0 s, more than --steps 3 of HiCI; give more --steps"):
        Timed(3, full=4.0, hici_past=1.0).equal_time_steps()


# ---- the worker


def test_the_recorder_hashes_what_the_embeddings_get_in_training_by_step(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))

    def record(file, batches, resume=False):
        net = model()
        optimizer = torch.optim.AdamW(net.parameters())
        recorder = compare_worker.StepRecorder(file, resume=resume)
        with recorder.recording():
            for step in batches:
                with torch.no_grad():
                    net(torch.tensor([7, 7, 7]))  # an evaluation: not counted
                for ids in step:
                    net(torch.tensor(ids)).sum().backward()
                optimizer.step()
        net(torch.tensor([1])).sum().backward()
        optimizer.step()  # behind the recording: not counted
        return recorder

    one = record(tmp_path / "one", [[[1, 2], [3, 4]], [[5, 6]]]).steps(2)
    assert [step["tokens"] for step in one] == [4, 2]
    assert [step["step"] for step in one] == [1, 2]
    assert all(step["seconds"] > 0 for step in one)
    same = record(tmp_path / "same", [[[1, 2, 3, 4]], [[5, 6]]]).steps(2)
    assert [step["seen"] for step in same] == [step["seen"] for step in one]
    other = record(tmp_path / "other", [[[1, 2], [4, 3]], [[5, 6]]])
    assert other.steps(2)[0]["seen"] != one[0]["seen"]
    assert other.steps(2)[1]["seen"] == one[1]["seen"]
    with pytest.raises(ValueError, match=r"optimizer steps \[1, 2\] were seen, but max_steps=3"):
        other.steps(3)

    cut = tmp_path / "cut"
    cut.write_text((tmp_path / "one").read_text() + '{"step": 3, "sec')  # killed while it wrote
    again = record(cut, [[[8, 8]]], resume=True)  # step 1 is made again
    assert [step["tokens"] for step in again.steps(2)] == [2, 2]
    assert again.steps(2)[1] == one[1]
    assert record(cut, [[[8, 8]]]).steps(1)[0]["tokens"] == 2  # not resumed: begins anew


def test_training_in_another_attention_than_the_recipe_is_refused(monkeypatch, values, tmp_path):
    monkeypatch.setattr("hici.train.run.train", lambda recipe, **options: {"attention": "hici"})
    with pytest.raises(ValueError, match="trained in attention 'hici', but the recipe's method is 'full'"):
        compare_worker.train_one({"recipe": {**values, "method": "full"}})


@pytest.mark.slow
def test_a_benchmark_that_is_killed_goes_on_where_it_was(command, tmp_path):
    """With real processes; the worker of a parent that is gone stops by itself."""
    script = Path(compare.__file__)
    arguments = [sys.executable, str(script), *command, "--steps", "60", "--save_steps", "10", "--eval-lengths", "64",
                 "--seeds", "0"]  # fmt: skip
    parent = subprocess.Popen(arguments, start_new_session=True)
    steps = tmp_path / "scratch" / "runs" / "hici-past-seed0" / "steps.jsonl"
    until = time.monotonic() + 300
    while not (steps.exists() and len(steps.read_text().splitlines()) > 20):  # two checkpoints
        assert time.monotonic() < until
        assert parent.poll() is None
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(2)
    assert len(steps.read_text().splitlines()) < 60, "the worker went on without its parent"
    assert not (steps.parent / "trained.json").exists()
    first = steps.parent.parent / "hici-all-seed0" / "trained.json"
    made = first.stat().st_mtime_ns
    assert subprocess.run([*arguments, "--resume"], start_new_session=True).returncode == 0
    assert first.stat().st_mtime_ns == made
    result, _ = result_of(tmp_path)
    assert [run["trained"]["steps"] for run in result["runs"]] == [60, 60]
    assert result["runs"][0]["trained"]["seen"] == result["runs"][1]["trained"]["seen"]
