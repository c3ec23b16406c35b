"""What `hici generate` and `hici chat` share: flags, the document, and what is said on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hici.cli.common import Loaded, add_model_flags, add_segment_flags, load, positive

READING_NOTES = """\
In attention full a token attends to all tokens before it. In attention hici with visibility past and a fixed segment
size, reading and writing take memory that does not grow (a HiCICache), and give what one pass over everything would
give. With visibility all or current, or --decode raw, the prompt is read at once with segments and slots, and new
tokens attend to the raw keys of all tokens before them, as published."""


def add_writing_flags(parser: argparse.ArgumentParser) -> None:
    """Model, segments, document, sampling."""
    add_model_flags(parser)
    segments = add_segment_flags(parser)
    segments.add_argument("--decode", choices=("auto", "raw"), help="what new tokens attend to in attention hici: auto "
                          "(slots and segment with visibility past, else raw keys) or raw")  # fmt: skip
    document = parser.add_argument_group("document")
    document.add_argument("--document", metavar="FILE", help="UTF-8 text that is read once, in front of everything")
    document.add_argument("--document-cache", metavar="FILE", help="where the read document is kept: taken from there "
                          "if the file exists, else written (attention hici, visibility past)")  # fmt: skip
    group = parser.add_argument_group("generation")
    group.add_argument("--attention", choices=("full", "hici"), default="full", help="default full")
    group.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default 128")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    group.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    group.add_argument("--allow-beyond-rope", action="store_true", help="permit more tokens than the rope settings")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of `generate`. Raises ValueError on impossible ones, before anything is loaded."""
    from hici.models.generate import check_sampling

    check_sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    if args.top_p != 1 and args.temperature == 0:
        raise ValueError(f"--top-p {args.top_p:g} changes nothing at temperature 0 (greedy); add --temperature, for "
                         "example 0.7, or drop it")  # fmt: skip
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}


def read_document(args: argparse.Namespace) -> str | None:
    """The text of --document. Raises ValueError when it is missing or empty, or its cache cannot be kept."""
    if args.document is None:
        if args.document_cache is not None:
            raise ValueError(f"--document-cache {args.document_cache} without --document; give the document too")
        return None
    text = read_file(args.document, "--document")
    if not text.strip():
        raise ValueError(f"--document {args.document} is empty; give a file with text")
    if args.document_cache is not None:
        _check_document_cache(args)
    return text


def _check_document_cache(args: argparse.Namespace) -> None:
    from hici.files import check_writable

    kept = Path(args.document_cache).expanduser()
    if args.attention != "hici":
        raise ValueError(f"--document-cache {kept} in attention full, whose cache grows with the document; add "
                         "--attention hici, or drop it")  # fmt: skip
    if kept.exists() and not kept.is_file():
        raise ValueError(f"--document-cache {kept} is no file, but one is to be kept there; give another name")
    if not kept.exists():
        check_writable(kept.parent)


def read_file(name: str, flag: str) -> str:
    """A UTF-8 text file. Raises ValueError when it is missing or not text."""
    from hici.data.sources import read_text

    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{flag} {name} {'is a directory' if path.is_dir() else 'does not exist'}; check the path")
    return read_text(path)


def check_text(text: str, source: str) -> str:
    """The text, unless it holds bytes that are no UTF-8 (Python lets them through in some locales)."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{source} is not UTF-8 text; convert it, for example with iconv")
    return text


def terminal_input() -> bool:
    """Whether somebody types. Raises ValueError when standard input is closed."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; give the prompt with a flag, or pipe it in")
    return sys.stdin.isatty()


def open_session(args: argparse.Namespace) -> tuple[Loaded, Any]:
    """The model in the attention mode that is asked for, and a session with it; says how it will read."""
    from hici.models.attach import reconfigure
    from hici.models.lookup import hici_config
    from hici.models.modes import set_attention, visibility_in_use
    from hici.models.session import Session

    if args.decode is not None and args.attention != "hici":
        raise ValueError(f"--decode {args.decode} changes nothing in attention full; add --attention hici, or drop it")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal cannot show is no reason to stop
    loaded = load(args, [args.attention])
    set_attention(loaded.model, args.attention)
    if args.decode is not None:
        reconfigure(loaded.model, decode=args.decode)
    session = Session(loaded.model, allow_beyond_rope=args.allow_beyond_rope)
    if args.attention == "hici":
        visibility = visibility_in_use(loaded.model)
        kind = "segments without slots" if visibility is None else f"segments and slots, visibility {visibility}"
        if session.cache is None:
            how = f"the prompt is read with {kind}; new tokens attend to raw keys, without slots"
        else:
            how = f"read and written with {kind}, in memory that does not grow (segments of " \
                  f"{hici_config(loaded.model).segment_size:,} tokens)"  # fmt: skip
        say(how)
    return loaded, session


def take_document(args: argparse.Namespace, session: Any, ids: list[int]) -> None:
    """Read the document's tokens, or take them from --document-cache, and keep them."""
    kept = None if args.document_cache is None else Path(args.document_cache).expanduser()
    if kept is not None:
        session.check_bounded("--document-cache")
    session.check_length(len(ids) + args.max_new_tokens)
    if session.cache is None:
        say(f"the document's {len(ids):,} tokens are read with every prompt: raw keys allow one prefill only")
        return
    if kept is not None and kept.exists():
        session.load(kept, ids)
        say(f"document of {len(ids):,} tokens taken from {kept}")
    else:
        session.read(ids)
        say(f"document of {len(ids):,} tokens read")
        if kept is not None:
            session.save(kept)
            say(f"kept in {kept}")
    session.keep()


@contextmanager
def reading_bar(session: Any) -> Iterator[None]:
    """On a terminal, a progress bar while the session reads more than one piece."""
    bars: list[Any] = []  # of the reading that is going on

    def progress(done: int, total: int) -> None:
        if not bars and done < total:
            bars.append(_bar())
            bars[0].start()
            bars[0].add_task("reading", total=total)
        if bars:
            bars[0].update(bars[0].task_ids[0], completed=done)
            if done == total:  # what is written next goes to the same terminal
                bars.pop().stop()

    session.progress = progress if sys.stderr.isatty() else None
    try:
        yield
    finally:
        session.progress = None
        while bars:
            bars.pop().stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )


def streamer(tokenizer: Any) -> Any:
    """New text to stdout, as it is made."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def report(result: Any, session: Any) -> None:
    """Counts, speed and the cache's size, on stderr."""
    reading = f"{result.read_tokens:,} of {result.prompt_tokens:,} prompt tokens read in {result.read_seconds:.1f} s"
    speed = result.tokens_per_second
    cache = "" if session.cache is None else f"; cache {session.cache_bytes / 2**20:,.1f} MiB"
    kept = f" and {session.kept_bytes / 2**20:,.1f} MiB to go back to" if session.kept_bytes else ""
    say(
        f"{reading} ({result.read_tokens / result.read_seconds:,.0f} tokens/s), {len(result.tokens):,} new tokens"
        f"{' (end of text)' if result.ended else ''}{'' if speed is None else f' at {speed:.1f} tokens/s'}{cache}{kept}"
    )


def report_memory(session: Any) -> None:
    """Peak memory, on stderr."""
    from hici.machine import peak_memory

    say(f"peak memory {peak_memory(session.model.device) / 2**30:.2f} GiB")


def say(text: str) -> None:
    print(f"hici: {text}", file=sys.stderr, flush=True)
