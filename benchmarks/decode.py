"""Decoding and prefill of SmolLM2-135M in full attention and in HiCI: memory and speed after up to 100K tokens.

    python benchmarks/decode.py --out benchmarks/results

Decoding. Both caches are filled directly: transformers' DynamicCache with random keys and values; a HiCICache reads
almost three segments, which gives it its real shapes, and gets random keys and values in the place of those. Values
don't change the time, and the model's are random too, in the real shape. A context of T tokens (a multiple of the
segment size S) is timed around T + S/2 tokens in both modes, so that HiCI's unfinished segment is half full: its mean.
A token of full attention sees all tokens so far, one of HiCI the slots and its segment. Greedy decoding, one row, one
call of the model a token; a cell's time is the median of its tokens. DynamicCache copies all of its keys and values
for every token; that is what users get, so it stays. In a round HiCI decodes, its contexts taking turns token by token,
and then full attention likewise (which holds the caches of all contexts); ratios are taken round by round. A machine
whose speed drifts so hits all alike.

The border. In the step that ends a segment HiCI makes the slots of the next one. Timed around it: steps of an almost
full segment, the step that ends it, the step that begins the next. What the end takes longer, divided by S, is the
border's share of a token.

Prefill. Full attention in one call, HiCI in pieces of a segment (`hici.prefill`) and in one call, each in a process of
its own; the peak memory is that process's. The calls make the logits of the last token, `hici.prefill` none.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from step import peak_bytes, reset_peak

MODES = ("hici", "full")
PREFILLS = ("full", "hici_pieces", "hici_call")
WARM_UP = 2  # tokens of a cell that are not counted
BEFORE_BORDER = 6  # tokens that are, of an almost full segment
PREFILL_WARM_UP = 64  # few, since what they leave in memory hides as much of the peak
CACHE_LIMIT, SPEED_LIMIT = 40, 0.95  # at the largest context: full / HiCI cache, HiCI's speed / that at the smallest


def main() -> None:
    args = parse()
    if args.one:
        print(json.dumps(measure_prefill(args.one, args.prefill[0], args)))
        return
    results = {"decode": measure_decode(args), "prefill": run_prefills(args)}
    text = report(args, results)
    print(text)
    if args.out is not None:
        write_results(args, results, text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768, 102400])
    parser.add_argument("--segment-size", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of a cell")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 4096, 8192, 16384], help="lengths, or none")
    parser.add_argument("--prefill-rounds", type=int, nargs="+", default=[3], help="one number, or one a length")
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--out", type=Path, help="folder for decode-DEVICE-bfloat16-DATE.json and .md")
    parser.add_argument("--one", choices=PREFILLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size, shortest = args.segment_size, 2 * (WARM_UP + max(args.new_tokens, BEFORE_BORDER + 2))
    if size < shortest:
        parser.error(f"--segment-size {size} is below {shortest}, twice the tokens of a cell; give more")
    for context in args.contexts:
        if context < size or context % size:
            parser.error(f"--contexts {context} is no multiple of --segment-size {size}; give multiples")
    if len(args.prefill_rounds) not in (1, len(args.prefill)):
        parser.error(f"{len(args.prefill_rounds)} --prefill-rounds for {len(args.prefill)} lengths; give 1, or 1 each")
    return args


def make_model(args: argparse.Namespace, positions: int) -> Any:
    """The preset's shape with random weights and HiCI on it, with at least so many positions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import hici
    from hici.presets import load_preset

    torch.manual_seed(0)
    shape = dict(load_preset(args.preset))
    shape["max_position_embeddings"] = max(positions, shape["max_position_embeddings"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    config = hici.HiCIConfig(segment_size=args.segment_size, visibility="past")
    return hici.attach(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), config)


# ---- decoding


def measure_decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every context: seconds of the cells and around the borders by round, bytes of the caches."""
    import torch

    from hici.models.lookup import hici_config
    from hici.models.modes import set_attention

    size = args.segment_size
    model = make_model(args, max(args.contexts) + 2 * size)
    slots = hici_config(model).slots_in_use
    results: list[dict[str, Any]] = [
        {"context": context, "seconds": {mode: [] for mode in MODES}, "cache_bytes": {}, "border_seconds": [],
         "keys_seen": {"hici": slots + size // 2, "full": context + size // 2}}
        for context in args.contexts
    ]  # fmt: skip
    with torch.inference_mode():
        fill = make_fill(model, size)
        for turn in range(args.rounds):
            for mode in MODES:
                set_attention(model, mode)
                measure_round(model, fill, mode, results, args)
                cells = [f"{result['context']}: {1000 * median(result['seconds'][mode][-1]):.1f}" for result in results]
                print(f"{turn} {mode:5} ms a token at {', '.join(cells)}", file=sys.stderr, flush=True)
    return results


def measure_round(
    model: Any, fill: Callable[[str, int], Any], mode: str, results: list[dict[str, Any]], args: argparse.Namespace
) -> None:
    """One mode at all contexts."""
    half = args.segment_size // 2 - args.new_tokens // 2 - WARM_UP
    caches = [fill(mode, result["context"] + half) for result in results]
    for result, cache, seconds in zip(results, caches, decode(model, caches, args.new_tokens), strict=True):
        result["seconds"][mode].append(seconds)
        result["cache_bytes"][mode] = cache_bytes(cache)
    if mode == "hici":
        almost = args.segment_size - BEFORE_BORDER - 1 - WARM_UP
        caches = [fill(mode, result["context"] + almost) for result in results]
        for result, seconds in zip(results, decode(model, caches, BEFORE_BORDER + 2), strict=True):
            result["border_seconds"].append(seconds)


def make_fill(model: Any, size: int) -> Callable[[str, int], Any]:
    """A function (mode, tokens) -> a cache that holds so many."""
    import torch
    from transformers import DynamicCache

    import hici

    config, begun = model.config, 2 * size + size // 2
    ids = torch.randint(0, config.vocab_size, (1, begun + size // 4), device=model.device)
    read: Any = hici.prefill(model, ids[:, :begun])
    hici.prefill(model, ids[:, begun:], read)  # its space is now a segment
    _, heads, _, head_dim = read.layers[0].state.keys.shape

    def fill_hici(tokens: int) -> Any:
        cache = copy.deepcopy(read)
        for layer, whole in zip(cache.layers, read.layers, strict=True):
            state = layer.state
            state.before, state.columns = [tokens], tokens
            state.keys, state.values = torch.randn_like(whole.state.keys), torch.randn_like(whole.state.values)
            state.statistics.segments_1.fill_(tokens // size)
        return cache

    def fill_full(tokens: int) -> Any:
        cache = DynamicCache(config=config)
        keys, values = torch.randn(2, 1, heads, tokens, head_dim, dtype=model.dtype, device=model.device)
        for i in range(config.num_hidden_layers):
            cache.update(keys, values, i)  # copies them
        return cache

    return lambda mode, tokens: fill_hici(tokens) if mode == "hici" else fill_full(tokens)


def decode(model: Any, caches: list[Any], tokens: int) -> list[list[float]]:
    """Seconds of every token, by cache; they take turns token by token. After a warm-up."""
    import torch

    ids = [torch.zeros(1, 1, dtype=torch.long, device=model.device) for _ in caches]
    seconds: list[list[float]] = [[] for _ in caches]
    for _ in range(WARM_UP + tokens):
        for i, cache in enumerate(caches):
            synchronize()
            started = time.perf_counter()
            ids[i] = model(input_ids=ids[i], past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            synchronize()
            seconds[i].append(time.perf_counter() - started)
    return [each[WARM_UP:] for each in seconds]


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of either cache."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# ---- prefill


def run_prefills(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every length: seconds and peak bytes by kind and round; a process each."""
    counts = args.prefill_rounds * (len(args.prefill) // len(args.prefill_rounds))
    results: list[dict[str, Any]] = [
        {"length": length, "rounds": count, "seconds": {}, "peak_memory_bytes": {}, "memory_before_bytes": {}}
        for length, count in zip(args.prefill, counts, strict=True)
    ]
    for turn in range(max(counts, default=0)):
        for result in results:
            if turn >= result["rounds"]:
                continue
            for kind in PREFILLS:
                command = [sys.executable, __file__, "--one", kind, "--prefill", str(result["length"])]
                command += ["--preset", args.preset]
                command += ["--segment-size", str(args.segment_size), "--contexts", str(args.segment_size)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                    result[name].setdefault(kind, []).append(value)
                shown = f"{turn} prefill {result['length']:>7} {kind:11} {result['seconds'][kind][-1]:7.1f} s"
                print(shown, file=sys.stderr, flush=True)
    return results


def measure_prefill(kind: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of one prefill in this process, its memory before and the peak."""
    import psutil
    import torch

    import hici
    from hici.models.modes import set_attention

    model = make_model(args, length)
    set_attention(model, "full" if kind == "full" else "hici")

    def read(tokens: int) -> float:
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
        synchronize()
        started = time.perf_counter()
        if kind == "hici_pieces":
            hici.prefill(model, ids)
        else:
            cache = hici.HiCICache(model) if kind == "hici_call" else None  # None: the model's own
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        synchronize()
        return time.perf_counter() - started

    with torch.inference_mode():
        read(min(PREFILL_WARM_UP, length))
        reset_peak()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
        seconds = read(length)
    return {"seconds": seconds, "memory_before_bytes": before, "peak_memory_bytes": peak_bytes()}


# ---- tables


def report(args: argparse.Namespace, results: dict[str, Any]) -> str:
    """All tables, and whether the limits are kept."""
    decoded, size = results["decode"], args.segment_size
    parts = [
        f"## Decoding\n\nOne row, HiCI's segment of {size:,} half full. Medians over {args.rounds} rounds (smallest to "
        f"largest); ratios of speeds are taken round by round.\n\n{decode_table(decoded)}",
        f"## The border of a segment (HiCI)\n\nMilliseconds of a step. Share: what the step that ends a segment "
        f"takes longer than one in an almost full segment, over {size:,} tokens.\n\n"
        f"{border_table(decoded, size)}",
    ]
    if results["prefill"]:
        parts.append(
            "## Prefill\n\nMedians over the rounds (smallest to largest); measured to the lengths shown, and not "
            "extrapolated. GiB: the process's largest peak, and in brackets what of it is over the model before.\n\n"
            f"{prefill_table(results['prefill'])}"
        )
    return "\n\n".join([*parts, "## Limits\n\n" + "\n".join(f"* {line}" for line in checks(decoded))])


def speeds(result: dict[str, Any], mode: str) -> list[float]:
    """Tokens a second, by round."""
    return [1 / median(cell) for cell in result["seconds"][mode]]


def ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---:" * len(head) + "|", *lines[1:]])


def decode_table(results: list[dict[str, Any]]) -> str:
    first, rows = min(results, key=lambda result: result["context"]), []
    for result in results:
        hici, full = speeds(result, "hici"), speeds(result, "full")
        size = result["cache_bytes"]
        rows.append([
            f"{result['context']:,}", f"{result['keys_seen']['full']:,}", f"{result['keys_seen']['hici']:,}",
            spread(full), spread(hici), spread(ratios(hici, full)),
            spread(ratios(hici, speeds(first, "hici"))), spread(ratios(full, speeds(first, "full"))),
            f"{size['full'] / 2**20:,.1f}", f"{size['hici'] / 2**20:,.1f}", f"{size['full'] / size['hici']:.1f}",
        ])  # fmt: skip
    at = f"{first['context']:,}"
    return table(
        ["context", "keys full sees", "keys HiCI sees", "full tokens/s", "HiCI tokens/s", "HiCI / full",
         f"HiCI / HiCI at {at}", f"full / full at {at}", "full cache MiB", "HiCI cache MiB", "full / HiCI"],
        rows,
    )  # fmt: skip


def border_table(results: list[dict[str, Any]], size: int) -> str:
    rows = []
    for result in results:
        almost = [median(times[:BEFORE_BORDER]) for times in result["border_seconds"]]
        end, begin = ([times[BEFORE_BORDER + i] for times in result["border_seconds"]] for i in (0, 1))
        half = median(median(cell) for cell in result["seconds"]["hici"])
        share = median(e - a for e, a in zip(end, almost, strict=True)) / size
        values = [f"{1000 * x:.1f}" for x in (half, median(almost), median(end), median(begin))]
        rows.append([f"{result['context']:,}", *values, f"{1000 * share:.4f}", f"{share / half:.2%}"])
    head = ["context", "half full", "almost full", "ends it", "begins the next", "share ms a token", "share of a token"]
    return table(head, rows)


def prefill_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        seconds = result["seconds"]
        pairs = [max(zip(result["peak_memory_bytes"][kind], result["memory_before_bytes"][kind], strict=True))
                 for kind in PREFILLS]  # fmt: skip
        memory = [f"{peak / 2**30:.2f} ({(peak - before) / 2**30:.2f})" for peak, before in pairs]
        rows.append([
            f"{result['length']:,}", str(result["rounds"]),
            *(spread(seconds[kind], 1) for kind in PREFILLS),
            *(f"{result['length'] / median(seconds[kind]):,.0f}" for kind in PREFILLS),
            spread(ratios(seconds["hici_pieces"], seconds["full"])), *memory,
        ])  # fmt: skip
    names = ("full", "HiCI pieces", "HiCI one call")
    return table(
        ["tokens", "rounds", *(f"{name} s" for name in names), *(f"{name} tokens/s" for name in names),
         "seconds: HiCI pieces / full", *(f"{name} GiB" for name in names)],
        rows,
    )  # fmt: skip


def checks(results: list[dict[str, Any]]) -> list[str]:
    """The limits, each with PASS or FAIL."""
    ordered = sorted(results, key=lambda result: result["context"])
    first, last = ordered[0], ordered[-1]
    fewer = last["cache_bytes"]["full"] / last["cache_bytes"]["hici"]
    sizes = sorted({result["cache_bytes"]["hici"] for result in results})
    faster = median(ratios(speeds(last, "hici"), speeds(first, "hici")))
    at, start = f"{last['context']:,}", f"{first['context']:,}"
    lines = [
        (fewer >= CACHE_LIMIT, f"HiCI's cache at {at} / full: 1/{fewer:.1f} (limit 1/{CACHE_LIMIT})"),
        (len(sizes) == 1, f"bytes of HiCI's cache, the same at all contexts: {sizes}"),
        (faster >= SPEED_LIMIT, f"HiCI's decoding at {at} / at {start}: {faster:.3f} (limit {SPEED_LIMIT})"),
    ]
    return [f"{'PASS' if passed else 'FAIL'}: {text}" for passed, text in lines]


def write_results(args: argparse.Namespace, results: dict[str, Any], text: str) -> None:
    from hici.files import write_json, write_text
    from hici.provenance import provenance

    made_with = provenance()
    machine, packages = made_with["machine"], made_with["packages"]
    date = datetime.date.today()
    name = args.out / f"decode-{machine['device'].split()[0].lower()}-bfloat16-{date}"
    settings = {key: getattr(args, key) for key in ("preset", "segment_size", "new_tokens", "rounds", "prefill_rounds")}
    settings |= {"dtype": "bfloat16", "batch": 1, "visibility": "past", "warm_up": WARM_UP,
                 "before_border": BEFORE_BORDER}  # fmt: skip
    write_json(f"{name}.json", {"settings": settings, "results": results, "made_with": made_with})
    write_text(
        f"{name}.md",
        f"# Decoding and prefill, {args.preset} shape, {date}\n\n"
        f"{machine['device']}, {machine['cpu_threads']} threads, torch {packages['torch']}, transformers "
        f"{packages['transformers']}; bfloat16, random weights, one row; HiCI: visibility `past`, segments of "
        f"{args.segment_size:,} tokens.\n"
        f"Caches are filled with random keys and values of the real shapes, both around half a segment behind the "
        f"context; the full cache is transformers' DynamicCache, which copies itself for every token.\n"
        f"Made by `python benchmarks/decode.py {' '.join(sys.argv[1:])}` at revision {made_with['git_revision']}.\n\n"
        f"{text}\n",
    )


if __name__ == "__main__":
    main()
