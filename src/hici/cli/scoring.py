"""What the verbs of `hici score` share: flags, and comparing with other scores."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_score_flags(parser: argparse.ArgumentParser, files: str) -> None:
    """DIR, --output, --overwrite, --compare."""
    parser.add_argument("directory", metavar="DIR", help=f"one model's folder of {files}")
    parser.add_argument("--output", "--out", metavar="FILE.json", help="write the result")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--compare", metavar="FILE.json", help="show differences from these scores: a result of this "
                        "verb, or {name: score}")  # fmt: skip


def score_target(args: argparse.Namespace) -> Path | None:
    """The result's path from --output, checked; None without --output."""
    from hici.eval.measure import check_target

    if args.output is None:
        if args.overwrite:
            raise ValueError("--overwrite is for --output only; drop it")
        return None
    return check_target(Path(args.output).expanduser())


def read_comparison(args: argparse.Namespace, field: str) -> dict[str, float] | None:
    """The scores of --compare: `field` of a result, or the whole file. None without --compare.

    Raises:
        ValueError: no such file; no JSON; anything else than numbers by name.
    """
    if args.compare is None:
        return None
    from hici.eval.results import is_result, read_result
    from hici.files import read_json

    found = read_json(Path(args.compare).expanduser())
    if is_result(found):
        found = read_result(Path(args.compare).expanduser()).get(field)
    numbers = isinstance(found, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in found.values()
    )
    if not numbers or not found:
        raise ValueError(f"--compare {args.compare} holds no {{name: score}}; give a result with {field!r} of this "
                         "verb, or a JSON object of numbers")  # fmt: skip
    return {str(name): float(value) for name, value in found.items()}


def compared(score: float, other: float | None) -> list[str]:
    """Cells for the other score and the difference from it."""
    return ["-", "-"] if other is None else [f"{other:.2f}", f"{score - other:+.2f}"]


def comparison_notes(scores: dict[str, float], other: dict[str, float] | None, name: str) -> list[str]:
    """What is on one side only."""
    if other is None:
        return []
    only = [(f"not in {name}", set(scores) - set(other)), (f"only in {name}", set(other) - set(scores))]
    return [f"{where}: {', '.join(sorted(names))}" for where, names in only if names]
