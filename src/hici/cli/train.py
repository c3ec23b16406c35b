"""`hici train`: adapt a model by a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EPILOG = """\
Every key of the recipe can be given as --key value; sections with a dot. Values are YAML.

examples:
  hici train recipes/smollm2-8k.yaml
  hici train recipes/smollm2-8k.yaml --max_steps 20 --hici_learning_rate 5e-4
  hici train recipes/smollm2-8k.yaml --hici.visibility past --data '[books/*.txt, notes.jsonl]'

The adapter lands in output_dir/adapter (read it with hici.from_pretrained), the log in train.json and train.png.
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
    parser.set_defaults(run=run, accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Train and print where things are and what the held-out loss did."""
    from hici.train.recipe import load_recipe
    from hici.train.run import train

    recipe = load_recipe(args.recipe, args.overrides)
    result = train(recipe)
    losses = result["heldout_loss"]
    print(f"adapter: {result['adapter']}")
    output = Path(recipe.output_dir).expanduser()
    print(f"log:     {output / 'train.json'}, {output / 'train.png'}")
    for attention in losses["before"]:
        before, after = losses["before"][attention], losses["after"][attention]
        # with slots over its own future in view, a token's loss is no language-model loss
        mark = f", visibility {result['visibility']}: sees the future" if result["leaks_future"][attention] else ""
        print(f"held-out loss, {attention} attention{mark}: {before:.4f} before, {after:.4f} after (nats a token)")
    return 0
