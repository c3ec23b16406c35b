"""FSDP2 and DDP on two gloo ranks: the loss and the gradients of one process."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import assert_same_gradients, difference, loss_and_gradients

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="no gloo in this torch"
)


def test_two_ranks_equal_one_process(tmp_path):
    """One launch for all cases: starting Python twice is most of the time."""
    ends = [str(tmp_path / "store"), str(tmp_path / "out.pt")]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), *ends], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)

    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    results = torch.load(tmp_path / "out.pt")
    assert list(results) == worker.RUNS
    for (task, case), (loss, gradients) in results.items():
        expected_loss, expected = loss_and_gradients(worker.build(case), worker.IDS)
        assert difference(loss, expected_loss) < 1e-5, (task, case)
        assert all(gradient is not None for gradient in gradients.values()), (task, case)
        assert_same_gradients(gradients, expected, 2e-5)
