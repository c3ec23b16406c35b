"""`hici report`: results and training runs as one page, with pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Draw results (of `hici eval`, `hici score`, `hici inspect`) and training runs as one page, index.html, that needs no
network and nothing beside it, and as PNGs; and print the numbers of training runs. RESULT is a result's JSON, a
directory with results and runs (searched itself and one level below), the output_dir of a recipe (also in mid-run),
or a JSON of benchmarks/compare.py. Several are compared. An earlier report is drawn anew; any other directory is left
alone."""

_EXAMPLES = """\
examples:
  hici report runs/smollm2-8k                                  (into runs/smollm2-8k/report)
  hici report results/base results/adapter --out report
  hici report runs/hici runs/hici_s2 runs/full --out comparison"""

_FOLDER = "report"


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "report", help="a page of results and training runs", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.add_argument("results", metavar="RESULT", nargs="+", help="result JSON, directory, or training run")
    parser.add_argument("--out", metavar="DIR", help=f"directory (default for one directory: RESULT/{_FOLDER})")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report also where files were "
                        "added to it")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Read, draw, print."""
    from hici.report.gather import gather
    from hici.report.write import check_report_target, write_report

    target = _target(args)
    gathered = gather(args.results)
    check_report_target(target, overwrite=args.overwrite)
    page = write_report(gathered, target, overwrite=args.overwrite)
    if gathered.runs:
        _print(gathered.runs)
    print(f"report: {page}")
    return 0


def _target(args: argparse.Namespace) -> Path:
    from hici.files import refuse_sources

    if args.out is None:
        if len(args.results) > 1:
            raise ValueError(f"{len(args.results)} results have no one place for the report; give --out DIR")
        source = Path(args.results[0]).expanduser()
        if source.is_file():
            raise ValueError(f"{source} is a file, so there is no directory for the report yet; give --out DIR")
        return source / _FOLDER
    refuse_sources(args.out, *args.results)
    return Path(args.out).expanduser()


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
