"""`hici train`: adapt a model by a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EPILOG = """\
Every key of the recipe can be given as --key value; sections with a dot. Values are YAML.

examples:
  hici train recipes/smollm2-8k.yaml
  hici train recipes/smollm2-8k.yaml --max_steps 20 --hici_learning_rate 5e-4
  hici train recipes/smollm2-8k.yaml --hici.visibility past --data '[books/*.txt, notes.jsonl]'
  hici train recipes/smollm2-8k.yaml --dry-run
  hici train recipes/smollm2-8k.yaml --resume
  torchrun --nproc-per-node 8 -m hici train recipes/llama2-7b-16k.yaml
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m hici train recipes/llama2-7b-16k.yaml

The adapter lands in output_dir/adapter (read it with hici.from_pretrained), the log in metrics.jsonl, train.json and
train.png, checkpoints in output_dir/checkpoints.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to `hici`'s parser."""
    parser = subparsers.add_parser(
        "train",
        help="adapt a model by a YAML recipe",
        description="Adapt a model: LoRA, HiCI modules, embeddings and norms, by a YAML recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="YAML file (see recipes/)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last whole checkpoint in output_dir; from the beginning where there is none",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be trained, on how many tokens, in how much memory, and train nothing",
    )
    parser.set_defaults(run=run, accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Train and print where things are and what the held-out loss did."""
    from hici.train.recipe import load_recipe
    from hici.train.run import train

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        from hici.report.plan import print_plan
        from hici.train.dry_run import dry_run

        print_plan(dry_run(recipe, resume=args.resume))
        return 0
    result = train(recipe, resume=args.resume, write=lambda line: print(line, file=sys.stderr, flush=True))
    if result:  # the first process's
        print_result(result, Path(recipe.output_dir).expanduser())
    return 0


def print_result(result: dict[str, Any], output: Path) -> None:
    """Where things are, and the held-out losses."""
    print(f"adapter: {result['adapter']}")
    print(f"log:     {output / 'metrics.jsonl'}, {output / 'train.json'}, {output / 'train.png'}")
    losses = result["heldout_loss"]
    for attention in losses["before"]:
        before, after = losses["before"][attention], losses["after"][attention]
        # with slots over its own future in view, a token's loss is no language-model loss
        mark = f", visibility {result['visibility']}: sees the future" if result["leaks_future"][attention] else ""
        print(f"held-out loss, {attention} attention{mark}: {before:.4f} before, {after:.4f} after (nats a token)")
