"""Entry point of the `hici` command: finds the verbs, parses, runs one, and turns a ValueError into one line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from hici._version import __version__
from hici.processes import end_processes, world_size
from hici.registry import module_names, suggest

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_DESCRIPTION = "HiCI (Hierarchical Construction-Integration) attention for pretrained language models."
_EXAMPLES = """\
examples:
  hici info --preset llama-2-7b --context 16384
  hici train recipe.yaml --max_steps 20
  hici report runs/smollm2-8k
  hici eval ppl runs/adapter --data books/*.txt --context 4096 --attention full hici
  hici generate runs/adapter --prompt "Once upon a time" --max-new-tokens 64
  hici verify Llama-2-7b-HiCI-16k --base-model ~/models/Llama-2-7b-hf
  hici merge runs/adapter runs/merged --as plain

`hici VERB --help` explains a verb."""


class Parser(argparse.ArgumentParser):
    """argparse with our errors: a ValueError (value, rule, remedy) instead of usage and exit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        # abbreviations would swallow a recipe's `--key value`, and break when a flag is added
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            raise ValueError(suggest(str(value), [str(c) for c in action.choices], f"{self.prog} verb"))
        name = action.option_strings[-1] if action.option_strings else action.dest
        raise ValueError(suggest(str(value), [str(c) for c in action.choices], f"value of {name}"))


def build_parser() -> Parser:
    """The parser with all verbs; imports the verbs' modules, which import nothing heavy."""
    parser = Parser(prog="hici", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"hici {__version__}")
    _add_common_flags(parser, default=False)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    add_verbs(verbs)
    return parser


def add_verbs(subparsers: Any, group: str | None = None) -> None:
    """Add every verb of `hici.cli` (or of one group: the modules `group_*`) to `subparsers`."""
    for name in module_names("hici.cli"):
        belongs = name.startswith(f"{group}_") if group else "_" not in name
        if not belongs or name == "main":
            continue
        module = importlib.import_module(f"hici.cli.{name}")
        if not hasattr(module, "add_parser"):
            continue
        before = set(subparsers.choices)
        module.add_parser(subparsers)
        for verb in set(subparsers.choices) - before:
            leaf = subparsers.choices[verb]
            # SUPPRESS: `hici -v VERB` must survive the verb's own default
            _add_common_flags(leaf, default=argparse.SUPPRESS)
            if hasattr(module, "run"):
                leaf.set_defaults(run=module.run, leaf_parser=leaf)


def _add_common_flags(parser: argparse.ArgumentParser, default: Any) -> None:
    flags = parser.add_argument_group("general")
    flags.add_argument("-v", "--verbose", action="store_true", default=default, help="log what is done, to stderr")
    flags.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            args = parse(argv)
            _set_up_logging(args.verbose)
            status = args.run(args) or 0
            _leave_processes(status)
            return status
        finally:
            sys.stdout.flush()  # here, where a reader that has left can still be handled
    except BrokenPipeError:
        # the reader (head, less) has left: give Python nothing more to flush, and end quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if "--debug" in argv:
            raise
        print(f"hici: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("hici: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _leave_processes(status: int) -> None:
    """End one of several processes (torchrun, accelerate launch) together with the others."""
    if world_size() == 1:
        return
    end_processes()
    sys.stdout.flush()
    sys.stderr.flush()
    # not through the interpreter's own end: a gloo thread that is still joinable there aborts the process
    os._exit(status)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments. Leftovers become `args.overrides` where the verb takes them (`accepts_overrides`).

    Raises:
        ValueError: an unknown verb, value or flag (with the nearest known one).
    """
    parser = build_parser()
    args, leftovers = parser.parse_known_args(argv)
    if getattr(args, "accepts_overrides", False):
        args.overrides = leftovers
    elif leftovers:
        raise ValueError(_about_leftovers(leftovers, args.leaf_parser))
    return args


def _about_leftovers(leftovers: list[str], parser: argparse.ArgumentParser) -> str:
    flags = [item.partition("=")[0] for item in leftovers if item.startswith("-")]
    if not flags:
        return f"unexpected argument {leftovers[0]!r}; see `{parser.prog} --help`"
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flags[0], known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown flag {flags[0]!r} of `{parser.prog}`.{hint} See `{parser.prog} --help`"


def _set_up_logging(verbose: bool) -> None:
    if not verbose:
        # of libraries about their own future, which a user of this command can do nothing about
        warnings.filterwarnings("ignore", category=FutureWarning)
        # PEFT imports bitsandbytes where it is installed, and that tells of kernels which it could load from the hub
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logger = logging.getLogger("hici")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hici: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
