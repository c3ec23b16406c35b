"""`hici eval`: measurements of a model, one verb each (modules `eval_*`)."""

from __future__ import annotations

from typing import Any

from hici.cli.main import add_verbs

_EXAMPLES = """\
examples:
  hici eval ppl runs/adapter --data books/*.txt --context 4096 8192 --attention full hici --out runs/ppl

`hici eval ppl --help` explains it."""


def add_parser(subparsers: Any) -> None:
    """Add the group and the verbs in it."""
    parser = subparsers.add_parser(
        "eval", help="measure a model", description="Measure a model on real text.", epilog=_EXAMPLES
    )
    add_verbs(parser.add_subparsers(title="verbs", metavar="VERB", dest="eval_verb", required=True), group="eval")
