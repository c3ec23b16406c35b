"""A released-format adapter on a model of full size: loaded, run over 2K tokens, merged, with seconds and memory.

    python benchmarks/full_size.py --scratch /tmp/full-size --out benchmarks/results

Llama-2-7B in its real shape with random bfloat16 weights (the values change neither time nor memory), saved in shards,
and an adapter in the released format for it (27 MiB of LoRA, 2 GB of trained weights in float32). Each phase runs in a
process of its own. Two peaks are reported: `anonymous` is what the process allocated; `resident` also counts mapped
pages of weight files, which the system takes back when it needs them. Needs about 60 GB of disk in --scratch, which
is left there (a second run uses the base and the adapter again).
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = 2048
PHASES = ("base", "adapter", "load", "plain", "hici")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the model, the adapter and the merges")
    parser.add_argument("--preset", default="llama-2-7b")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the forward pass")
    parser.add_argument("--out", type=Path, help="folder for full-size-PRESET-DATE.json and .md")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(run_phase(args)))
        return
    results = {}
    for phase in PHASES:
        print(f"{phase} ...", flush=True)
        results[phase] = in_process(phase, args)
        print(f"  {json.dumps(results[phase])}", flush=True)
    table = markdown(results)
    print(table)
    if args.out is not None:
        write_results(args, results, table)


def in_process(phase: str, args: argparse.Namespace) -> dict[str, Any]:
    """One phase in a process of its own."""
    command = [sys.executable, __file__, "--phase", phase, "--scratch", str(args.scratch), "--preset", args.preset]
    command += ["--context", str(args.context), "--tokens", str(args.tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_phase(args: argparse.Namespace) -> dict[str, Any]:
    phases: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "base": make_base, "adapter": make_adapter, "load": load_and_run,
        "plain": lambda a: merge(a, "plain"), "hici": lambda a: merge(a, "hici"),
    }  # fmt: skip
    with Memory() as memory:
        facts = phases[args.phase](args)
    return {**facts, "peak_anonymous_bytes": memory.anonymous, "peak_resident_bytes": memory.resident}


class Memory:
    """Peaks of this process, looked at ten times a second."""

    anonymous = 0
    resident = 0

    def __enter__(self) -> Memory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            values = {
                line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Rss", "VmRSS"))
            }
            self.anonymous = max(self.anonymous, values["RssAnon"])
            self.resident = max(self.resident, values["VmRSS"])


def model_config(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    from hici.presets import load_preset

    return AutoConfig.for_model(**load_preset(args.preset), dtype="bfloat16")


def make_base(args: argparse.Namespace) -> dict[str, Any]:
    """Random weights in the model's shape, written shard by shard."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from hici.files import atomic_directory, write_json
    from hici.models.load import meta_model

    directory = args.scratch / "base"
    if (directory / "config.json").is_file():
        return {"made": "before"}
    config = model_config(args)
    empty = {
        n: torch.empty(p.shape, dtype=torch.bfloat16, device="meta") for n, p in meta_model(config).named_parameters()
    }
    shards = split_torch_state_dict_into_shards(
        empty, max_shard_size="2GB", filename_pattern="model{suffix}.safetensors"
    )
    torch.manual_seed(0)
    with atomic_directory(directory) as temporary:
        for file, names in shards.filename_to_tensors.items():
            save_file(
                {name: random_tensor(name, empty[name]) for name in names}, temporary / file, metadata={"format": "pt"}
            )
        write_json(temporary / "model.safetensors.index.json",
                   {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})  # fmt: skip
        config.save_pretrained(temporary)
    return {"parameters": sum(tensor.numel() for tensor in empty.values()), "shards": len(shards.filename_to_tensors)}


def random_tensor(name: str, like: Any) -> Any:
    """Values as far from zero as real weights are."""
    import torch

    if "norm" in name and name.endswith(".weight"):
        return torch.ones(like.shape, dtype=like.dtype)
    return torch.empty(like.shape, dtype=like.dtype).normal_(std=0.02)


