"""`hici eval ppl`: perplexity over windows of real text, several attention modes and lengths in one run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hici.cli.common import ATTENTIONS, LOADING_NOTES, Loaded, add_model_flags, add_segment_flags, load, positive

_DESCRIPTION = """\
Perplexity over windows of a token stream: all documents in order, each text followed by the tokenizer's EOS (token
files are taken as they are). A window has as many tokens as the context. By default windows do not overlap; with
--stride, every window after the first scores only its last STRIDE tokens. The last, partial window is not used (the
result says how many tokens that leaves out).
Several --attention are compared pair by pair over the same windows."""

_EXAMPLES = f"""\
examples:
  hici eval ppl runs/adapter --data books/*.txt --context 2048 4096 8192 --attention full hici --out runs/ppl
  hici eval ppl owner/model --data test.jsonl --context 4096 --max-windows 20
  hici eval ppl owner/model --data test.bin --context 16384 --rope auto
  hici eval ppl owner/model --data a.txt --context 8192 --attention full hici hici_s2 --no-slots --segment-size 2048

{LOADING_NOTES}
Visibility all and current let a token see a summary of its own future: such a number is marked, and is no
perplexity of a language model."""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("ppl", help="perplexity on text", description=_DESCRIPTION, epilog=_EXAMPLES)
    add_model_flags(parser)
    add_segment_flags(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE", help="text, .jsonl, .json, .parquet, "
                       "token .bin, globs, folders")  # fmt: skip
    group.add_argument("--text-key", default="text", help="the text's column in records (default text)")
    group.add_argument("--context", nargs="+", type=positive, required=True, metavar="C", help="tokens of a window")
    group.add_argument("--stride", type=positive, metavar="N", help="distance of windows (default: the window)")
    group.add_argument("--max-windows", type=positive, metavar="N", help="that many, evenly spaced (default all)")
    group.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["full"], help="default full")
    group.add_argument("--rope", choices=("none", "auto", "linear", "yarn"), default="none", help="extend the rope so "
                       "to the longest context, once, for all contexts of the run; auto: linear, or the kind by which "
                       "the model is scaled already")  # fmt: skip
    group.add_argument("--allow-beyond-rope", action="store_true", help="permit contexts beyond the rope settings")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR|FILE.json", help="JSON, and a plot (.png) beside it; DIR: ppl.json")
    output.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    _check(args)
    target = None if args.out is None else _target(args.out, args.overwrite)
    loaded = load(args, args.attention)
    stream, data = _read_data(args, loaded)
    rope = _extend_rope(args, loaded)
    results = _measure(args, loaded, stream)
    record = _record(args, loaded, data, rope, results)
    _print(args, record, results)
    if target is not None:
        _write(target, record, results, title=f"{args.model}: {data['tokens']:,} tokens")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    for flag, values in (("--context", args.context), ("--attention", args.attention)):
        if len(set(values)) != len(values):
            raise ValueError(f"{flag} {' '.join(map(str, values))} names one twice; name each once")
    if args.stride is not None and args.stride > min(args.context):
        raise ValueError(
            f"--stride {args.stride} is larger than the window of {min(args.context)} tokens, which would leave "
            "tokens out; give a smaller one, or --max-windows to sample"
        )


def _target(out: str, overwrite: bool) -> Path:
    from hici.files import check_writable

    path = Path(out).expanduser()
    target = path if path.suffix == ".json" else path / "ppl.json"
    for file in (target, target.with_suffix(".png")):
        if file.is_dir():
            raise ValueError(f"--out {out}: {file} is a directory and cannot be written as a file; give another --out")
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists, and nothing is overwritten silently; give another --out or --overwrite")
    check_writable(target.parent)
    return target


def _read_data(args: argparse.Namespace, loaded: Loaded) -> tuple[Any, dict[str, Any]]:
    from hici.data.packing import load_stream
    from hici.models.lookup import get_causal_lm

    vocab_size = get_causal_lm(loaded.model).config.vocab_size
    stream, documents = load_stream(args.data, loaded.tokenizer, vocab_size=vocab_size, text_key=args.text_key)
    return stream, {"files": [str(f) for f in args.data], "documents": documents, "tokens": len(stream),
                    "eos_token_id": loaded.tokenizer.eos_token_id}  # fmt: skip


def _extend_rope(args: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    from hici.models.lookup import get_causal_lm
    from hici.rope import extend_rope, far_rope

    config = get_causal_lm(loaded.model).config
    before, longest = config.max_position_embeddings, max(args.context)
    extended = args.rope != "none" and longest > before
    if extended:
        extend_rope(loaded.model, longest, method=args.rope)
    return {
        "extended": far_rope(config.rope_parameters)["rope_type"] if extended else False,
        "positions_before": before,
        "positions": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "allow_beyond_rope": args.allow_beyond_rope,
    }


def _measure(args: argparse.Namespace, loaded: Loaded, stream: Any) -> list[Any]:
    """One `Perplexity` for every context and attention, contexts outermost."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from hici.eval.perplexity import choose_windows, perplexity
    from hici.models.lookup import get_causal_lm
    from hici.models.modes import set_attention
    from hici.rope import check_context

    for context in args.context:  # all of them before the first takes its time
        choose_windows(len(stream), context, args.stride, args.max_windows)
        if not args.allow_beyond_rope:
            check_context(get_causal_lm(loaded.model).config, context)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    results = []
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for context in args.context:
            for attention in args.attention:
                set_attention(loaded.model, attention)
                task = bar.add_task(f"{attention}, {context:,} tokens", total=None)
                result = perplexity(
                    loaded.model,
                    stream,
                    context,
                    stride=args.stride,
                    max_windows=args.max_windows,
                    allow_beyond_rope=args.allow_beyond_rope,
                    progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                )
                results.append(result)
    return results


def _differences(results: list[Any]) -> list[dict[str, Any]]:
    """Every later attention minus the first one, context by context."""
    from hici.eval.perplexity import paired_difference

    differences = []
    for result in results:
        first = next(r for r in results if r.windows.context == result.windows.context)
        if first is not result:
            estimate = paired_difference(result, first)
            differences.append(
                {"context": result.windows.context, "attention": result.attention, "minus": first.attention,
                 "loss_difference": estimate.mean, "standard_error": estimate.standard_error,
                 "interval": estimate.interval, "windows": len(result.losses)}
            )  # fmt: skip
    return differences


def _record(
    args: argparse.Namespace, loaded: Loaded, data: dict[str, Any], rope: dict[str, Any], results: list[Any]
) -> dict[str, Any]:
    from hici.provenance import provenance

    return {
        "task": "perplexity",
        "model": loaded.about,
        "attention": args.attention,
        "visibility": sorted({r.visibility for r in results if r.visibility}),
        "protocol": {
            "windows": "documents in order, each text followed by EOS (token files as they are), cut into windows of "
            "`context` tokens every `stride`; the first window scores all tokens but its first, later ones their last "
            "`stride` (never their first); the partial window at the end is not used",
            "context": args.context,
            "stride": args.stride,
            "max_windows": args.max_windows,
            "rope": rope,
        },
        "seed": None,  # nothing is drawn
        "data": {**data, "sha256": results[0].stream_sha256},
        "results": [result.to_dict() for result in results],
        "paired_differences": _differences(results),
        "provenance": provenance(),
    }


def _print(args: argparse.Namespace, record: dict[str, Any], results: list[Any]) -> None:
    from hici.report.tables import integer, interval, print_table

    rows, notes = [], []
    for r in results:
        error = r.loss.standard_error
        seen = "-" if r.visibility is None else r.visibility + (" (sees the future)" if r.leaks_future else "")
        rows.append([r.attention, seen, integer(r.windows.context), "-" if r.segments is None else str(r.segments),
                     f"{len(r.losses)} of {r.windows.available}", f"{r.loss.mean:.4f}",
                     "-" if error is None else f"{error:.4f}", f"{r.ppl:.3f}", interval(r.ppl_interval, 3),
                     f"{r.tokens_per_second:,.0f}"])  # fmt: skip
    if any(r.leaks_future for r in results):
        notes.append("(sees the future): a token sees a summary of its own future; no perplexity of a language model.")
    kind = record["protocol"]["rope"]["extended"]
    if kind:
        notes.append(f"Rope extended ({kind}) to {max(args.context):,} positions for every context above.")
    unused = ", ".join(f"{r.windows.unused_tokens:,} at {r.windows.context:,}" for r in _one_a_context(results))
    notes.append(f"Tokens behind the last whole window, not used: {unused}.")
    columns = ["attention", "visibility", "context", "segments", "windows", "loss", "± s.e.", "ppl", "95 %", "tokens/s"]
    print_table(f"Perplexity of {args.model}", columns, rows, notes)
    if record["paired_differences"]:
        rows = [[f"{d['attention']} - {d['minus']}", integer(d["context"]), str(d["windows"]),
                 f"{d['loss_difference']:+.4f}",
                 "-" if d["standard_error"] is None else f"{d['standard_error']:.4f}", interval(d["interval"], 4)]
                for d in record["paired_differences"]]  # fmt: skip
        print_table("Difference in loss, same windows", ["pair", "context", "windows", "mean", "± s.e.", "95 %"], rows)


def _one_a_context(results: list[Any]) -> list[Any]:
    return list({r.windows.context: r for r in results}.values())


def _write(target: Path, record: dict[str, Any], results: list[Any], title: str) -> None:
    from hici.files import write_json
    from hici.report.plots import loss_by_context

    series: dict[str, list[Any]] = {}
    for r in results:
        label = r.attention + (f", visibility {r.visibility}" if r.visibility else "")
        label += " (sees the future)" if r.leaks_future else ""
        series.setdefault(label, []).append((r.windows.context, r.loss.mean, r.loss.interval))
    write_json(target, record)
    picture = loss_by_context(target.with_suffix(".png"), series, title)
    print(f"wrote {target} and {picture}")
