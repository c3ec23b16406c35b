"""The processes of a run: started by torchrun or accelerate launch, one when by neither."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]


def rank() -> int:
    """This process's number, from the launcher's environment; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes, from the launcher's environment; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wants_fsdp() -> bool:
    """Whether accelerate's environment (its launcher's config file) asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wants_deepspeed() -> bool:
    """Whether accelerate's environment asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def join_processes() -> None:
    """Make a process group (gloo) of what the launcher started, unless there is one; nothing for one process.

    For work that is divided among whole models: processes wait for the slowest one, however long that takes.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))


def end_processes() -> None:
    """Leave the process group, all processes together.

    A DDP wrapper is a reference cycle that keeps gloo's threads: collected first, or the interpreter's end aborts.
    """
    import torch.distributed as dist  # here: knowing one's rank must not take torch's import

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def only_run_in(directory: Path, lock: str = ".lock") -> Iterator[None]:
    """Context: no other run writes into `directory` (the lock goes with the process, however that ends).

    `lock`: the lock's file, where a directory holds what several runs may write side by side.

    Raises:
        ValueError: another one does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (directory / lock).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another run is writing into {directory}; wait for it, stop it, or give another output directory"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


@contextlib.contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Context: of several processes that share `directory`, one after the other. (The first does what all need.)"""
    if world_size() == 1 or fcntl is None:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".one_at_a_time").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: then all do it
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def everyones(value: Any) -> list[Any]:
    """What every process has, in their order. All of them must call it together."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found
