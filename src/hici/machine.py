"""Facts about the running process."""

from __future__ import annotations

import sys

import psutil
import torch


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
