"""`hici eval lm`: tasks of lm-evaluation-harness, in one attention or several."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
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

logger = logging.getLogger(__name__)

RESULT = "lm"

_DESCRIPTION = f"""\
Tasks of lm-evaluation-harness (pip install 'hici[lm-eval]'), measured by its own code; a model type "hici" for that
harness's own command is in `python -m hici.eval.harness`.

The softmax is taken in float32. A task whose data are not on this machine is fetched by the harness from the
hub; HF_HUB_OFFLINE=1 forbids that, and then only what lies in the cache (HF_HOME) and local files can be measured.
Tasks of your own: YAML files in a directory, --include-path.

Attention hici with visibility all or current is not causal: a token sees a summary of its own future, and the result
says so beside every number.

{LOADING_NOTES}

{RESUME_NOTES}"""
_EXAMPLES = """\
examples:
  hici eval lm --list-tasks 'hellaswag*'
  hici eval lm runs/adapter --tasks hellaswag arc_easy --attention full hici --out runs/lm
  HF_HUB_OFFLINE=1 hici eval lm runs/adapter --include-path tasks --tasks my_task --batch-size 4"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "lm", help="tasks of lm-evaluation-harness", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    add_evaluation_flags(parser, RESULT, picture=False)
    group = parser.add_argument_group("tasks")
    group.add_argument("--include-path", metavar="DIR", help="task files of your own, before those of the harness")
    group.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="tasks, groups, tags or YAML files; "
                       "also a,b")  # fmt: skip
    group.add_argument("--list-tasks", nargs="?", const="*", action=_ListTasks, metavar="PATTERN", help="list what "
                       "matches, and end (those of --include-path too, if it stands before)")  # fmt: skip
    group.add_argument("--num-fewshot", type=_not_negative, metavar="N", help="examples before each question (default: "
                       "as each task says; a task that is set to 0 stays so)")  # fmt: skip
    group.add_argument("--limit", type=positive, metavar="N", help="documents of each task at most (default all)")
    group.add_argument("--batch-size", type=positive, default=1, metavar="N", help="texts read together (default 1)")
    group.add_argument("--max-length", type=positive, metavar="T", help="tokens read at most (default: the model's "
                       "positions)")  # fmt: skip
    group.add_argument("--apply-chat-template", action="store_true", help="prompts as a conversation")
    group.add_argument("--run-unsafe-code", action="store_true", help="permit tasks that run code of the model's own")
    group.add_argument("--seed", type=_not_negative, metavar="N", help="of all that the harness draws (default: its "
                       "own seeds)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Load the model and the tasks, measure, print a table, write the result."""
    from hici.eval.lm import check_installed, lm_plan

    check_installed()
    args.tasks = [name for each in args.tasks for name in each.split(",") if name]
    check_evaluation(args, tasks=args.tasks)
    if not args.tasks:
        raise ValueError("--tasks names no task; give one, or --list-tasks to see them")
    if args.rope != "none" and args.max_length is None:
        raise ValueError(f"--rope {args.rope} extends to --max-length, which is not given; give it, or drop --rope")
    target = result_target(args, RESULT, picture=False)
    from hici.eval.harness.tasks import load_tasks

    with _harness_kept_quiet(args.verbose):
        tasks = load_tasks(  # before the model: a wrong name need not wait for that
            args.tasks,
            include_path=None if args.include_path is None else Path(args.include_path).expanduser(),
            num_fewshot=args.num_fewshot,
            seed=args.seed,
            unsafe=args.run_unsafe_code,
        )
        loaded = load_for_evaluation(args, args.max_length)
        plan = lm_plan(
            loaded.model,
            loaded.tokenizer,
            tasks,
            args.attention,
            about=loaded.about,
            limit=args.limit,
            batch_size=args.batch_size,
            max_length=args.max_length,
            allow_beyond_rope=args.allow_beyond_rope,
            apply_chat_template=args.apply_chat_template,
        )
        record = measure_with_bar(args, plan, target, "tasks")
    if is_first_process():
        print_lm(record)
        if target is not None:
            print(f"wrote {target}")
    return 0


def print_lm(record: dict[str, Any]) -> None:
    """The table of a result of task "lm"."""
    from hici.eval.conditions import attention_label
    from hici.report.tables import integer, print_table

    rows, notes = [], []
    for entry in record["conditions"]:
        error, value, better = entry["standard_error"], entry["value"], entry["higher_is_better"]
        arrow = "" if better is None else " (higher is better)" if better else " (lower is better)"
        shots = entry["num_fewshot"]
        rows.append([entry["task_name"], attention_label(entry), entry["metric"] + arrow,
                     str(entry["text"]) if value is None else f"{value:.4f}",
                     "-" if error is None else f"{error:.4f}", integer(entry["samples"]),
                     "-" if shots is None else str(shots)])  # fmt: skip
    cut = {(e["task_name"], attention_label(e)): e["truncated_requests"] for e in record["conditions"]}
    notes += [f"{task}, {attention}: {integer(count)} requests were longer than {record['protocol']['max_length']:,} "
              "tokens and lost their beginning." for (task, attention), count in cut.items() if count]  # fmt: skip
    if not all(entry["causal"] for entry in record["conditions"]):
        notes.append("(not causal): a token sees a summary of its own future; no number of a language model.")
    if record["protocol"]["limit"] is not None:
        notes.append(f"Only the first {record['protocol']['limit']:,} documents of each task (--limit).")
    protocol = record["protocol"]
    title = f"Tasks of {protocol['name']} {protocol['version']}"
    title += f", {record['model']['path']}" if "path" in (record["model"] or {}) else ""
    print_table(title, ["task", "attention", "metric", "value", "± s.e.", "samples", "examples"], rows, notes)


class _ListTasks(argparse.Action):
    """Lists and ends, like --help: a model is not needed."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from hici.eval.lm import check_installed

        check_installed()
        from hici.eval.harness.tasks import matching_tasks

        with _harness_kept_quiet(False):
            found = matching_tasks(values, getattr(namespace, "include_path", None))
        if not found:
            raise ValueError(f"no task matches {values!r}; patterns have * and ?, as in '*hellaswag*'")
        for name, kind in found:
            print(name if kind == "task" else f"{name}  ({kind})")
        parser.exit()


@contextlib.contextmanager
def _harness_kept_quiet(verbose: bool) -> Iterator[None]:
    """Context: what lm-eval prints goes to stderr, and its warnings are counted unless `verbose` shows them."""
    harness, counter = logging.getLogger("lm_eval"), _Counter(logging.WARNING)
    before = harness.propagate
    if not verbose:
        harness.addHandler(counter)
        harness.propagate = False
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        harness.removeHandler(counter)
        harness.propagate = before
    if counter.count and is_first_process():
        logger.warning("lm-eval logged %d warnings; --verbose shows them", counter.count)


class _Counter(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def _not_negative(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 0")
    return value
