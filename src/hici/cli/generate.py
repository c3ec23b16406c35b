"""`hici generate`: text from a prompt, streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hici.cli.common import LOADING_NOTES
from hici.cli.writing import (
    READING_NOTES,
    add_writing_flags,
    check_text,
    open_session,
    read_document,
    read_file,
    reading_bar,
    report,
    report_memory,
    settings,
    streamer,
    take_document,
    terminal_input,
)

_DESCRIPTION = f"""\
Continue one prompt or several, each by itself. The text goes to stdout as it is made, counts and speed go to stderr.

With --document the prompts follow a text that is read once (after a blank line; with --chat in one message with it).

{READING_NOTES} Only the special tokens of the model's own generation settings are used; the rest is what the flags
say."""

_EXAMPLES = f"""\
examples:
  hici generate runs/adapter --prompt "Once upon a time" --max-new-tokens 100
  hici generate runs/adapter --prompt-file book.txt --attention hici --temperature 0.7 --top-p 0.9 --seed 1
  cat question.txt | hici generate owner/model --chat > answer.txt
  hici generate runs/adapter --attention hici --chat --document book.txt --document-cache book.hicicache \\
      --prompt "Who tells the story?" --prompt "How does it end?"

{LOADING_NOTES}"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("generate", help="continue a prompt", description=_DESCRIPTION, epilog=_EXAMPLES)
    add_writing_flags(parser)
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", metavar="TEXT", action="append", help="the prompt (default: read from stdin); "
                       "may be given several times")  # fmt: skip
    group.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    group.add_argument("--chat", action="store_true", help="as a user's message in the tokenizer's chat template")


def run(args: argparse.Namespace) -> int:
    """Generate and report."""
    prompts = read_prompts(args)
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; give at least one word with --prompt, --prompt-file or on stdin")
    document = read_document(args)
    chosen = settings(args)

    from hici.models.conversation import PROBES, Conversation, common_beginning
    from hici.models.generate import encode_prompt, generate

    loaded, session = open_session(args)
    tokenizer = loaded.tokenizer
    chat = Conversation(session, tokenizer, document=document) if args.chat else None
    with reading_bar(session):
        if document is not None:
            beginning = (
                chat.beginning()
                if chat is not None
                else common_beginning(encode_prompt(tokenizer, f"{document}\n\n{probe}") for probe in PROBES)
            )
            take_document(args, session, beginning)
        for prompt in prompts:
            how = {**chosen, "streamer": streamer(tokenizer)}
            if chat is not None:
                chat.clear()
                result = chat.ask(prompt, **how)
            else:
                text = prompt if document is None else f"{document}\n\n{prompt}"
                result = generate(session, tokenizer, encode_prompt(tokenizer, text), **how)
            report(result, session)
    report_memory(session)
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts from their flag, a file or stdin. Raises ValueError when both are given, or none."""
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; give one of them")
    if args.prompt is not None:
        return [check_text(prompt, "--prompt") for prompt in args.prompt]
    if args.prompt_file is not None:
        return [read_file(args.prompt_file, "--prompt-file")]
    if terminal_input():
        raise ValueError("no prompt; give --prompt TEXT or --prompt-file FILE, or pipe it in")
    try:
        return [check_text(sys.stdin.read(), "standard input")]
    except UnicodeDecodeError as error:
        raise ValueError("standard input is not UTF-8 text; convert it, for example with iconv") from error
