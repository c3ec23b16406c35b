"""`hici inspect`: where the attention of a text goes: global slots, local slots or tokens, by layer and head."""

from __future__ import annotations

import argparse
from typing import Any

from hici.cli.common import Loaded, add_model_flags, add_segment_flags, model_kind, positive
from hici.cli.evaluating import (
    add_output_flags,
    add_rope_flags,
    is_first_process,
    load_for_evaluation,
    measure_with_bar,
    result_target,
)

_NAME = "inspect"

_DESCRIPTION = """\
How much of the attention in mode hici goes to the global slots, the local slots and the tokens of the own segment, by
layer and head (mean over the query tokens of all segments that have slots; with visibility past the first has none).
The weights are those of the reference attention, in float32, of the model's own queries, keys and slots. And how alike
the slots are: of two segments, and two slots of one segment.
Windows of CONTEXT tokens are taken from all documents in order, each text followed by the tokenizer's EOS."""

_EXAMPLES = """\
examples:
  hici inspect runs/adapter --data book.txt --context 8192 --out runs/inspect
  hici inspect runs/adapter --data books/*.txt --context 16384 --windows 4 --layers 0 10 20 --segment-size 2048

MODEL must hold trained HiCI modules: a directory that hici wrote, or a released HiCI adapter. With visibility all or
current, slots summarise a token's own future; such shares are marked (not causal).
With --out, windows are kept as they are measured: after a kill the same command goes on."""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "inspect", help="where the attention goes, by layer and head", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.set_defaults(attention=["hici"])  # what the shared loading reads
    add_model_flags(parser)
    add_segment_flags(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE", help="text, .jsonl, .json, .parquet, "
                       "token .bin, globs, folders")  # fmt: skip
    group.add_argument("--text-key", default="text", help="the text's column in records (default text)")
    group.add_argument("--context", type=positive, required=True, metavar="C", help="tokens of a window")
    group.add_argument("--windows", type=positive, default=1, metavar="N", help="that many, evenly spaced (default 1)")
    group.add_argument("--layers", nargs="+", type=int, metavar="L", help="numbers from 0 (default: all)")
    add_rope_flags(parser.add_argument_group("positions"))
    add_output_flags(parser, _NAME)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    _check(args)
    target = result_target(args, _NAME)
    loaded = load_for_evaluation(args, args.context)

    from hici.eval.inspection import inspection_plan
    from hici.models.modes import set_attention

    set_attention(loaded.model, "hici")
    stream, data = _read_data(args, loaded)
    plan = inspection_plan(
        loaded.model,
        stream,
        args.context,
        windows=args.windows,
        layers=args.layers,
        allow_beyond_rope=args.allow_beyond_rope,
        about=loaded.about,
        data=data,
    )
    record = measure_with_bar(args, plan, target, "windows")
    if is_first_process():
        from hici.report.inspection import draw_inspection, print_inspection

        print_inspection(record)
        if target is not None:
            picture = draw_inspection(target.with_suffix(".png"), record)
            print(f"wrote {target} and {picture}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if args.no_slots:
        raise ValueError("--no-slots leaves tokens alone, so there are no shares to measure; drop it")
    if args.layers is not None and len(set(args.layers)) != len(args.layers):
        raise ValueError(f"--layers {' '.join(map(str, args.layers))} names one twice; name each once")
    if model_kind(args.model) == "plain":
        raise ValueError(
            f"{args.model} is a plain model without HiCI modules, so it has no slots to look at; give a directory that "
            "`hici train` or `hici merge --as hici` wrote, or a released adapter"
        )


def _read_data(args: argparse.Namespace, loaded: Loaded) -> tuple[Any, dict[str, Any]]:
    from hici.data.stream import load_stream
    from hici.models.lookup import get_causal_lm

    vocab_size = get_causal_lm(loaded.model).config.vocab_size
    stream, documents = load_stream(args.data, loaded.tokenizer, vocab_size=vocab_size, text_key=args.text_key)
    files = [str(file) for file in args.data]
    return stream, {"files": files, "documents": documents, "eos_token_id": loaded.tokenizer.eos_token_id}
