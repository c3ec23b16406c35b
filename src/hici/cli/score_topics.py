"""`hici score topics`: accuracy of LongEval's topic retrieval."""

from __future__ import annotations

import argparse
from typing import Any

from hici.cli.evaluating import is_first_process, measure_with_bar
from hici.cli.scoring import add_score_flags, compared, comparison_notes, read_comparison, score_target

_DESCRIPTION = """\
Score LongEval's topic predictions: DIR/N_response.txt for N topics, one sample a line as
"Label: ..., Predict: ..., prompt length: ...". A sample is right when the label occurs in the prediction, both
lower-cased (the rule of the published scores)."""

_EXAMPLES = """\
examples:
  hici score topics topic_predictions/my-model --output topics.json"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "topics", help="LongEval's topic retrieval", description=_DESCRIPTION, epilog=_EXAMPLES
    )  # fmt: skip
    add_score_flags(parser, "N_response.txt files")


def run(args: argparse.Namespace) -> int:
    """Score, print, write."""
    return run_responses(args, "topics")


def run_responses(args: argparse.Namespace, kind: str) -> int:
    """Score, print, write, for topics or lines."""
    from hici.eval.responses import responses_plan

    target, other = score_target(args), read_comparison(args, "accuracy")
    record = measure_with_bar(args, responses_plan(args.directory, kind), target, "scoring")
    if is_first_process():
        _print(args, record, kind, other)
    return 0


def _print(args: argparse.Namespace, record: dict[str, Any], kind: str, other: dict[str, float] | None) -> None:
    from hici.report.tables import integer, print_table

    rows = []
    for name, accuracy in record["accuracy"].items():
        low, high = record["prompt_tokens"][name]
        row = [name, str(record["samples"][name]), f"{integer(low)} to {integer(high)}", f"{accuracy:.2f}"]
        rows.append(row + ([] if other is None else compared(accuracy, other.get(name))))
    columns = [kind, "samples", "prompt tokens", "accuracy %", *([] if other is None else ["compared", "difference"])]
    notes = [f"Right: {record['protocol']['rule']}.", *comparison_notes(record["accuracy"], other, str(args.compare))]
    print_table(f"LongEval {kind}: {args.directory}", columns, rows, notes)
    if args.output is not None:
        print(f"wrote {args.output}")
