"""`hici score`: scores of predictions that exist already, one benchmark each (modules `score_*`)."""

from __future__ import annotations

from typing import Any

from hici.cli.main import add_verbs

_EXAMPLES = """\
examples:
  hici score longbench predictions/my-model --output scores.json
  hici score topics topic_predictions/my-model --output topics.json

`hici score longbench --help` explains it."""


def add_parser(subparsers: Any) -> None:
    """Add the group and the verbs in it."""
    parser = subparsers.add_parser(
        "score",
        help="score predictions that exist",
        description="Score predictions that a model has made already, as their benchmarks do. No model is needed.",
        epilog=_EXAMPLES,
    )
    add_verbs(parser.add_subparsers(title="verbs", metavar="VERB", dest="score_verb", required=True), group="score")
