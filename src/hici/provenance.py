"""How a result was made: versions, git revision, machine, time. Stands in every JSON that hici writes."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from hici._version import __version__

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


def provenance() -> dict[str, Any]:
    """Versions of hici and what it stands on, git revision of hici (or None), machine, UTC time."""
    return {
        "hici": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_revision": git_revision(),
        "machine": {"system": platform.platform(), "cpu_threads": _threads(), "device": _device()},
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_revision() -> str | None:
    """Commit of the checkout that the running hici comes from, with "+changes" where it is not clean; None outside."""
    directory = Path(__file__).parent
    # a virtual environment may lie inside somebody else's checkout: only one that tracks this very file counts
    if _git(directory, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = _git(directory, "rev-parse", "HEAD")
    if not revision:
        return None
    return revision + ("+changes" if _git(directory, "status", "--porcelain", "--untracked-files=no") else "")


def _git(directory: str | Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
