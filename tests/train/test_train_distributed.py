"""Two gloo processes, DDP and FSDP2: losses, gradients and weights of one process with the same rows a step."""

import copy
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hici
from helpers import relative
from hici.train.trainer import LanguageModel
from training_runs import environment
from training_worker import run_case

WORKER = Path(__file__).with_name("training_worker.py")
TIMEOUT = 540  # seconds
STEPS = 3
TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="no gloo in this torch"
)

# what a run is, without how it is dealt out; "rows" a step
RUNS = {
    "past": {"visibility": "past", "gradient_checkpointing": True, "segment_counts": [2, 4], "accumulation": 2},
    "all": {"visibility": "all", "gradient_checkpointing": False, "accumulation": 1},
    "s2": {"method": "hici_s2", "gradient_checkpointing": True, "segment_counts": [2, 4], "accumulation": 2},
    "full": {"method": "full", "gradient_checkpointing": False, "accumulation": 1},
    "past-plain": {"visibility": "past", "gradient_checkpointing": False, "accumulation": 2},
    "all-checkpointed": {"visibility": "all", "gradient_checkpointing": True, "accumulation": 2},
    "s2-plain": {"method": "hici_s2", "gradient_checkpointing": False, "accumulation": 1},
    "full-checkpointed": {"method": "full", "gradient_checkpointing": True, "accumulation": 2},
}
FAST = [("ddp", "past"), ("fsdp", "past"), ("fsdp", "all"), ("ddp", "s2"), ("fsdp", "full")]
ALL = [(engine, run) for engine in ("ddp", "fsdp") for run in RUNS]
FIRST = 2  # the checkpoint that others resume


def values_of(common_values, run, output, processes):
    """A recipe of 4 rows a step."""
    changes = dict(RUNS[run])
    accumulation = changes.pop("accumulation")
    values = copy.deepcopy(common_values)
    values["hici"]["visibility"] = changes.pop("visibility", "past")
    if "segment_counts" in changes:
        del values["hici"]["segment_size"]
    return {**values, **changes, "output_dir": str(output), "max_steps": STEPS, "heldout_windows": 3, "save_steps": 1,
            "keep_checkpoints": 9, "batch_size": 4 // accumulation // processes, "warmup_steps": 0,
            "gradient_accumulation_steps": accumulation, "learning_rate": 2e-5, "hici_learning_rate": 2e-4}  # fmt: skip


def checkpoint(run, step):
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def launch(cases, place, processes=2):
    """Run the cases in one launch; {name: what the first process recorded}."""
    (place / "cases.json").write_text(json.dumps({"out": str(place / "out.pt"), "cases": cases}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(place / "cases.json")],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(o[-4000:] for o in outputs)
    return torch.load(place / "out.pt")


def assert_same_training(found, expected, name):
    """Losses, norms and gradients of each step, and losses before and after."""
    assert found.get("error") is None, found.get("error")
    ours, theirs = found["result"], expected["result"]
    assert len(ours["steps"]) == STEPS
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert (a["tokens"], a.get("segments")) == (b["tokens"], b.get("segments")), name
        for key in ("loss", "hici_grad_norm", "other_grad_norm", "learning_rate", "hici_learning_rate"):
            assert (key in a) == (key in b), (name, key)
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=TOLERANCE), (name, a["step"], key)
    for when in ("before", "after"):
        assert ours["heldout_loss"][when] == pytest.approx(theirs["heldout_loss"][when], rel=TOLERANCE), name
    gradients = expected["gradients"][-len(found["gradients"]) :]
    for step, (a, b) in enumerate(zip(found["gradients"], gradients, strict=True)):
        assert a.keys() == b.keys()
        for parameter, gradient in b.items():
            assert relative(a[parameter], gradient) < TOLERANCE, (name, step, parameter)


def assert_same_weights(run, expected):
    ours, theirs = (load_file(checkpoint(place, STEPS) / "weights.safetensors") for place in (run, expected))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        # Adam divides each gradient by its own size: where that is small, a rounding becomes a part of a whole step
        assert relative(ours[name], theirs[name]) < 20 * TOLERANCE, name


def assert_saved_whole(run):
    """The adapter, read back, holds bit for bit what was gathered after the last step."""
    weights = load_file(checkpoint(run, STEPS) / "weights.safetensors")
    model = LanguageModel(hici.from_pretrained(Path(run) / "adapter", dtype=torch.float32))
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        assert torch.equal(parameters[name], weight), name


