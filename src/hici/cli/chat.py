"""`hici chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from hici.cli.common import LOADING_NOTES
from hici.cli.writing import (
    READING_NOTES,
    add_writing_flags,
    check_text,
    open_session,
    read_document,
    reading_bar,
    report,
    report_memory,
    say,
    settings,
    streamer,
    take_document,
    terminal_input,
)

_DESCRIPTION = f"""\
Talk with a model in its tokenizer's chat template. Each line of input is a question; the answer goes to stdout as it is
made, counts and speed go to stderr. What was read is not read again in later turns. From a pipe or file every line is
asked in turn.

  /clear    begin a new conversation (a --document stays)
  /exit     end; so does the end of input. Ctrl-C stops an answer.

{READING_NOTES}"""

_EXAMPLES = f"""\
examples:
  hici chat owner/model
  hici chat runs/adapter --attention hici --document book.txt --document-cache book.hicicache
  hici chat runs/adapter --system "Answer in one sentence." --temperature 0.7 --top-p 0.9 --seed 1 < questions.txt

{LOADING_NOTES}"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("chat", help="talk with a model", description=_DESCRIPTION, epilog=_EXAMPLES)
    add_writing_flags(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="system message (default: the template's own)")


def run(args: argparse.Namespace) -> int:
    """Ask line by line."""
    terminal_input()
    document = read_document(args)
    chosen = settings(args)

    from hici.models.conversation import Conversation

    loaded, session = open_session(args)
    chat = Conversation(session, loaded.tokenizer, document=document, system=args.system)
    with reading_bar(session):
        if document is not None:
            take_document(args, session, chat.beginning())
        for question in questions():
            if question == "/clear":
                chat.clear()
                say("a new conversation")
            elif question.startswith("/"):
                say(f"unknown command {question.split()[0]!r}; known: /clear, /exit")
            else:
                answer(chat, question, {**chosen, "streamer": streamer(loaded.tokenizer)})
    report_memory(session)
    return 0


def answer(chat: Any, question: str, how: dict[str, Any]) -> None:
    """One answer. Where somebody types, Ctrl-C takes the question back and an error does not end the chat."""
    try:
        report(chat.ask(question, **how), chat.session)
    except KeyboardInterrupt:
        if not terminal_input():
            raise
        print()
        say("stopped; the question is taken back")
    except ValueError as error:
        if not terminal_input():
            raise
        say(f"error: {error}")


def questions() -> Iterator[str]:
    """Lines of input that are not blank, up to /exit or the end."""
    while True:
        try:
            line = check_text(_line(), "standard input").strip()
        except EOFError:
            return
        except ValueError as error:  # of UTF-8
            if not terminal_input():
                raise ValueError("standard input is not UTF-8 text; convert it, for example with iconv") from error
            say(f"error: {error}")
            continue
        except KeyboardInterrupt:
            if not terminal_input():
                raise
            print()
            return
        if line == "/exit":
            return
        if line:
            yield line


def _line() -> str:
    """The next line; on a terminal with a prompt, which never goes into a redirected output. Raises EOFError."""
    if terminal_input() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # input() edits lines with it, where there is one
            import readline  # noqa: F401
        return input("> ")
    if terminal_input():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
