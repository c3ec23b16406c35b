"""`hici eval retrieval`: what a model finds again in long prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hici.cli.common import LOADING_NOTES, positive
from hici.cli.evaluating import (
    RESUME_NOTES,
    add_evaluation_flags,
    check_evaluation,
    is_first_process,
    load_for_evaluation,
    measure_with_bar,
    result_target,
)
from hici.eval.retrieval.settings import DEPTHS, SAMPLES, Settings, evenly_spaced
from hici.eval.retrieval.tasks import retrieval_tasks

_DESCRIPTION = """\
Something is hidden in a long prompt, and the model is asked for it. A length counts everything: the prompt with what
the tokenizer adds to it, and room for the answer; the filler ends within one sentence of it. The same --seed gives the
same prompts everywhere. Answers are greedy and scored as text. Beside the accuracy stands the answer loss: nats a token
of the right answer behind the prompt, which tells models apart that answer nothing right yet."""

_EXAMPLES = f"""\
examples:
  hici eval retrieval runs/adapter --lengths 1024 2048 4096 8192 --depths 10 --samples 3 --attention full hici \\
      --out runs/retrieval
  hici eval retrieval owner/model --tasks passkey needle variables keyvalue topics lines --lengths 4096
  hici eval retrieval runs/adapter --tasks needle --keys 8 --values 4 --haystack books/*.txt --lengths 8192
  hici eval retrieval owner/model --cases 5_topics.jsonl 200_lines.jsonl --chat

{RESUME_NOTES}

{LOADING_NOTES}
In attention hici with visibility past and a fixed segment size the prompt is read in bounded memory. Visibility all
and current read it with summaries of its own future, and decode over the raw keys; such numbers are marked."""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    tasks = retrieval_tasks()
    parser = subparsers.add_parser(
        "retrieval", help="passkeys, needles, lookups by length and depth", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    add_evaluation_flags(parser, "retrieval")
    group = parser.add_argument_group("prompts")
    about = "; ".join(f"{task.name}: {task.about}" for task in tasks.values())
    group.add_argument("--tasks", nargs="+", metavar="TASK", help=f"default passkey, or those of --cases. {about}")
    group.add_argument("--lengths", nargs="+", type=positive, default=[], metavar="T", help="tokens of prompt and "
                       "answer; for --cases alone: one that limits them (default the model's positions)")  # fmt: skip
    group.add_argument("--depths", nargs="+", metavar="D", help="how many, spaced evenly from 0 (in front) to 1, or "
                       f"fractions like 0.0 0.25 1.0 (default {DEPTHS})")  # fmt: skip
    group.add_argument("--samples", type=int, metavar="N", help=f"prompts of every length and depth (default "
                       f"{SAMPLES}); the first cases of every file (default all)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the prompts (default 0)")
    group.add_argument("--chat", action="store_true", help="as a user's message in the tokenizer's chat template")
    group.add_argument("--haystack", nargs="+", default=[], metavar="FILE", help="text files in place of the repeated "
                       f"filler ({', '.join(task.name for task in tasks.values() if task.uses_filler)})")  # fmt: skip
    group.add_argument("--cases", nargs="+", default=[], metavar="FILE", help="LongEval's topics or lines, a .jsonl "
                       "each, in place of generated ones")  # fmt: skip
    group.add_argument("--skip-too-long", action="store_true", help="leave out cases beyond the limit, and count them")
    options = parser.add_argument_group("tasks")
    for task in tasks.values():
        for name, option in task.options.items():
            options.add_argument(f"--{name}", type=int, metavar="N", help=f"{task.name}: {option.help} (default "
                                 f"{option.default})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    check_evaluation(args)
    settings = _settings(args)
    for flag, given in (("--rope", args.rope != "none"), ("--allow-beyond-rope", args.allow_beyond_rope)):
        if given and not settings.lengths:
            raise ValueError(f"{flag} changes nothing while cases are limited to the model's positions; add --lengths "
                             "with the longest that is permitted")  # fmt: skip
    target = result_target(args, "retrieval")

    from hici.eval.retrieval.run import plan_retrieval
    from hici.models.modes import set_attention

    loaded = load_for_evaluation(args, max(settings.lengths, default=None))
    plan = plan_retrieval(
        loaded.model,
        loaded.tokenizer,
        loaded.about,
        settings,
        args.attention,
        allow_beyond_rope=args.allow_beyond_rope,
    )
    record = measure_with_bar(args, plan, target, "prompts")
    set_attention(loaded.model, "full")
    if is_first_process():
        _print(args.model, record)
        if target is not None:
            from hici.report.retrieval import heat_maps

            picture = heat_maps(target.with_suffix(".png"), record, f"Retrieval: {Path(args.model).name}")
            print(f"wrote {target} and {picture}")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    """What the flags ask. Raises ValueError as `Settings`, and for case files that cannot be read."""
    case_tasks: list[str] = []
    if args.cases:
        from hici.eval.retrieval.files import read_cases

        case_tasks = [read_cases(name).task for name in args.cases]
    tasks = args.tasks or list(dict.fromkeys(case_tasks)) or ["passkey"]
    names = [name for task in retrieval_tasks().values() for name in task.options]
    return Settings(
        tasks=tuple(tasks),
        lengths=tuple(args.lengths),
        depths=None if args.depths is None else parse_depths(args.depths),
        samples=args.samples,
        seed=args.seed,
        options={name: getattr(args, name) for name in names if getattr(args, name) is not None},
        haystack=tuple(args.haystack),
        cases=tuple(args.cases),
        case_tasks=tuple(case_tasks),
        skip_too_long=args.skip_too_long,
        chat=args.chat,
    )


def parse_depths(words: list[str]) -> tuple[float, ...]:
    """Depths of --depths: one whole number is how many; else fractions.

    Raises:
        ValueError: not a number; none at all.
    """
    if len(words) == 1 and words[0].isdecimal():
        if int(words[0]) < 1:
            raise ValueError(f"--depths {words[0]}: a whole number is how many depths, at least 1; give 0.0 for the "
                             "beginning of the filler")  # fmt: skip
        return evenly_spaced(int(words[0]))
    try:
        return tuple(float(word) for word in words)
    except ValueError as error:
        raise ValueError(f"--depths {' '.join(words)}: {error}; give how many (10), or fractions (0.0 0.5 1.0)") from (
            error
        )


def _print(name: str, record: dict[str, Any]) -> None:
    from hici.eval.conditions import NOT_CAUSAL
    from hici.report.retrieval import by_task, table
    from hici.report.tables import print_table

    for task, conditions in by_task(record).items():
        print_table(f"{task} of {name}", *table(conditions), notes=_notes(conditions))
    if not all(condition["causal"] for condition in record["conditions"]):
        print(f"({NOT_CAUSAL}): tokens of the prompt see summaries of their own future.")


def _notes(conditions: list[dict[str, Any]]) -> list[str]:
    skipped = {c["cases"]: c["skipped_too_long"] for c in conditions if c.get("skipped_too_long")}
    return [f"{number} cases of {file} are too long and left out." for file, number in skipped.items()]
