"""One training step of SmolLM2-135M in full attention, shifted sparse attention and HiCI, side by side.

    python benchmarks/step.py --lengths 4096 8192 16384 --rounds 3 3 1 --out benchmarks/results

A step is the forward and backward pass of `hici train`: LoRA, embeddings, norms and HiCI modules train; frozen weights
and arithmetic in bfloat16 (autocast; `--precision bfloat16` for all parameters), gradient checkpointing, loss without
[T, vocabulary] logits. One process a length holds one model, and the modes take turns on it, so that a machine whose
speed drifts hits them alike: the ratio is taken round by round. Full attention runs in the first round only. Memory is
the process's peak during a step, with what the allocator kept of earlier ones (the model with its HiCI modules is the
same for all modes). Weights are random in the real shape, since values don't change the time.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

MODES = ("hici_s2", "hici", "full")
WARM_UP_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, nargs="+", default=[3], help="rounds: one number, or one a length")
    parser.add_argument("--visibility", default="past", choices=("all", "current", "past"))
    parser.add_argument("--precision", default="autocast", choices=("autocast", "bfloat16"),
                        help="autocast: trained parameters in float32, as in `hici train`")  # fmt: skip
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--out", type=Path, help="folder for step-DEVICE-PRECISION-DATE.json and .md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.rounds) not in (1, len(args.lengths)):
        parser.error(f"--rounds has {len(args.rounds)} numbers for {len(args.lengths)} lengths; give one, or one each")
    if args.one:
        print(json.dumps(measure(args.lengths[0], args.rounds[0], args)))
        return
    rounds = args.rounds * (len(args.lengths) // len(args.rounds))
    results = [run_length(length, count, args) for length, count in zip(args.lengths, rounds, strict=True)]
    table = markdown(results)
    print(table)
    if args.out is not None:
        write_results(args, results, table)


def run_length(length: int, rounds: int, args: argparse.Namespace) -> dict[str, Any]:
    """One length in a process of its own."""
    command = [sys.executable, __file__, "--one", "--lengths", str(length), "--rounds", str(rounds)]
    command += ["--visibility", args.visibility, "--preset", args.preset, "--precision", args.precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(length: int, rounds: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of every step at `length` tokens, by mode."""
    step = make_step(length, args)
    for mode in MODES:
        step(mode, WARM_UP_TOKENS)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    peaks: dict[str, list[int]] = {mode: [] for mode in MODES}
    for turn in range(rounds):
        for mode in MODES if turn == 0 else MODES[:2]:
            reset_peak()
            seconds[mode].append(step(mode, length))
            peaks[mode].append(peak_bytes())
            print(f"{length:>6} {mode:8} {seconds[mode][-1]:6.1f} s", file=sys.stderr, flush=True)
    return {"length": length, "rounds": rounds, "seconds": seconds, "peak_memory_bytes": peaks}


def make_step(length: int, args: argparse.Namespace) -> Callable[[str, int], float]:
    """A function (mode, tokens) -> seconds of one forward and backward pass."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hici.models.modes import set_attention
    from hici.presets import load_preset
    from hici.train.recipe import recipe_from_dict
    from hici.train.setup import prepare_model
    from hici.train.trainer import LanguageModel

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = dict(load_preset(args.preset))
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16).to(device)
    recipe = recipe_from_dict({
        "model": args.preset, "data": [], "output_dir": "", "context_length": length,
        "hici": {"num_segments": 4, "visibility": args.visibility},
    })  # fmt: skip
    wrapped = prepare_model(recipe, base)
    autocast = args.precision == "autocast"
    inner, dtype = (wrapped, torch.bfloat16) if autocast else (wrapped.to(torch.bfloat16), None)
    model = LanguageModel(inner, dtype).train()

    def step(mode: str, tokens: int) -> float:
        set_attention(wrapped, mode)
        ids = torch.randint(0, base.config.vocab_size, (1, tokens), device=device)
        started = time.perf_counter()
        model(ids)["loss"].backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        model.zero_grad()
        return seconds

    return step


def reset_peak() -> None:
    """Forget the peak memory so far: of the GPU's allocator, else (Linux) of the process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak memory since `reset_peak` (where that is not to be had: since the start)."""
    import torch

    from hici.machine import peak_memory

    if torch.cuda.is_available() or sys.platform != "linux":
        return peak_memory("cuda" if torch.cuda.is_available() else "cpu")
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def markdown(results: list[dict[str, Any]]) -> str:
    """The table: seconds, peak memory, and HiCI's time as a ratio to its rivals."""
    rows = [
        "| tokens | full s | hici_s2 s | hici s | hici / full | hici / hici_s2 | full GiB | hici_s2 GiB | hici GiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        times = {mode: median(values) for mode, values in result["seconds"].items()}
        memory = {mode: max(values) / 2**30 for mode, values in result["peak_memory_bytes"].items()}
        to_s2 = median(h / s for h, s in zip(result["seconds"]["hici"], result["seconds"]["hici_s2"], strict=True))
        shown = ("full", "hici_s2", "hici")
        rows.append(
            f"| {result['length']:,} | {' | '.join(f'{times[m]:.1f}' for m in shown)} "
            f"| {times['hici'] / times['full']:.2f} | {to_s2:.2f} | {' | '.join(f'{memory[m]:.2f}' for m in shown)} |"
        )
    return "\n".join(rows)


def write_results(args: argparse.Namespace, results: list[dict[str, Any]], table: str) -> None:
    from hici.files import write_json, write_text
    from hici.provenance import provenance

    made_with = provenance()
    machine = made_with["machine"]
    date = datetime.date.today().isoformat()
    device = machine["device"].split()[0].lower()
    name = args.out / f"step-{device}-{args.precision}-{date}"
    settings = {key: getattr(args, key) for key in ("preset", "visibility", "rounds", "precision")}
    settings |= {"segments": 4, "batch": 1, "gradient_checkpointing": True}
    write_json(f"{name}.json", {"settings": settings, "results": results, "made_with": made_with})
    packages = made_with["packages"]
    write_text(
        f"{name}.md",
        f"# Training step, SmolLM2-135M shape, {date}\n\n"
        f"{machine['device']}, {machine['cpu_threads']} threads, torch {packages['torch']}, transformers "
        f"{packages['transformers']}; visibility `{args.visibility}`, 4 segments, batch 1, "
        f"precision {args.precision}, checkpointing.\n"
        f"Seconds: medians over the rounds; hici / hici_s2: median of the ratios round by round.\n"
        f"Made by `python benchmarks/step.py {' '.join(sys.argv[1:])}` at revision {made_with['git_revision']}.\n\n"
        f"{table}\n",
    )


if __name__ == "__main__":
    main()
