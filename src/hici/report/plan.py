"""The plan of a training run (`hici.train.dry_run`) for the terminal."""

from __future__ import annotations

from typing import Any

from hici.report.summary import describe_plan
from hici.report.tables import print_facts, print_table, size


def print_plan(plan: dict[str, Any]) -> None:
    """Print what would be trained, on what, with which memory and disk, and what stands against it."""
    print_facts(f"{plan['model']} ({plan['model_type']}): nothing is trained, this is the plan", _facts(plan))
    _print_parameters(plan)
    _print_memory(plan)
    problems = plan["problems"]
    if problems:
        print_facts(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}", [[text] for text in problems])


def _facts(plan: dict[str, Any]) -> list[list[str]]:
    work, disk = plan["work"], plan["disk"]
    rows = [["method", plan["method"]], ["context", f"{plan['context']:,} tokens"], ["rope", plan["rope"]]]
    rows += [["segments" if i == 0 else "or", describe_plan(one)] for i, one in enumerate(plan["segments"])]
    processes = f", {work['processes']} processes" if work["processes"] > 1 else ""
    rows += [
        ["a step", f"{work['sequences_per_step']:,} sequences, {work['tokens_per_step']:,} tokens{processes}"],
        ["in all", f"{work['steps']:,} steps, {work['sequences']:,} sequences, {work['tokens']:,} tokens"],
        ["data", ", ".join(plan["data"]["sources"])],
    ]
    if work["epochs"] is not None:
        rows.append(["passes over the data", f"{work['epochs']:.2f}"])
    rows.append(["schedule", plan["schedule"]])
    for name, group in plan["rates"].items():
        clip = "none" if group["clip"] is None else f"{group['clip']:g}"
        rows.append([f"learning rate: {name}", f"{group['learning_rate']:g}, gradient clip {clip}"])
    rows += [["device", f"{device['name']}, {size(device['memory'])}"] for device in plan["devices"]]
    if not plan["devices"]:
        rows.append(["device", "not on this machine"])
    rows.append(["disk", f"up to {size(disk['needed'])} (adapter and checkpoints), {size(disk['free'])} free at "
                         f"{disk['at']}"])  # fmt: skip
    return rows


def _print_parameters(plan: dict[str, Any]) -> None:
    counts, held = plan["trained_parameters"], plan["bytes_of_weights"]
    total = sum(counts.values())
    share = held["trained"] / total if total else 0
    rows = [[kind, f"{count:,}", size(share * count)] for kind, count in counts.items()]
    rows += [["trained in all", f"{total:,}", size(held["trained"])],
             ["frozen", f"{plan['frozen_parameters']:,}", size(held["frozen"])]]  # fmt: skip
    print_table("Parameters", ["", "number", "weights"], rows)


def _print_memory(plan: dict[str, Any]) -> None:
    memory = plan["memory"]
    rows = [[part, size(count)] for part, count in memory.items()]
    rows.append(["in all", size(sum(memory.values()))])
    print_table("Memory of a device, estimated", ["part", "memory"], rows)