def make_adapter(args: argparse.Namespace) -> dict[str, Any]:
    """adapter_model.bin in bfloat16, trainable_params.bin in float32, as released."""
    import torch

    from hici.adapters.expected import released_tensors
    from hici.files import atomic_directory, write_json

    directory = args.scratch / "adapter"
    sizes = {}
    if not directory.is_dir():
        torch.manual_seed(1)
        with atomic_directory(directory) as temporary:
            for file, tensors in released_tensors(model_config(args)).items():
                dtype = torch.bfloat16 if file == "adapter_model.bin" else torch.float32
                made = {name: random_tensor(name, tensor.to(dtype)) for name, tensor in tensors.items()}
                torch.save(made, temporary / file)
            write_json(temporary / "adapter_config.json", {
                "base_model_name_or_path": str(args.scratch / "base"), "bias": "none", "lora_alpha": 16,
                "lora_dropout": 0, "peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM",
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            })  # fmt: skip
    for file in ("adapter_model.bin", "trainable_params.bin"):
        sizes[file] = (directory / file).stat().st_size
    return {"file_bytes": sizes}


def load_and_run(args: argparse.Namespace) -> dict[str, Any]:
    """hici.from_pretrained, then one forward pass in HiCI attention and one in full attention."""
    import torch

    import hici

    started = time.perf_counter()
    model = hici.from_pretrained(args.scratch / "adapter", context_length=args.context, attention="hici",
                                 config={"num_heads": 8})  # fmt: skip
    facts: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "dtype": str(model.dtype)}
    ids = torch.randint(0, model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        model(input_ids=ids[:, :16], use_cache=False)  # the weights' pages come from disk now, and not in the timing
    for mode, implementation in (("hici", "hici"), ("full", "sdpa")):
        model.set_attn_implementation(implementation)
        started = time.perf_counter()
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        facts[f"forward_{mode}_seconds"] = time.perf_counter() - started
        facts[f"finite_{mode}"] = bool(logits.isfinite().all())
    return {**facts, "tokens": args.tokens, "rope_parameters": dict(model.config.rope_parameters)}


def merge(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """hici.merge into scratch/KIND."""
    import hici

    target = args.scratch / kind
    started = time.perf_counter()
    hici.merge(args.scratch / "adapter", target, kind, context_length=args.context, config={"num_heads": 8},
               overwrite=True)  # fmt: skip
    seconds = time.perf_counter() - started
    files = [file.stat().st_size for file in target.glob("*.safetensors")]
    return {"merge_seconds": seconds, "file_bytes": sum(files), "shards": len(files)}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table of the phases that use the library."""
    rows = ["| phase | seconds | anonymous GiB | resident GiB |", "|---|---:|---:|---:|"]
    loaded = results["load"]
    peaks = {phase: [result[f"peak_{kind}_bytes"] / 2**30 for kind in ("anonymous", "resident")]
             for phase, result in results.items()}  # fmt: skip
    memory = {phase: f"{a:.1f} | {r:.1f}" for phase, (a, r) in peaks.items()}
    rows.append(f"| from_pretrained | {loaded['load_seconds']:.0f} | {memory['load']} |")
    for mode in ("hici", "full"):
        seconds = loaded[f"forward_{mode}_seconds"]
        rows.append(f"| forward, {loaded['tokens']:,} tokens, {mode} | {seconds:.0f} | the same process | |")
    for kind in ("plain", "hici"):
        rows.append(f"| merge --as {kind} | {results[kind]['merge_seconds']:.0f} | {memory[kind]} |")
    return "\n".join(rows)


def write_results(args: argparse.Namespace, results: dict[str, Any], table: str) -> None:
    from hici.files import write_json, write_text
    from hici.provenance import provenance

    made_with = provenance()
    packages, machine = made_with["packages"], made_with["machine"]
    date = datetime.date.today().isoformat()
    name = args.out / f"full-size-{args.preset}-{date}"
    settings = {"preset": args.preset, "context": args.context, "tokens": args.tokens, "dtype": "bfloat16"}
    write_json(f"{name}.json", {"settings": settings, "results": results, "made_with": made_with})
    write_text(
        f"{name}.md",
        f"# {args.preset} at full size, random weights, {date}\n\n"
        f"{machine['device']}, {machine['cpu_threads']} threads, torch {packages['torch']}, transformers "
        f"{packages['transformers']}; base in bfloat16, adapter in the released format.\n"
        f"`anonymous`: peak of what the process allocated; `resident`: with mapped pages of weight files.\n"
        f"Made by `python benchmarks/full_size.py --scratch SCRATCH --preset {args.preset} --context {args.context} "
        f"--tokens {args.tokens} --out benchmarks/results` at revision "
        f"{made_with['git_revision']}.\n\n"
        f"{table}\n",
    )


if __name__ == "__main__":
    main()
