"""`hici convert`: an adapter from the released layout into ours, and back."""

from __future__ import annotations

import argparse
from typing import Any

from hici.cli.common import add_base_flags, expand_home, num_heads_config

_DESCRIPTION = """\
Write an adapter in another layout, tensor by tensor and bit for bit. `hici` is ours (safetensors, one directory, loads
in plain PEFT too); `released` is that of the published HiCI code (adapter_model.bin + trainable_params.bin)."""

_EXAMPLES = """\
examples:
  hici convert Llama-2-7b-HiCI-16k runs/mine --to hici --base-model meta-llama/Llama-2-7b-hf
  hici convert runs/adapter published --to released"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("convert", help="released format to ours, and back", description=_DESCRIPTION,
                                   epilog=_EXAMPLES)  # fmt: skip
    parser.add_argument("source", metavar="SRC", help="adapter directory, or a hub name")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.add_argument("--to", required=True, choices=("hici", "released"), help="the layout to write")
    add_base_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter directory that is there")


def run(args: argparse.Namespace) -> int:
    """Convert and say where."""
    from hici.adapters.convert import convert

    expand_home(args, "source", "target", "base_model")
    written = convert(
        args.source,
        args.target,
        args.to,
        base_model=args.base_model,
        context_length=args.context_length,
        config=num_heads_config(args),
        overwrite=args.overwrite,
    )
    print(f"{written}: {args.source} in the layout {args.to!r}, read back and compared bit for bit")
    return 0
