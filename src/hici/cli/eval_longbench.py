"""`hici eval longbench`: predictions for LongBench's datasets, and their scores."""

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

_DESCRIPTION = """\
Predict and score LongBench (version 1) from its own files, DATASET.jsonl with input, context, answers, all_classes,
length: LongBench's prompts and generation lengths, greedy. A prompt of more than --max-length tokens is cut in the
middle as LongBench prescribes. The chat template is used only with --chat, and never for few-shot and code prompts.

With --out DIR, predictions are written in LongBench's format too, DIR/predictions/ATTENTION/DATASET.jsonl (with --out
NAME.json: NAME-predictions/), so that `hici score longbench` and LongBench itself can score them (LongBench-E's files
are named DATASET.jsonl there, without _e)."""

_EXAMPLES = f"""\
examples:
  hici eval longbench runs/adapter --data longbench/data --max-length 15500 --attention full hici --out runs/longbench
  hici eval longbench owner/model --data longbench/data --datasets trec hotpotqa --max-samples 20 --chat

{LOADING_NOTES}

{RESUME_NOTES}

Packages for the scores: pip install 'hici[scores]'"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "longbench", help="LongBench: predict and score", description=_DESCRIPTION, epilog=_EXAMPLES
    )  # fmt: skip
    add_evaluation_flags(parser, "longbench", picture=False)
    group = parser.add_argument_group("LongBench")
    group.add_argument("--data", nargs="+", required=True, metavar="DIR|FILE", help="LongBench's data folder, or files")
    group.add_argument("--datasets", nargs="+", metavar="NAME", help="these only (default: all that are in --data)")
    group.add_argument("--max-length", type=positive, metavar="N", help="tokens of a prompt (default: the model's "
                       "positions less the dataset's generation length)")  # fmt: skip
    group.add_argument("--max-samples", type=positive, metavar="N", help="that many of each dataset, evenly spaced")
    group.add_argument("--chat", action="store_true", help="ask in the tokenizer's chat template")
    group.add_argument("--edit-similarity", choices=("levenshtein", "difflib"), default="levenshtein",
                       help="of code, see `hici score longbench --help` (default levenshtein)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Predict, score, print, write."""
    _check(args)
    target = result_target(args, "longbench", picture=False)
    folder = None if target is None else _prediction_folder(args, target)

    from hici.eval.longbench.predict import choose_samples, longest_sequence, prediction_plan, write_predictions
    from hici.eval.longbench.samples import find_data
    from hici.eval.longbench.scorer import Scorer

    chosen = choose_samples(find_data(args.data, args.datasets), args.max_samples)
    for each in chosen.values():
        Scorer(args.edit_similarity).check(each.dataset)  # before the model: a missing package need not wait for that
    longest = None if args.max_length is None else longest_sequence(chosen, args.max_length)
    loaded = load_for_evaluation(args, longest)
    plan = prediction_plan(
        loaded.model,
        loaded.tokenizer,
        loaded.about,
        chosen,
        attentions=args.attention,
        max_length=args.max_length,
        max_samples=args.max_samples,
        chat=args.chat,
        edit_similarity=args.edit_similarity,
        allow_beyond_rope=args.allow_beyond_rope,
    )
    record = measure_with_bar(args, plan, target, "LongBench")
    if is_first_process():
        _print(args, record)
        if target is not None and folder is not None:
            folders = write_predictions(record, chosen, folder, overwrite=args.overwrite)
            print(f"wrote {target} and {', '.join(map(str, folders))}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    check_evaluation(args, datasets=args.datasets or [])
    if "hici_s2" in args.attention:
        raise ValueError("--attention hici_s2 is for training and perplexity, and writes no text; give full or hici")
    for flag, given in (("--rope", args.rope != "none"), ("--allow-beyond-rope", args.allow_beyond_rope)):
        if given and args.max_length is None:
            raise ValueError(f"{flag} changes nothing while prompts are cut to the model's positions; add --max-length")


def _prediction_folder(args: argparse.Namespace, target: Path) -> Path:
    """Where predictions go, beside the result. Raises ValueError when others are there already."""
    plain = Path(args.out).suffix != ".json"
    folder = target.with_name("predictions" if plain else f"{target.stem}-predictions")
    begun = target.exists() or any(target.parent.glob(f"{target.stem}.partial-*.jsonl"))
    if folder.exists() and not begun and not args.overwrite:
        raise ValueError(f"{folder} exists, but {target} does not, so its predictions are of something else; give "
                         "another --out or --overwrite")  # fmt: skip
    return folder


def _print(args: argparse.Namespace, record: dict[str, Any]) -> None:
    from hici.cli.score_longbench import score_notes
    from hici.eval.conditions import attention_label
    from hici.report.tables import integer, print_table

    conditions = record["conditions"]
    labels = list(dict.fromkeys(attention_label(condition) for condition in conditions))
    by_name: dict[str, list[dict[str, Any]]] = {}
    for condition in conditions:
        by_name.setdefault(condition["dataset"], []).append(condition)
    rows = [
        [name, each[0]["metric"], integer(each[0]["samples"]), integer(each[0]["max_length"]), integer(each[0]["cut"]),
         *(f"{condition['score']:.2f}" for condition in each)]
        for name, each in by_name.items()
    ]  # fmt: skip
    first = {name: each[0] for name, each in by_name.items()}
    notes = score_notes(
        {
            "metrics": {name: each["metric"] for name, each in first.items()},
            "samples": {name: each["samples"] for name, each in first.items()},
            "protocol": record["protocol"],
            "corrupt_lines": [],
            "unscored": [
                {"file": f"{attention_label(c)}, {c['dataset']}", "line": p["index"] + 1, "problem": p["problem"]}
                for c in conditions for p in c["predictions"] if p["problem"] is not None
            ],
        }
    )  # fmt: skip
    shorter = sum(each["cut_below_max_length"] for each in first.values())
    if shorter:
        notes.append(f"{shorter} prompts were cut below max_length, for the model's positions leave no more room.")
    columns = ["dataset", "metric", "samples", "max length", "cut", *labels]
    print_table(f"LongBench of {args.model}", columns, rows, notes)
