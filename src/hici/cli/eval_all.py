"""`hici eval all`: a suite of measurements of one model, one after the other, and the report on them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hici.cli.common import LOADING_NOTES, Loaded, positive
from hici.cli.evaluating import (
    RESUME_NOTES,
    OnlyPlannedError,
    add_evaluation_flags,
    check_evaluation,
    extend_to,
    is_first_process,
    load_for_evaluation,
)
from hici.cli.suites import SUITES, Suite, default_lengths

_DESCRIPTION = """\
Runs `hici eval` verbs one after the other on one loaded model, each with its result in --out, and then `hici report`
on all of them (in --out/report). What it runs is printed, and can be run alone. What cannot be (a length too short for
a task, too little text, a missing file, ...) is told before anything is measured.
"""

_EXAMPLES = f"""\
examples:
  hici eval all runs/adapter --data books/*.txt --attention full hici --out runs/results
  hici eval all owner/model --data test.bin --suite full --lengths 8192 16384 32768 --rope auto --out runs/results
  hici eval all runs/adapter --data books/*.txt --longbench LongBench/data --lm-tasks arc_easy --out runs/results

{RESUME_NOTES}

{LOADING_NOTES}"""


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
    group.add_argument("--text-key", default="text", help="the text's column in records (default text)")
    group.add_argument("--lengths", nargs="+", type=positive, metavar="T", help="tokens (default: powers of two up to "
                       "the model's positions; quick: up to 8192, three of them)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of generated prompts (default 0)")
    group.add_argument("--longbench", metavar="DIR", help="LongBench's .jsonl files: predictions and scores too")
    group.add_argument("--lm-tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness too")
    group.add_argument("--include-path", metavar="DIR", help="folder of .yaml tasks, for --lm-tasks")
    add_evaluation_flags(parser, "all", picture=False)


def run(args: argparse.Namespace) -> int:
    """Load once, make all plans, run the verbs, report."""
    check_evaluation(args, lengths=args.lengths or [], lm_tasks=args.lm_tasks or [])
    _check_out(args)
    from hici.models.lookup import get_causal_lm
    from hici.models.modes import set_attention

    suite = SUITES[args.suite]
    loaded = load_for_evaluation(argparse.Namespace(**vars(args)), None)  # which finds out what "auto" is
    lengths = sorted(args.lengths or default_lengths(suite, get_causal_lm(loaded.model).config.max_position_embeddings))
    loaded = extend_to(args, loaded, lengths[-1])
    commands, left_out = suite_commands(args, suite, lengths, inspected=_can_be_inspected(loaded.model, lengths[-1]))
    with _no_warnings():  # which come when it is measured
        for command in commands:  # what cannot be is told before anything is measured
            _run_verb(command, loaded, only_plan=True)
    set_attention(loaded.model, "full")
    if is_first_process():
        for each in left_out:
            print(f"left out: {each}")
    for command in commands:
        _run_verb(command, loaded)
    if is_first_process():
        _run_verb(["report", args.out, *(["--overwrite"] if args.overwrite else [])], None)
    return 0


def suite_commands(
    args: argparse.Namespace, suite: Suite, lengths: list[int], *, inspected: bool
) -> tuple[list[list[str]], list[str]]:
    """(the verbs of a suite, each as a command line that can be run alone; what is left out, and why).

    `inspected`: whether slots are seen at the longest length.

    Raises:
        ValueError: something was asked for that none of the attentions can do, or no length has room for.
    """
    words = [str(length) for length in lengths]
    data = ["--data", *args.data, *_flag("text_key", args.text_key, "text")]
    rope = [*_flag("rope", args.rope, "none"), *(["--allow-beyond-rope"] if args.allow_beyond_rope else [])]
    out = ["--out", args.out, *(["--overwrite"] if args.overwrite else [])]
    shared = [*_loading_flags(args), *_segment_flags(args, args.attention), *out]
    commands, left_out = [], []
    for protocol in suite.protocols:
        contexts = words[-1:] if protocol == "position" else words
        commands.append(
            ["eval", "ppl", args.model, *data, "--protocol", protocol, "--context", *contexts, "--max-windows",
             str(suite.max_windows), "--attention", *args.attention, *rope, *shared]
        )  # fmt: skip
    answering = [attention for attention in args.attention if attention != "hici_s2"]
    if answering:
        answers = ["--attention", *answering, *_loading_flags(args), *_segment_flags(args, answering), *out]
        commands += _answering_commands(args, suite, words, rope, answers)
    elif args.longbench or args.lm_tasks:
        raise ValueError("--longbench and --lm-tasks are for attention full and hici, since hici_s2 is for training "
                         "and perplexity; add one of them, or drop them")  # fmt: skip
    if len(answering) < len(args.attention):
        left_out.append("retrieval, LongBench and lm tasks in attention hici_s2, which is for training and perplexity")
    if inspected and "hici" in args.attention:
        commands.append(["inspect", args.model, *data, "--context", words[-1], *rope, *_loading_flags(args),
                         *_segment_flags(args, ["hici"]), *out])  # fmt: skip
    elif "hici" in args.attention:
        left_out.append(f"hici inspect, since no segment of {words[-1]} tokens has slots to look at")
    return commands, left_out


def _answering_commands(
    args: argparse.Namespace, suite: Suite, words: list[str], rope: list[str], answers: list[str]
) -> list[list[str]]:
    """The verbs in which a model generates. `answers`: attention, loading, segments and output."""
    commands = [
        ["eval", "retrieval", args.model, "--tasks", *suite.tasks, "--lengths", *words, "--depths", str(suite.depths),
         "--samples", str(suite.samples), "--seed", str(args.seed), *rope, *answers]
    ]  # fmt: skip
    if args.longbench is not None:
        limit = ["--max-length", str(_longest_prompt(args.longbench, int(words[-1]))), *rope] if rope else []
        commands.append(["eval", "longbench", args.model, "--data", args.longbench, *limit, *answers])
    if args.lm_tasks is not None:
        limit = ["--max-length", words[-1], *rope] if rope else []
        commands.append(["eval", "lm", args.model, "--tasks", *args.lm_tasks,
                         *_flag("include_path", args.include_path), *limit, *answers])  # fmt: skip
    return commands


def _longest_prompt(folder: str, length: int) -> int:
    """Tokens of a prompt of LongBench, so that prompt and answer have `length` together: as the rope is extended."""
    from hici.eval.longbench.datasets import get_dataset
    from hici.eval.longbench.samples import find_data

    answer = max(get_dataset(name).max_new_tokens for name in find_data([folder], None))
    if length - answer < 2:
        raise ValueError(f"--lengths {length} leaves no room for a prompt of LongBench, whose answers take up to "
                         f"{answer} tokens; give a longer one, or drop --longbench")  # fmt: skip
    return length - answer


def _can_be_inspected(model: Any, context: int) -> bool:
    """Whether a token of so long a text sees a slot in attention hici."""
    from hici.core.segments import count_segments
    from hici.models.lookup import hici_config, is_attached

    if not is_attached(model) or hici_config(model).slots_in_use == 0:
        return False
    config = hici_config(model)
    return config.visibility != "past" or count_segments(context, config.resolve_segment_size(context)) > 1


def _check_out(args: argparse.Namespace) -> None:
    """Whether --out is a directory for results and a report."""
    from hici.report.write import check_report_target

    if args.out is None:
        raise ValueError("a suite writes several results and a report, and --out is missing; give a directory")
    out = Path(args.out).expanduser()
    if out.suffix == ".json" or out.is_file():
        raise ValueError(f"--out {args.out}: a suite writes several results; give a directory")
    check_report_target(out / "report", overwrite=args.overwrite)


def _loading_flags(args: argparse.Namespace) -> list[str]:
    """How the model is loaded, as flags."""
    words = [*_flag("device", args.device, "auto"), *_flag("dtype", args.dtype, "auto")]
    for name in ("base_model", "context_length", "num_heads", "threads"):
        words += _flag(name, getattr(args, name))
    return words


def _segment_flags(args: argparse.Namespace, attentions: list[str]) -> list[str]:
    """How it is cut into segments, as flags; none where only attention full is measured, which refuses them."""
    if all(attention == "full" for attention in attentions):
        return []
    words = []
    for name in ("segment_size", "num_segments", "visibility"):
        words += _flag(name, getattr(args, name))
    return words + (["--no-slots"] if args.no_slots else [])


def _flag(name: str, value: Any, default: Any = None) -> list[str]:
    """--name value, where it is not the default."""
    return [] if value == default else [f"--{name.replace('_', '-')}", str(value)]


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Context: hici logs errors only."""
    logger = logging.getLogger("hici")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run_verb(command: list[str], loaded: Loaded | None, *, only_plan: bool = False) -> None:
    """One verb in this process, with the model that is loaded already. `only_plan`: up to where it would measure."""
    from hici.cli.main import parse

    if is_first_process() and not only_plan:
        print(f"\n$ hici {shlex.join(command)}", flush=True)
    inner = parse(command)
    inner.loaded, inner.only_plan = loaded, only_plan
    with contextlib.suppress(*([OnlyPlannedError] if only_plan else [])):
        inner.run(inner)
