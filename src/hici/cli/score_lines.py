"""`hici score lines`: accuracy of LongEval's line retrieval."""

from __future__ import annotations

import argparse
from typing import Any

from hici.cli.score_topics import run_responses
from hici.cli.scoring import add_score_flags

_DESCRIPTION = """\
Score LongEval's line predictions: DIR/N_response.txt for N lines, one sample a line as
"Label: ..., Predict: ..., prompt length: ..." ("Parsed: ..." before the length is not used). A sample is right when the
last number of the prediction is the label."""

_EXAMPLES = """\
examples:
  hici score lines line_predictions/my-model --output lines.json"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "lines", help="LongEval's line retrieval", description=_DESCRIPTION, epilog=_EXAMPLES
    )  # fmt: skip
    add_score_flags(parser, "N_response.txt files")


def run(args: argparse.Namespace) -> int:
    """Score, print, write."""
    return run_responses(args, "lines")