class Runs:
    """Runs on one process, made once, and launches."""

    def __init__(self, common_values, place):
        self.common_values = common_values
        self.place = place
        self.alone = {}

    def expected(self, run):
        if run not in self.alone:
            self.alone[run] = run_case(values_of(self.common_values, run, self.place / f"alone-{run}", 1))
        return self.alone[run]

    def case(self, engine, run, name=None, **more):
        name = name or f"{engine}-{run}"
        return {
            "name": name,
            "engine": engine,
            "values": values_of(self.common_values, run, self.place / name, 2),
        } | more


@pytest.fixture(scope="module")
def runs(common_values, tmp_path_factory):
    return Runs(common_values, tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def launched(runs):
    """One launch for all cases of the fast tests: starting Python twice is most of the time."""
    runs.expected("past")
    small = runs.case("ddp", "past", "small")
    (runs.place / "short.txt").write_text("the a cat dog river " * 14)  # one sequence of 64
    small["values"] |= {"data": [str(runs.place / "short.txt")], "heldout_windows": 0}
    cases = [
        *(runs.case(engine, run) for engine, run in FAST),
        runs.case("ddp", "past", "fsdp-to-ddp", resume_from=str(checkpoint(runs.place / "fsdp-past", FIRST))),
        runs.case("fsdp", "past", "ddp-to-fsdp", resume_from=str(checkpoint(runs.place / "ddp-past", FIRST))),
        runs.case("fsdp", "past", "alone-to-fsdp", resume_from=str(checkpoint(runs.place / "alone-past", FIRST))),
        runs.case("ddp", "past", "ddp-nan", nan=1),
        runs.case("fsdp", "past", "fsdp-nan", nan=1),
        small,
    ]
    return launch(cases, runs.place)


@pytest.mark.parametrize("engine, run", FAST)
def test_two_processes_train_as_one(runs, launched, engine, run):
    name = f"{engine}-{run}"
    kind = "DTensor" if engine == "fsdp" else "DistributedDataParallel"
    assert kind in launched[name]["kinds"]
    assert launched[name]["result"]["processes"] == 2
    assert_same_training(launched[name], runs.expected(run), name)
    assert_same_weights(runs.place / name, runs.place / f"alone-{run}")
    assert_saved_whole(runs.place / name)


@pytest.mark.parametrize("name", ["fsdp-to-ddp", "ddp-to-fsdp", "alone-to-fsdp"])
def test_a_checkpoint_is_resumed_by_another_engine(runs, launched, name):
    assert len(launched[name]["gradients"]) == STEPS - FIRST
    assert_same_training(launched[name], runs.expected("past"), name)
    assert_same_weights(runs.place / name, runs.place / "alone-past")
    assert_saved_whole(runs.place / name)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_is_resumed_by_one(runs, launched, engine):
    name = f"{engine}-to-alone"
    source = checkpoint(runs.place / f"{engine}-past", FIRST)
    shutil.copytree(source, checkpoint(runs.place / name, FIRST))
    found = run_case(values_of(runs.common_values, "past", runs.place / name, 1), resume=True)
    assert len(found["gradients"]) == STEPS - FIRST
    assert_same_training(found, runs.expected("past"), name)
    assert_same_weights(runs.place / name, runs.place / "alone-past")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_nan_on_one_process_stops_all(runs, launched, engine):
    for error in launched[f"{engine}-nan"]["errors"]:
        assert error.startswith("TrainingDivergedError: the gradient norm of the ")
        assert "is nan at step 2, in " in error
        assert "on row " in error
    place = checkpoint(runs.place / f"{engine}-nan", 1).parent
    assert [path.name for path in place.iterdir()] == ["step-00000001"]


def test_fewer_sequences_than_processes_are_refused(launched):
    expected = (
        "ValueError: 2 processes of 1 sequences need more than the 1 sequences that the data gives; start fewer "
        "processes, give more text, or a shorter context"
    )
    assert launched["small"]["errors"] == [expected] * 2


@pytest.mark.slow
def test_every_method_on_every_engine(runs):
    results = launch([runs.case(engine, run, f"slow-{engine}-{run}") for engine, run in ALL], runs.place)
    for engine, run in ALL:
        name = f"slow-{engine}-{run}"
        assert_same_training(results[name], runs.expected(run), name)
        assert_same_weights(runs.place / name, runs.place / f"alone-{run}")
        assert_saved_whole(runs.place / name)
