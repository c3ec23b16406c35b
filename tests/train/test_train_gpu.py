"""`hici train` on a CUDA device: run with `pytest -m gpu`. Skipped without one."""

import importlib.util
import shutil

import pytest
import torch

from hici.train.recipe import recipe_from_dict
from hici.train.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture
def run(values, tmp_path):
    """train() of the tiny recipe on the GPU into a directory of its own."""

    def make(name, resume=False, **changes):
        changes = {"device": "cuda", "dtype": "bfloat16", "output_dir": str(tmp_path / name), **changes}
        return train(recipe_from_dict({**values, **changes}), resume=resume, progress=False)

    return make


def losses(result):
    return [step["loss"] for step in result["steps"]]


@pytest.mark.parametrize("method", ["hici", "hici_s2", "full"])
def test_training_lowers_the_heldout_loss(run, method):
    result = run(method, method=method)
    held_out = result["heldout_loss"]
    assert held_out["after"][method] < held_out["before"][method] - 0.3
    assert result["peak_memory_bytes"] > 0


def test_what_saves_memory_changes_no_loss(run):
    plain = run("plain", max_steps=4)
    for name, changes in {
        "tiled": {"mlp_tile": 16},
        "offloaded": {"offload_checkpoints": True},
        "both": {"mlp_tile": 16, "offload_checkpoints": True},
        "not recomputed": {"gradient_checkpointing": False},
    }.items():
        assert losses(run(name, max_steps=4, **changes)) == pytest.approx(losses(plain), abs=2e-2), name


def test_a_resumed_run_goes_on(run, tmp_path):
    whole = run("whole", save_steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000008", tmp_path / "cut/checkpoints/step-00000008")
    again = run("cut", save_steps=4, resume=True)
    assert losses(again)[:8] == losses(whole)[:8]
    assert losses(again) == pytest.approx(losses(whole), abs=2e-2)  # sums of atomic adds differ in their order


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("changes", [{"optimizer": "adamw_8bit"}, {"optimizer": "paged_adamw_8bit"},
                                     {"quantization": "4bit"}, {"quantization": "8bit"}], ids=str)  # fmt: skip
def test_bitsandbytes(run, changes):
    result = run("run", **changes)
    assert losses(result)[-1] < losses(result)[0] - 0.3
