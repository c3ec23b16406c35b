"""Real text that every machine with Python has: the standard library's sources and the interpreter's help topics."""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from pathlib import Path

from hici.files import write_text

# packages of long, hand-written modules; tests, generated tables and vendored code stay out
PACKAGES = ("", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging",
            "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree")  # fmt: skip
SMALLEST = 8_000  # bytes; a module or topic below says little about long context


def training_and_heldout(directory: Path, heldout_fraction: float = 0.15) -> tuple[list[str], list[str]]:
    """Paths of training and held-out documents, split by a hash of their names: the same on every run.

    Help topics are written to `directory`, since they live inside one Python file.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = {
        f"{package}/{path.name}": path for package in PACKAGES for path in sorted((library / package).glob("*.py"))
    }
    for name, text in importlib.import_module("pydoc_data.topics").topics.items():
        files[f"topic/{name}"] = write_text(directory / f"topic-{name}.txt", text)
    sides: tuple[list[str], list[str]] = ([], [])
    for name, path in files.items():
        if path.stat().st_size >= SMALLEST:
            fraction = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
            sides[fraction < heldout_fraction].append(str(path))
    return sides
