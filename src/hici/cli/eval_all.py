"""`hici eval all`: a suite of measurements of one model, one after the other, and the report on them."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from hici.cli.common import LOADING_NOTES, Loaded, positive
from hici.cli.evaluating import (
    RESUME_NOTES,
    add_evaluation_flags,
    check_evaluation,
    extend_to,
    is_first_process,
    load_for_evaluation,
)
from hici.cli.suites import SUITES, Suite, default_lengths

_DESCRIPTION = """\
Runs `hici eval` verbs one after the other on one loaded model, each with its result in --out, and then `hici report`
on all of them (in --out/report). What it runs is printed, and can be run alone.
"""

_EXAMPLES = f"""\
examples:
  hici eval all runs/adapter --data books/*.txt --attention full hici --out runs/results
  hici eval all owner/model --data test.bin --suite full --lengths 8192 16384 32768 --rope auto --out runs/results
  hici eval all runs/adapter --data books/*.txt --longbench LongBench/data --lm-tasks arc_easy --out runs/results

{RESUME_NOTES}

{LOADING_NOTES}"""

_LONGBENCH_ANSWER = 512  # tokens of the longest answers that LongBench asks for


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    described = "\n".join(f"  {suite.name:6} {suite.about}" for suite in SUITES.values())
    parser = subparsers.add_parser(
        "all",
        help="a suite of measurements, and the report",
        description=f"{_DESCRIPTION}\nsuites:\n{described}",
        epilog=_EXAMPLES,
    )
    group = parser.add_argument_group("suite")
    group.add_argument("--suite", choices=tuple(SUITES), default="quick", help="default quick")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE", help="text for perplexity: text, .jsonl, "
                       "token .bin, ...")  # fmt: skip
    group.add_argument("--lengths", nargs="+", type=positive, metavar="T", help="tokens (default: powers of two up to "
                       "the model's positions; quick: up to 8192, three of them)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of generated prompts (default 0)")
    group.add_argument("--longbench", metavar="DIR", help="LongBench's .jsonl files: predictions and scores too")
    group.add_argument("--lm-tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness too")
    add_evaluation_flags(parser, "all", picture=False)


def run(args: argparse.Namespace) -> int:
    """Load once, run the verbs, report."""
    check_evaluation(args, lengths=args.lengths or [])
    if args.out is None or args.out.endswith(".json"):
        raise ValueError(f"--out {args.out}: a suite writes several results; give a directory")
    from hici.models.lookup import get_causal_lm

    suite = SUITES[args.suite]
    loaded = load_for_evaluation(argparse.Namespace(**vars(args)), None)  # which finds out what "auto" is
    lengths = sorted(args.lengths or default_lengths(suite, get_causal_lm(loaded.model).config.max_position_embeddings))
    loaded = extend_to(args, loaded, lengths[-1])
    for command in suite_commands(args, suite, lengths):
        _run_verb(command, loaded)
    if is_first_process():
        _run_verb(["report", args.out], None)
    return 0


def suite_commands(args: argparse.Namespace, suite: Suite, lengths: list[int]) -> list[list[str]]:
    """The verbs of a suite, each as a command line that can be run alone."""
    words = [str(length) for length in lengths]
    data = ["--data", *args.data]
    rope = ["--rope", args.rope] if args.rope != "none" else []
    beyond = ["--allow-beyond-rope"] if args.allow_beyond_rope else []
    shared = [*_loading_flags(args), "--out", args.out, *(["--overwrite"] if args.overwrite else [])]
    commands = []
    for protocol in suite.protocols:
        contexts = words[-1:] if protocol == "position" else words
        commands.append(
            ["eval", "ppl", args.model, *data, "--protocol", protocol, "--context", *contexts, "--max-windows",
             str(suite.max_windows), "--attention", *args.attention, *rope, *beyond, *shared]
        )  # fmt: skip
    answering = [attention for attention in args.attention if attention != "hici_s2"]  # which does not generate
    if answering:
        shared_by_answers = ["--attention", *answering, *shared]
        commands.append(
            ["eval", "retrieval", args.model, "--tasks", *suite.tasks, "--lengths", *words, "--depths",
             str(suite.depths), "--samples", str(suite.samples), "--seed", str(args.seed), *rope, *beyond,
             *shared_by_answers]
        )  # fmt: skip
        if args.longbench is not None:
            limit = ["--max-length", str(lengths[-1] - _LONGBENCH_ANSWER), *rope, *beyond] if rope or beyond else []
            commands.append(["eval", "longbench", args.model, "--data", args.longbench, *limit, *shared_by_answers])
        if args.lm_tasks is not None:
            limit = ["--max-length", words[-1], *rope, *beyond] if rope or beyond else []
            commands.append(["eval", "lm", args.model, "--tasks", *args.lm_tasks, *limit, *shared_by_answers])
    if "hici" in args.attention and not args.no_slots:
        commands.append(["inspect", args.model, *data, "--context", words[-1], *beyond, *shared])
    return commands


def _loading_flags(args: argparse.Namespace) -> list[str]:
    """How the model is loaded and cut into segments, as flags."""
    words = []
    for name in ("base_model", "context_length", "num_heads", "threads", "segment_size", "num_segments", "visibility"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for name in ("device", "dtype"):
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) != "auto" else []
    return words + (["--no-slots"] if args.no_slots else [])


def _run_verb(command: list[str], loaded: Loaded | None) -> None:
    """One verb in this process, with the model that is loaded already."""
    from hici.cli.main import parse

    if is_first_process():
        print(f"\n$ hici {shlex.join(command)}", flush=True)
    inner = parse(command)
    inner.loaded = loaded
    inner.run(inner)
