"""Runs that are killed, and what is compared of two runs. Nothing here is a test.

`killed_at` runs in a child of multiprocessing's fork server, which has imported everything already: a kill costs one
short training instead of one more start of Python.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from hici.report.runs import read_run

SRC = Path(__file__).resolve().parents[2] / "src"
EXACT = (
    "step",
    "loss",
    "learning_rate",
    "hici_learning_rate",
    "hici_grad_norm",
    "other_grad_norm",
    "segments",
    "tokens",
)


def write_recipe(values, path):
    path.write_text(yaml.safe_dump(values))
    return path


def curve(run):
    """The loss curve of a run's train.json and what belongs to it: all numbers that do not depend on the clock."""
    saved = json.loads((Path(run) / "train.json").read_text())
    return [exact(step) for step in saved["steps"]]


def exact(step):
    """A step's numbers that do not depend on the clock."""
    return {key: step[key] for key in EXACT if key in step}


def tensors(run):
    """Every tensor of a run's adapter, by file and name."""
    return {
        (file.name, name): tensor
        for file in sorted((Path(run) / "adapter").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_run(run, expected):
    """Bit-equal adapters, equal curves and losses, and nothing left under temporary names."""
    assert curve(run) == curve(expected)
    ours, theirs = tensors(run), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    saved = [json.loads((Path(place) / "train.json").read_text()) for place in (run, expected)]
    for key in ("heldout_loss", "first_sequence_loss"):
        assert saved[0][key] == saved[1][key]
    assert [exact(step) for step in read_run(run).steps] == curve(expected)  # metrics.jsonl: each step once
    assert leftovers(run) == []


def checkpoints(run):
    """The steps of the checkpoints that stand."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def leftovers(run):
    """What stands under temporary names."""
    return sorted(p.name for p in Path(run).rglob(".*") if p.name != ".lock")


def environment(**changes):
    """The environment of a subprocess that runs this checkout's hici as the tests do: one thread, offline."""
    path = os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def start_command(recipe, *flags):
    """`python -m hici train RECIPE`, as a user starts it."""
    command = [sys.executable, "-m", "hici", "train", str(recipe), *flags]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_child(recipe, moment=None):
    """The same in a child of the fork server, which kills itself at `moment` (see `killed_at`)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hici.train.run", "hici.cli.main", "matplotlib.figure"])
    child = context.Process(target=killed_at, args=(str(recipe), moment))
    child.start()
    return child


def killed_at(recipe, moment):
    """Run a recipe; SIGKILL at a moment of writing: nothing of Python runs after it, no `finally`, no buffer."""
    from hici.cli.main import main

    torch.set_num_threads(1)
    if moment is not None:
        MOMENTS[moment]()
    os._exit(main(["train", recipe]))


def _kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _in_a_file():
    import hici.train.trainer as module

    original, calls = module.save_file, []

    def half(found, path):
        original(found, path)
        calls.append(path)
        if len(calls) == 4:  # the optimizer of the second checkpoint
            os.truncate(path, path.stat().st_size // 2)
            _kill()

    module.save_file = half


def _before_the_rename():
    import hici.files as module

    original = module._swap
    module._swap = lambda temporary, target: (_kill if target.name == "step-00000004" else original)(temporary, target)


def _in_removing_an_old_one():
    import hici.train.checkpoint as module

    def half(path):
        (path / module.COMPLETE).unlink()
        _kill()

    module._remove = half


def _in_the_adapter():
    import hici.adapters.save as module

    original = module.write_hici
    module.write_hici = lambda *args: (original(*args), _kill())


def _before_the_log():
    import hici.train.run as module

    module.write_json = _kill


MOMENTS = {
    "in a file": _in_a_file,
    "before the rename": _before_the_rename,
    "in removing an old one": _in_removing_an_old_one,
    "in the adapter": _in_the_adapter,
    "before the log": _before_the_log,
}
