"""`hici generate`: text from a prompt, streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hici.cli.common import LOADING_NOTES, add_model_flags, add_segment_flags, load, positive

_DESCRIPTION = """\
Continue a prompt. The text goes to stdout as it is made, counts and speed go to stderr.

In attention hici the prompt is read with segments and slots (one prefill); every new token then attends to the raw
keys of all tokens before it, without slots. Only the special tokens of the model's own generation settings are used;
the rest is what the flags say."""

_EXAMPLES = f"""\
examples:
  hici generate runs/adapter --prompt "Once upon a time" --max-new-tokens 100
  hici generate runs/adapter --prompt-file book.txt --attention hici --temperature 0.7 --top-p 0.9 --seed 1
  cat question.txt | hici generate owner/model --chat > answer.txt

{LOADING_NOTES}"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("generate", help="continue a prompt", description=_DESCRIPTION, epilog=_EXAMPLES)
    add_model_flags(parser)
    add_segment_flags(parser)
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read from stdin)")
    group.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    group.add_argument("--chat", action="store_true", help="as a user's message in the tokenizer's chat template")
    group.add_argument("--attention", choices=("full", "hici"), default="full", help="default full")
    group.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default 128")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    group.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    group.add_argument("--allow-beyond-rope", action="store_true", help="permit more tokens than the rope settings")


def run(args: argparse.Namespace) -> int:
    """Generate and report."""
    prompt = read_prompt(args)
    if not prompt.strip():
        raise ValueError("the prompt is empty; give at least one word with --prompt, --prompt-file or on stdin")

    from transformers import TextStreamer

    from hici.models.generate import check_sampling, encode_prompt, generate
    from hici.models.modes import set_attention, visibility_in_use

    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    loaded = load(args, [args.attention])
    set_attention(loaded.model, args.attention)
    ids = encode_prompt(loaded.tokenizer, prompt, chat=args.chat)
    if args.attention == "hici":
        visibility = visibility_in_use(loaded.model)
        kind = "segments without slots" if visibility is None else f"segments and slots, visibility {visibility}"
        print(f"hici: the prompt is read with {kind}; new tokens attend to raw keys, without slots", file=sys.stderr)
    result = generate(
        loaded.model,
        loaded.tokenizer,
        ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        allow_beyond_rope=args.allow_beyond_rope,
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    print(
        f"hici: {result.prompt_tokens:,} prompt tokens, {len(result.tokens):,} new tokens"
        f"{' (end of text)' if result.ended else ''}, {result.seconds:.1f} s, "
        f"{len(result.tokens) / result.seconds:.1f} new tokens/s",
        file=sys.stderr,
    )
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from its flag, file or stdin. Raises ValueError when both are given, or none."""
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given, but there is one prompt; give one of them")
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        from hici.data.documents import read_text

        path = Path(args.prompt_file).expanduser()
        if not path.is_file():
            raise ValueError(f"--prompt-file {args.prompt_file} does not exist; check the path")
        return read_text(path)
    if sys.stdin.isatty():
        raise ValueError("no prompt; give --prompt TEXT or --prompt-file FILE, or pipe it in")
    return sys.stdin.read()
