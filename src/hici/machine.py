"""Facts about the running process."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import psutil
import torch

_SAMPLE_SECONDS = 0.02


class PeakMemory:
    """Peak bytes of a block of work: `bytes` stands when the block has ended, and is 0 before."""

    bytes: int = 0


@contextlib.contextmanager
def measured_peak(device: torch.device | str) -> Iterator[PeakMemory]:
    """Context: the peak memory of the work inside, with what was held before it (the model's weights, ...).

    On a GPU that of torch's allocator, whose peak is set back (so one such block must not lie inside another). Else the
    process's resident memory, read every 20 ms: a peak between two readings is missed, and memory that an earlier block
    gave back to the allocator but not to the system counts.
    """
    peak = PeakMemory()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    process, ended = psutil.Process(), threading.Event()

    largest = process.memory_info().rss

    def sample() -> None:
        nonlocal largest
        while not ended.wait(_SAMPLE_SECONDS):
            largest = max(largest, process.memory_info().rss)

    sampler = threading.Thread(target=sample, name="hici-memory", daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
        peak.bytes = max(largest, process.memory_info().rss)


def peak_memory(device: torch.device | str) -> int:
    """Peak bytes so far: of a GPU's allocator, else of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined] # only there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
