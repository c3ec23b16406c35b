"""`hici report`: the picture and the numbers of training runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Draw training runs: loss, gradient norms, learning rates, speed and memory by optimizer step, held-out losses and
resumes; and print their numbers. RUN is a recipe's output_dir. It reads metrics.jsonl, also while the run goes on, or
train.json where there is no metrics.jsonl. Several runs are drawn over one another."""

_EXAMPLES = """\
examples:
  hici report runs/smollm2-8k
  hici report runs/hici runs/hici_s2 runs/full --out comparison.png"""

_PICTURE = "report.png"


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "report", help="draw training runs", description=_DESCRIPTION, epilog=_EXAMPLES
    )  # fmt: skip
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output_dir of a recipe")
    parser.add_argument("--out", metavar="FILE.png", help=f"the picture (default for one run: RUN/{_PICTURE}, drawn "
                        "anew each time)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def run(args: argparse.Namespace) -> int:
    """Read, draw, print."""
    from hici.report.runs import distinct_labels, read_run
    from hici.report.training import plot_training

    labels = distinct_labels(args.runs)
    target = _target(args)
    runs = [read_run(directory, label) for directory, label in zip(args.runs, labels, strict=True)]
    plot_training(runs, target)
    _print(runs)
    print(f"picture: {target}")
    return 0


def _target(args: argparse.Namespace) -> Path:
    from hici.files import check_writable

    if args.out is None:
        if args.overwrite:
            raise ValueError("--overwrite is for --out only; drop it")
        if len(args.runs) > 1:
            raise ValueError(f"{len(args.runs)} runs have no one place for the picture; give --out FILE.png")
        target = Path(args.runs[0]).expanduser() / _PICTURE
    else:
        target = Path(args.out).expanduser()
        if target.suffix.lower() != ".png":
            raise ValueError(f"--out {args.out} does not end in .png, and a PNG is written; give such a name")
    if target.is_dir():
        raise ValueError(f"{target} is a directory, but a picture is to be written there; give another --out")
    if args.out is not None and target.exists() and not args.overwrite:
        raise ValueError(f"{target} exists, and nothing is overwritten silently; give another --out or --overwrite")
    if target.parent.is_dir() or args.out is not None:  # a RUN that is not there has an error of its own
        check_writable(target.parent)
    return target


def _print(runs: list[Any]) -> None:
    from hici.report.tables import print_facts, print_table
    from hici.report.training import run_facts

    facts = [run_facts(run) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [[name, *(one.get(name, "-") for one in facts)] for name in names]
    leaking = any(run.leaks_future for run in runs)
    note = (
        "not causal: with this visibility a token's loss in hici attention, in training too, sees its future; read "
        "the held-out loss in full attention"
    )
    notes = [note] if leaking else []
    if len(runs) == 1:
        print_facts(runs[0].label, rows, notes)
    else:
        print_table("training runs", ["", *(run.label for run in runs)], rows, notes)
