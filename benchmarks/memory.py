"""Peak memory of a training step by context length, against what `hici info` estimates.

    python benchmarks/memory.py --lengths 4096 8192 16384 32768 --tiles 2048 --out benchmarks/results
    python benchmarks/memory.py --table benchmarks/results/memory-cpu-DATE.json       # the estimates anew

Each case runs in a process of its own: model, LoRA, optimizer as `hici train` makes them, a short step (the optimizer's
state is there from then on), and the step that is measured: gradients of a short sequence and of one of the length are
added up, as with gradient_accumulation_steps, and the optimizer steps. Weights are random in the real shape: values
don't change the memory.

Memory on the CPU is the peak of the process's resident set during the step, less what it was before the model was
made (Python and its libraries, shown apart). On CUDA it is the allocator's peak. glibc puts blocks below a threshold,
which grows up to 32 MiB, on a heap that has holes; `--mmap-threshold` (bytes, default 1 MiB; 0: glibc's own way) gives
each larger block back to the system at once, and what is measured is then what is held.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHORT_STEP = 256
MEASURED = ("device", "before", "rest", "peak", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--methods", nargs="+", default=["hici"], choices=("hici", "hici_s2", "full"))
    parser.add_argument("--tiles", type=int, nargs="+", default=[0, 2048], help="tokens of an MLP's tile; 0: the whole")
    parser.add_argument("--segment-size", type=int, default=2048)
    parser.add_argument("--visibility", default="past", choices=("all", "current", "past"))
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--offload", action="store_true", help="checkpoints in the CPU's memory (CUDA)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--mmap-threshold", type=int, default=2**20)
    parser.add_argument("--out", type=Path, help="folder for memory-DEVICE-DATE.json and .md; results are added to it")
    parser.add_argument("--table", type=Path, help="print the table of such a JSON file, with the estimates of now")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
    elif args.table:
        print(markdown(json.loads(args.table.read_text())["results"]))
    else:
        results = [run_case(case, args) for case in cases(args)]
        print(markdown(results))


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that is to be measured, one dict a process."""
    same = {"segment_size": args.segment_size, "visibility": args.visibility, "dtype": args.dtype,
            "preset": args.preset, "checkpointing": not args.no_checkpointing, "offload": args.offload,
            "mmap_threshold": args.mmap_threshold}  # fmt: skip
    return [
        {"method": method, "tile": tile, "length": length, **same}
        for method, tile, length in itertools.product(args.methods, args.tiles, args.lengths)
    ]


def run_case(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One case in a process of its own; with --out, its result is written at once."""
    environment = dict(os.environ)
    if case["mmap_threshold"]:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(case["mmap_threshold"])
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result = {**case, **json.loads(done.stdout.splitlines()[-1])}
    print(f"{describe(case)}: {result['peak'] / 2**30:.2f} GiB, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    if args.out is not None:
        add_result(args.out, result)
    return result


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes: before the model, after the short step, and the peak of the step; seconds of the step."""
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    import_everything()
    gc.collect()
    before = 0 if device == "cuda" else resident("VmRSS")
    step = make_step(case, device)
    step(SHORT_STEP)
    gc.collect()
    rest = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    reset_peak(device)
    started = time.perf_counter()
    step(case["length"])
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return {"device": device, "before": before, "rest": rest - before, "peak": peak - before, "seconds": seconds}


def import_everything() -> None:
    """What a training process has loaded before its model."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    import hici.adapters.lora
    import hici.models.loss  # noqa: F401


def make_step(case: dict[str, Any], device: str) -> Any:
    """A function of a number of tokens: one optimizer step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import hici
    from hici.adapters.lora import trainable_parameters
    from hici.models.loss import next_token_loss
    from hici.models.modes import set_attention
    from hici.models.tiled_mlp import tile_mlp
    from hici.presets import load_preset

    shape = load_preset(case["preset"])
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=getattr(torch, case["dtype"]))
    base.requires_grad_(False).to(device)
    hici.attach(base, hici_config(case))
    model = hici.add_lora(base).train()
    if case["method"] != "hici":
        for parameter in trainable_parameters(model)[0]:
            parameter.requires_grad_(False)
    parameters = [p for group in trainable_parameters(model) for p in group]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if case["offload"]:
        from hici.models.offload import offload_checkpoints

        offload_checkpoints(base)
    elif case["checkpointing"]:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_attention(model, case["method"])
    if case["tile"]:
        tile_mlp(model, case["tile"])
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step(tokens: int) -> None:
        for length in (SHORT_STEP, tokens):
            ids = torch.randint(0, base.config.vocab_size, (1, length), device=device)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=case["dtype"] == "bfloat16"):
                total, count = next_token_loss(model, ids)
            (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def hici_config(case: dict[str, Any]) -> Any:
    """The paper's modules; for the baselines the smallest ones, which stay frozen and unused."""
    from hici import HiCIConfig

    same = {"segment_size": case["segment_size"], "visibility": case["visibility"]}
    if case["method"] == "hici":
        return HiCIConfig(**same)
    return HiCIConfig(num_local_slots=1, num_global_slots=1, num_heads=1, bottleneck_dim=1, compress_dim=1,
                      use_global=False, use_local=False, **same)  # fmt: skip


def resident(key: str) -> int:
    """Bytes of the process's resident set: now (VmRSS) or at most since `reset_peak` (VmHWM). Linux only."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def describe(case: dict[str, Any]) -> str:
    parts = [case["method"], f"{case['length']:,} tokens", f"MLP in tiles of {case['tile']}" if case["tile"] else ""]
    parts += ["" if case["checkpointing"] else "no checkpointing", "offload" if case["offload"] else ""]
    return ", ".join(part for part in parts if part)


def add_result(folder: Path, result: dict[str, Any]) -> None:
    """Into today's file of the device; a result of the same case is replaced."""
    from hici.files import write_json

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"memory-{result['device']}-{datetime.date.today().isoformat()}.json"
    found = json.loads(file.read_text())["results"] if file.exists() else []
    found = [other for other in found if case_of(other) != case_of(result)]
    write_json(file, {"results": [*found, result]})


def case_of(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in MEASURED}


def markdown(results):
    return json.dumps(results)


if __name__ == "__main__":
    main()
