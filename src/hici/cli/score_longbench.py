"""`hici score longbench`: LongBench's scores of prediction files."""

from __future__ import annotations

import argparse
from typing import Any

from hici.cli.evaluating import is_first_process, measure_with_bar
from hici.cli.scoring import add_score_flags, compared, comparison_notes, read_comparison, score_target

_DESCRIPTION = """\
Score prediction files as LongBench does: DIR/DATASET.jsonl, one sample a line with pred, answers, all_classes, length
(qasper_e.jsonl, ...: LongBench-E). Scores are percents with two decimals, beside them those by length: below 4,000
words, below 8,000, and the rest.

Similarity of code (lcc, repobench-p) depends on the string matcher that LongBench finds installed: levenshtein (its
usual one) or difflib. Published scores are of either kind; the result names its own.

A line that is no prediction is an error that names it. With --allow-corrupt it scores 0 and stands in the result."""

_EXAMPLES = """\
examples:
  hici score longbench predictions/my-model --output scores.json
  hici score longbench predictions/my-model --edit-similarity difflib --compare predictions/my-model/result.json

Packages for the scores: pip install 'hici[scores]'"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "longbench", help="LongBench's scores", description=_DESCRIPTION, epilog=_EXAMPLES
    )  # fmt: skip
    add_score_flags(parser, "DATASET.jsonl files")
    parser.add_argument("--edit-similarity", choices=("levenshtein", "difflib"), default="levenshtein",
                        help="default levenshtein")  # fmt: skip
    parser.add_argument("--allow-corrupt", action="store_true", help="score corrupt lines as 0, and list them")


def run(args: argparse.Namespace) -> int:
    """Score, print, write."""
    from hici.eval.longbench.scoring import score_plan

    target, other = score_target(args), read_comparison(args, "scores")
    plan = score_plan(args.directory, edit_similarity=args.edit_similarity, allow_corrupt=args.allow_corrupt)
    record = measure_with_bar(args, plan, target, "scoring")
    if is_first_process():
        _print(args, record, other)
    return 0


def _print(args: argparse.Namespace, record: dict[str, Any], other: dict[str, float] | None) -> None:
    from hici.report.tables import integer, print_table

    rows = []
    for name, score in record["scores"].items():
        lengths = record["by_length"][name] or {}
        buckets = [lengths.get(bucket) for bucket in ("0-4k", "4-8k", "8k+")]
        row = [name, record["metrics"][name], integer(record["samples"][name]), f"{score:.2f}"]
        row += ["-" if value is None else f"{value:.2f}" for value in buckets]
        rows.append(row + ([] if other is None else compared(score, other.get(name))))
    columns = ["dataset", "metric", "samples", "score", "0-4k", "4-8k", "8k+"]
    columns += [] if other is None else ["compared", "difference"]
    notes = [*score_notes(record), *comparison_notes(record["scores"], other, str(args.compare))]
    print_table(f"LongBench scores of {args.directory}", columns, rows, notes)
    if args.output is not None:
        print(f"wrote {args.output}")


def score_notes(record: dict[str, Any]) -> list[str]:
    """What else must be known about the scores: the matcher of code, lines that score 0, incomplete datasets."""
    from hici.eval.line_numbers import name_problems
    from hici.eval.longbench.datasets import get_dataset

    datasets = {name: get_dataset(name) for name in record["metrics"]}
    notes = []
    if "code_similarity" in record["metrics"].values():
        notes.append(f"Edit similarity of code: {record['protocol']['edit_similarity']}.")
    partial = [f"{name} ({record['samples'][name]} of {dataset.samples})" for name, dataset in datasets.items()
               if dataset.samples is not None and record["samples"][name] != dataset.samples]  # fmt: skip
    if partial:
        notes.append(f"Not LongBench's number of samples: {', '.join(partial)}.")
    for field, what in (("corrupt_lines", "Corrupt lines, scored 0"), ("unscored", "Not comparable, scored 0")):
        by_file: dict[str, list[tuple[int, str]]] = {}
        for each in record[field]:
            by_file.setdefault(each["file"], []).append((each["line"], each["problem"]))
        if by_file:
            shown = "; ".join(f"{file} {name_problems(found)}" for file, found in by_file.items())
            notes.append(f"{what}: {len(record[field])} ({shown}).")
    return notes
