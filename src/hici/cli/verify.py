"""`hici verify`: is a directory whole, and does it fit its base?"""

from __future__ import annotations

import argparse
from typing import Any

from hici.cli.common import add_base_flags, expand_home, num_heads_config

EXIT_PROBLEM = 1

_DESCRIPTION = """\
Check an adapter (ours, released, LongLoRA's) or a merged model: complete, shapes, NaN, rope, tokenizer. Of the base
only config.json is read. Exit status 1 when there is a problem."""

_EXAMPLES = """\
examples:
  hici verify runs/adapter
  hici verify Llama-2-7b-HiCI-16k --base-model ~/models/Llama-2-7b-hf
  hici verify runs/merged --json > report.json"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("verify", help="check a directory", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("directory", metavar="DIR", help="adapter or merged directory, or a hub name")
    add_base_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Check and report."""
    from hici.adapters.verify import verify

    expand_home(args, "directory", "base_model")
    report = verify(args.directory, base_model=args.base_model, context_length=args.context_length,
                    config=num_heads_config(args))  # fmt: skip
    if args.json:
        import json

        from hici.provenance import provenance

        print(json.dumps({"task": "verify", **report.to_dict(), "made_with": provenance()}, indent=2))
    else:
        from hici.report.tables import print_facts

        rows = [[check.name, check.status, check.text] for check in report.checks]
        verdict = f"{len(report.problems)} problems" if report.problems else "no problem found"
        print_facts(f"{report.directory} ({report.kind}): {verdict}", rows)
    return EXIT_PROBLEM if report.problems else 0
