"""`hici merge`: an adapter folded into its base."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hici.cli.common import add_base_flags, expand_home, num_heads_config

_DESCRIPTION = """\
Fold an adapter (ours, released, LongLoRA's) into its base and write a model directory in sharded safetensors.

`--as plain`: LoRA, embeddings and norms folded in, rope and vocabulary set, no HiCI modules: a standard model in full
attention, for stock transformers and any engine. `--as hici`: the modules are kept; transformers' AutoModel loads it
with trust_remote_code=True wherever hici is installed, and so do hici's own verbs.

It works tensor by tensor: memory is about one shard, whatever the model's size."""

_EXAMPLES = """\
examples:
  hici merge runs/adapter runs/merged --as plain
  hici merge Llama-2-7b-HiCI-16k merged --as hici --base-model ~/models/Llama-2-7b-hf --max-shard-size 4GB"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("merge", help="fold an adapter into its base", description=_DESCRIPTION,
                                   epilog=_EXAMPLES)  # fmt: skip
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter directory, or a hub name")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument(
        "--as", dest="kind", required=True, choices=("plain", "hici"), help="without or with the modules"
    )
    add_base_flags(parser)
    parser.add_argument("--attention", choices=("full", "hici"), help="mode in which a hici directory starts "
                        "(default: as the adapter was saved)")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the weights (default auto: the base's)")  # fmt: skip
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of one file (default 2GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")


def run(args: argparse.Namespace) -> int:
    """Merge with a progress bar and say where."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hici.adapters.merge import merge

    expand_home(args, "adapter", "out", "base_model")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tensors", total=None)
        written = merge(
            args.adapter,
            args.out,
            args.kind,
            base_model=args.base_model,
            context_length=args.context_length,
            config=num_heads_config(args),
            attention=args.attention,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{written}: merged as {args.kind}")
    return 0
