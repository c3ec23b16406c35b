"""`hici eval all`: both suites, going on after an interruption, its printed commands alone, rope, and its refusals."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from test_cli_longbench import write_data

from hici.cli.main import main, parse
from hici.cli.suites import SUITES, default_lengths
from hici.eval import protocols
from hici.eval.results import read_result
from hici.eval.retrieval import run as retrieval

BEYOND = "--allow-beyond-rope"  # the tests' models have 128 positions
TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")
QUICK = ["inspect.json", "ppl-position.json", "ppl-strict.json", "retrieval.json"]


def numbers(directory):
    """{name: all of a result but times and provenance} of a folder."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        record = read_result(path)
        del record["provenance"]
        record["conditions"] = [{k: v for k, v in c.items() if k not in TIMES} for c in record["conditions"]]
        found[path.name] = record
    return found


def printed_commands(out):
    """The verbs that a suite has run, as arguments; the report is the last of them."""
    return [shlex.split(line)[2:] for line in out.splitlines() if line.startswith("$ hici ")]


def content(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.json")}


@pytest.fixture(scope="module")
def small_suites():
    """As few prompts as can be, of everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "quick", replace(SUITES["quick"], depths=2))
        patch.setitem(SUITES, "full", replace(SUITES["full"], depths=1, samples=1, max_windows=2))
        yield


def save_nothing(figure, target, **kwargs):
    """Instead of a picture, which takes longer than all else in a small suite."""
    image.imsave(target, np.zeros((2, 2, 3)), format="png")


@pytest.fixture
def empty_pictures(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", save_nothing)


@pytest.fixture
def suite(small_suites, text_file, tmp_path, hici_command):
    """Run `hici eval all MODEL ...` on the text, into tmp_path/out."""

    def run(model, *arguments, data=text_file):
        return hici_command("eval", "all", model, "--data", data, "--out", tmp_path / "out", *arguments)

    return run


def test_what_is_run_can_be_run_alone(suite, empty_pictures, adapter_directory, tmp_path, hici_command):
    flags = ["--lengths", 250, "--attention", "full", "hici", "hici_s2", BEYOND, "--segment-size", 24]
    done = suite(adapter_directory, *flags)
    assert done.status == 0, done.err
    out = tmp_path / "out"
    whole = numbers(out)
    assert list(whole) == QUICK
    assert "left out: retrieval, LongBench and lm tasks in attention hici_s2, which is for training and" in done.out
    assert [c["context"] for c in whole["ppl-strict.json"]["conditions"]] == [250] * 3
    assert [c["attention"] for c in whole["ppl-position.json"]["conditions"]] == ["full", "hici", "hici_s2"]
    assert {c["attention"] for c in whole["retrieval.json"]["conditions"]} == {"full", "hici"}
    assert whole["inspect.json"]["conditions"][0]["segments"] == 11
    *commands, report = printed_commands(done.out)
    assert report == ["report", str(out)]
    page = (out / "report" / "index.html").read_text()
    assert all(each in page for each in ("perplexity", "passkey", "global slots"))
    assert len(list((out / "report").rglob("*.png"))) >= 4
    for command in commands:
        alone = hici_command(*[tmp_path / "alone" if word == str(out) else word for word in command])
        assert alone.status == 0, alone.err
        assert "left out" not in alone.out
    assert numbers(tmp_path / "alone") == whole
    before = content(out)
    again = suite(adapter_directory, *flags)
    assert again.status == 0, again.err
    assert again.err.count("holds this very measurement already") == 4
    assert (content(out), again.out) == (before, done.out)


INTERRUPTED = ["--lengths", 250, "--attention", "full", "hici", BEYOND]


@pytest.fixture(scope="module")
def uninterrupted(small_suites, adapter_directory, text_file, tmp_path_factory):
    """The numbers of a suite that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_nothing)
        words = ["eval", "all", adapter_directory, "--data", text_file, *INTERRUPTED, "--out", out]
        assert main([str(word) for word in words]) == 0
    return numbers(out)


