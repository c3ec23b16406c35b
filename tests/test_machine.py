"""Peak memory of a block of work."""

import threading

import pytest
import torch

from hici.machine import measured_peak

MIB = 2**20


def _samplers():
    return [thread for thread in threading.enumerate() if thread.name == "hici-memory"]


def test_memory_that_is_gone_at_the_end_counts():
    with measured_peak("cpu") as idle:
        assert (idle.bytes, len(_samplers())) == (0, 1)
    with measured_peak("cpu") as busy:
        held = torch.ones(100 * MIB // 4)
        for _ in range(20):  # several times the distance of two readings
            held.add_(1)
            threading.Event().wait(0.005)
        del held
    assert 80 * MIB < busy.bytes - idle.bytes < 200 * MIB
    assert not _samplers()


def test_memory_taken_just_before_the_end_counts():
    with measured_peak("cpu") as idle:
        pass
    with measured_peak(torch.device("cpu")) as busy:
        held = torch.ones(100 * MIB // 4)
    assert 80 * MIB < busy.bytes - idle.bytes < 200 * MIB
    assert held.sum() > 0


def test_a_block_that_fails_leaves_its_peak_and_no_thread():
    with pytest.raises(ValueError, match="broken"), measured_peak("cpu") as peak:
        raise ValueError("broken")
    assert peak.bytes > MIB
    assert not _samplers()


@pytest.mark.gpu
def test_a_gpus_peak_is_that_of_the_block():
    before = torch.cuda.memory_allocated()
    large = torch.ones(64 * MIB, device="cuda")
    del large
    with measured_peak("cuda") as peak:
        small = torch.ones(8 * MIB // 4, device="cuda")
        del small
    assert 8 * MIB <= peak.bytes - before < 16 * MIB
