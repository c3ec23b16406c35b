"""`hici eval ppl`: perplexity of real text under a named protocol, several attention modes and lengths in one run."""

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

PROTOCOLS = ("strict", "published", "position")

_DESCRIPTION = """\
Perplexity of a text at several lengths, under one of three protocols:
  strict     by document; every token is scored once; token weighted, with a bootstrap interval. With the default
             --stride (the context) it is the rolling log-likelihood of lm-evaluation-harness. The default
  published  windows every 256 tokens over one stream, all positions scored: comparable with the tables of LongLoRA and
             HiCI (which take --max-windows none: all of them)
  position   the loss of each position in a window, in bins: what more context is worth
--max-windows takes that many windows, evenly spaced, and says so in the result.
Several --attention are compared pair by pair over the same windows."""

_EXAMPLES = f"""\
examples:
  hici eval ppl runs/adapter --data books/*.txt --context 2048 4096 8192 --attention full hici --out runs/results
  hici eval ppl owner/model --data test.bin --protocol published --context 8192 16384 --max-windows 50 --rope auto
  hici eval ppl runs/adapter --data test.jsonl --protocol position --context 8192
  hici eval ppl owner/model --data a.txt --context 8192 --attention full hici hici_s2 --no-slots --segment-size 2048

{LOADING_NOTES}
Visibility all and current let a token see a summary of its own future: such a number is marked as not causal, and is
no perplexity of a language model.
{RESUME_NOTES}"""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("ppl", help="perplexity on text", description=_DESCRIPTION, epilog=_EXAMPLES)
    group = parser.add_argument_group("measurement")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE", help="text, .jsonl, .json, .parquet, "
                       "token .bin, globs, folders")  # fmt: skip
    group.add_argument("--text-key", default="text", help="the text's column in records (default text)")
    group.add_argument("--protocol", choices=PROTOCOLS, default="strict", help="default strict")
    group.add_argument("--context", nargs="+", type=positive, required=True, metavar="C", help="tokens of a window")
    group.add_argument("--stride", type=positive, metavar="N", help="tokens from one window to the next (default: the "
                       "context; published: 256)")  # fmt: skip
    group.add_argument("--max-windows", type=positive, metavar="N", help="that many, evenly spaced (default all)")
    add_evaluation_flags(parser, "ppl-PROTOCOL")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    check_evaluation(args, context=args.context)
    if args.stride is not None and args.stride > min(args.context):
        raise ValueError(
            f"--stride {args.stride} is larger than the window of {min(args.context)} tokens, which would leave "
            "tokens out; give a smaller one, or --max-windows to sample"
        )
    target = result_target(args, f"ppl-{args.protocol}")
    loaded = load_for_evaluation(args, max(args.context))
    result = measure_with_bar(args, _plan(args, loaded), target, f"perplexity, {args.protocol}")
    if is_first_process():
        print_perplexity(result, args.model)
        if target is not None:
            print(f"wrote {target} and {_draw(result, target)}")
    return 0


def _plan(args: argparse.Namespace, loaded: Any) -> Any:
    from dataclasses import replace

    from hici.data.stream import load_documents
    from hici.eval.protocols import make_text, perplexity_plan
    from hici.models.lookup import get_causal_lm

    vocab_size = get_causal_lm(loaded.model).config.vocab_size
    documents = load_documents(args.data, loaded.tokenizer, vocab_size=vocab_size, text_key=args.text_key)
    text = make_text(
        documents,
        args.protocol,
        bos_token_id=loaded.tokenizer.bos_token_id,
        eos_token_id=loaded.tokenizer.eos_token_id,
    )
    text = replace(text, facts={"files": [str(file) for file in args.data], **text.facts})
    return perplexity_plan(
        loaded.model,
        text,
        args.protocol,
        args.context,
        args.attention,
        stride=args.stride,
        max_windows=args.max_windows,
        about=loaded.about,
    )


def print_perplexity(result: dict[str, Any], name: str) -> None:
    """The tables of a result: every length and attention, then the paired differences."""
    from hici.eval.conditions import attention_label
    from hici.report.tables import integer, interval, print_table

    conditions = result["conditions"]
    rows = []
    for found in conditions:
        windows, error = found["windows"], found["standard_error"]
        segments = "-" if found["segments"] is None else str(found["segments"])
        rows.append([attention_label(found), integer(found["context"]), segments,
                     f"{len(found['losses']):,} of {windows['available']:,}", f"{found['mean_loss']:.4f}",
                     "-" if error is None else f"{error:.4f}", f"{found['ppl']:.3f}",
                     interval(found["ppl_interval"], 3), f"{found['tokens_per_second']:,.0f}"])  # fmt: skip
    columns = ["attention", "context", "segments", "windows", "loss", "± s.e.", "ppl", "95 %", "tokens/s"]
    print_table(f"Perplexity of {name}, protocol {result['protocol']['name']}", columns, rows, _notes(result))
    if result["paired_differences"]:
        labels = {found["attention"]: attention_label(found) for found in conditions}
        rows = [[f"{labels[d['attention']]} - {labels[d['minus']]}", integer(d["context"]), str(d["windows"]),
                 f"{d['loss_difference']:+.4f}",
                 "-" if d["standard_error"] is None else f"{d['standard_error']:.4f}", interval(d["interval"], 4)]
                for d in result["paired_differences"]]  # fmt: skip
        print_table("Difference in loss, same windows", ["pair", "context", "windows", "mean", "± s.e.", "95 %"], rows)


def _notes(result: dict[str, Any]) -> list[str]:
    from hici.eval.windows import OVERLAPPING

    notes, conditions = [], result["conditions"]
    if not all(found["causal"] for found in conditions):
        notes.append("not causal: a token sees a summary of its own future; no perplexity of a language model.")
    if any(found["windows"]["unit"] == OVERLAPPING for found in conditions):
        notes.append("Windows overlap: errors are over groups of them, and count what neighbouring groups share.")
    rope = result["model"]["rope"]
    if rope["extended"]:
        notes.append(f"Rope extended ({rope['extended']}) to {rope['positions']:,} positions for every context above.")
    unused = {found["context"]: found["windows"]["unused_tokens"] for found in conditions}
    if any(unused.values()):
        told = ", ".join(f"{tokens:,} at {context:,}" for context, tokens in unused.items())
        notes.append(f"Tokens behind the last whole window, not used: {told}.")
    return notes


def _draw(result: dict[str, Any], target: Path) -> Path:
    from hici.report.charts.perplexity import draw_perplexity

    title = f"{result['model']['path']}: protocol {result['protocol']['name']}, {result['data']['tokens']:,} tokens"
    return draw_perplexity(target.with_suffix(".png"), result, title)