# of strict four windows in each of two attentions, of position three; of passkeys two depths
@pytest.mark.parametrize("module, name, at", [(protocols, "window_losses", 10), (retrieval, "answer_prompt", 3)])
def test_an_interrupted_suite_goes_on(
    module, name, at, suite, empty_pictures, uninterrupted, adapter_directory, tmp_path, monkeypatch
):
    measured, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return measured(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    stopped = suite(adapter_directory, *INTERRUPTED)
    assert (stopped.status, len(calls)) == (130, at)
    out = tmp_path / "out"
    half = content(out)
    assert 0 < len(half) < len(QUICK)
    assert len(list(out.glob("*.partial-0.jsonl"))) == 1
    assert not (out / "report").exists()
    done = suite(adapter_directory, *INTERRUPTED)
    assert done.status == 0, done.err
    assert done.err.count("holds this very measurement already") == len(half)
    assert "parts were measured before; going on" in done.err
    assert half.items() <= content(out).items()
    assert not list(out.glob("*.jsonl"))
    assert numbers(out) == uninterrupted


def test_rope_is_extended_once_and_said_to_be(suite, empty_pictures, adapter_directory, tmp_path, hici_command):
    done = suite(adapter_directory, "--lengths", 300, 250, "--attention", "hici", "--rope", "auto", "--longbench",
                 write_data(tmp_path / "longbench", hotpotqa=1, trec=1))  # fmt: skip
    assert done.status == 0, done.err
    out = tmp_path / "out"
    results = numbers(out)
    assert list(results) == sorted([*QUICK, "longbench.json"])
    assert [c["context"] for c in results["ppl-strict.json"]["conditions"]] == [250, 300]
    for name, record in results.items():
        rope = record["model"]["rope"]
        assert (rope["extended"], rope["positions_before"], rope["positions"]) == ("linear", 128, 300), name
    assert results["longbench.json"]["conditions"][0]["max_length"] == 300 - 64  # trec asks for 64 tokens
    before = content(out)
    for command in printed_commands(done.out)[:-1]:
        alone = hici_command(*command)
        assert alone.status == 0, alone.err
        assert "holds this very measurement already" in alone.err
    assert content(out) == before


def test_a_base_without_hici(suite, empty_pictures, base_directory, tmp_path, hici_command):
    done = suite(base_directory, "--lengths", 250, "--attention", "full", "hici_s2", "--segment-size", 32, BEYOND)
    assert done.status == 0, done.err
    out = tmp_path / "out"
    assert list(numbers(out)) == [name for name in QUICK if name != "inspect.json"]
    assert (out / "report" / "index.html").is_file()
    before = content(out)
    for command in printed_commands(done.out)[:-1]:
        assert ("--segment-size" in command) == ("hici_s2" in command)
        alone = hici_command(*command)
        assert alone.status == 0, alone.err
        assert "holds this very measurement already" in alone.err
    assert content(out) == before
    assert "inspect" not in done.out


def test_segments_that_hold_a_whole_text_are_not_inspected(suite, empty_pictures, adapter_directory, tmp_path):
    done = suite(adapter_directory, "--lengths", 250, "--attention", "hici", "--segment-size", 250, BEYOND)
    assert done.status == 0, done.err
    assert "left out: hici inspect, since no segment of 250 tokens has slots to look at" in done.out
    assert list(numbers(tmp_path / "out")) == [name for name in QUICK if name != "inspect.json"]
    assert (tmp_path / "out" / "report" / "index.html").is_file()


def test_the_full_suite(suite, empty_pictures, adapter_directory, text_file, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(2 * text_file.read_text())
    flags = ["--suite", "full", "--lengths", 900, "--attention", "hici", "--visibility", "all", BEYOND]
    done = suite(adapter_directory, *flags, "--seed", 7, data=text)
    assert done.status == 0, done.err
    results = numbers(tmp_path / "out")
    assert list(results) == sorted([*QUICK, "ppl-published.json"])
    assert [c["task"] for c in results["retrieval.json"]["conditions"]] == list(SUITES["full"].tasks)
    assert results["retrieval.json"]["seed"] == 7
    assert not any(c["causal"] for record in results.values() for c in record["conditions"])
    assert "not causal" in (tmp_path / "out" / "report" / "index.html").read_text()
    assert done.err.count("the slots that a token sees summarise its own future") == 1  # of inspect, told once
    before = content(tmp_path / "out")
    done = suite(adapter_directory, *flags, "--seed", 8, data=text)
    assert done.status == 2
    assert "its seed is 7, now 8" in done.err
    assert content(tmp_path / "out") == before


def test_every_flag_of_a_suite_reaches_its_verbs(monkeypatch, text_file, tmp_path):
    from hici.cli.eval_all import suite_commands

    folder = write_data(tmp_path / "longbench", hotpotqa=1)
    args = parse(["eval", "all", "m", "--data", "a b.txt", "c.txt", "--text-key", "body", "--attention", "full", "hici",
                  "--base-model", "base", "--context-length", "4", "--num-heads", "2", "--threads", "1", "--device",
                  "cpu", "--dtype", "float32", "--num-segments", "3", "--visibility", "past", "--rope", "yarn", BEYOND,
                  "--longbench", str(folder), "--lm-tasks", "x", "y", "--include-path", "tasks", "--out", "o",
                  "--overwrite"])  # fmt: skip
    commands, left_out = suite_commands(args, SUITES["quick"], [250, 300], inspected=True)
    assert left_out == []
    parsed = [parse(command) for command in commands]
    assert [(each.verb, getattr(each, "protocol", None)) for each in parsed] == [
        ("eval", "strict"), ("eval", "position"), ("eval", None), ("eval", None), ("eval", None), ("inspect", None),
    ]  # fmt: skip
    shared = ("model", "base_model", "context_length", "num_heads", "threads", "device", "dtype", "segment_size",
              "num_segments", "visibility", "no_slots", "rope", "allow_beyond_rope", "out", "overwrite")  # fmt: skip
    for each in parsed:
        assert {name: getattr(each, name) for name in shared} == {name: getattr(args, name) for name in shared}
        assert each.attention == (["hici"] if each.verb == "inspect" else ["full", "hici"])
        if "text_key" in each:
            assert (each.data, each.text_key) == (args.data, "body")
    strict, position, passkeys, longbench, lm, inspect = parsed
    assert (strict.context, position.context, passkeys.lengths) == ([250, 300], [300], [250, 300])
    assert (longbench.data, longbench.max_length) == ([str(folder)], 300 - 32)
    assert (lm.tasks, lm.include_path, lm.max_length, inspect.context) == (["x", "y"], "tasks", 300, 300)


@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("adapter", ["--lengths", 250, 100], "length 100 is too short for task passkey"),
        ("adapter", ["--suite", "full", "--lengths", 400], "length 400 is too short for task variables"),
        ("adapter", [], "length 128 is too short for task passkey"),  # of the model's positions
        ("adapter", ["--lengths", 5000], "fewer than one window of 5000"),
        ("adapter", ["--lengths", 250, 250], "--lengths 250 250 names one twice"),
        ("adapter", ["--lengths", 250, "--longbench", "/no/such"], "/no/such does not exist"),
        ("adapter", ["--lengths", 250, "--longbench", "LONG"], "answers take up to 512 tokens"),
        (
            "adapter",
            ["--lengths", 250, "--attention", "hici_s2", "--lm-tasks", "x"],
            "hici_s2 is for training and perplexity",
        ),
        ("adapter", ["--lengths", 250, "--seed", -1], "seed=-1 is below 0"),
        ("adapter", ["--lengths", 250, "--out", "a.json"], "--out a.json: a suite writes several results; give a dir"),
        ("adapter", ["--lengths", 250, "--visibility", "past"], "--visibility changes nothing in attention full"),
        ("adapter", ["--suite", "quicker"], "Did you mean 'quick'?"),
        ("base", ["--lengths", 250, "--attention", "hici"], "fresh random ones"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_refused_before_anything_is_measured(model, flags, message, suite, base_directory, adapter_directory, tmp_path):
    folder = write_data(tmp_path / "longbench", gov_report=1)
    flags = [folder if flag == "LONG" else flag for flag in flags]
    done = suite({"base": base_directory, "adapter": adapter_directory}[model], *flags, BEYOND)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_out_is_needed_and_nothing_there_is_replaced(suite, adapter_directory, text_file, tmp_path, hici_command):
    done = hici_command("eval", "all", adapter_directory, "--data", text_file, "--lengths", 250, BEYOND)
    assert (done.status, done.out) == (2, "")
    assert "--out is missing; give a directory" in done.err
    (tmp_path / "out" / "report").mkdir(parents=True)
    (tmp_path / "out" / "report" / "mine.txt").write_text("mine")
    done = suite(adapter_directory, "--lengths", 250, BEYOND)
    assert (done.status, done.out) == (2, "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report"]
    assert (tmp_path / "out" / "report" / "mine.txt").read_text() == "mine"


def test_default_lengths():
    quick, full = SUITES["quick"], SUITES["full"]
    assert default_lengths(full, 5000) == [1024, 2048, 4096]
    assert default_lengths(quick, 131072) == [2048, 4096, 8192]
    assert default_lengths(full, 16384) == [1024, 2048, 4096, 8192, 16384]
    assert default_lengths(quick, 1000) == [1000]


def test_results_of_a_suite_are_json_of_one_model(suite, empty_pictures, base_directory, tmp_path):
    """A result says the same of the model, whichever verb wrote it."""
    assert suite(base_directory, "--lengths", 250, BEYOND).status == 0
    models = [json.loads(path.read_text())["model"] for path in (tmp_path / "out").glob("*.json")]
    assert len(models) == 3
    assert models[0] == models[1] == models[2]
