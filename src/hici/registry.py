"""One file, one entry: a registry is a package whose modules each define one entry.

Adding an attention backend or an architecture means adding a file to the package; nothing else is edited.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from typing import Any


def suggest(name: str, known: Iterable[str], what: str, remedy: str = "") -> str:
    """The text of an error about an unknown name: the value, the known names, the nearest one."""
    known = sorted(known)
    longer = [each for each in known if name and each.startswith(name)]  # gemma3: gemma3_text rather than gemma2
    near = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" {remedy}" if remedy else ""
    return f"unknown {what} {name!r}; known: {', '.join(known)}.{hint}{tail}"


def module_names(package: str) -> list[str]:
    """Public module names of a package, sorted, without importing them."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def entries(package: str, attribute: str) -> Iterator[Any]:
    """The value of `attribute` of every module of `package` that defines it."""
    for name in module_names(package):
        module = importlib.import_module(f"{package}.{name}")
        if hasattr(module, attribute):
            yield getattr(module, attribute)
