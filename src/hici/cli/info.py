"""`hici info`: modules, parameters, segments and memory of a model, without loading weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hici.cli.common import MODEL_HELP, expand_home, is_hici_directory, positive

_DESCRIPTION = """\
What HiCI adds to a model, how a context is cut into segments, and how much memory training and generation take.
Only configs and the headers of weight files are read. The memory's formulas are in hici/report/memory.py."""

_EXAMPLES = """\
examples:
  hici info --preset llama-2-7b --context 16384
  hici info --preset qwen3-8b --context 32768 --segment-size 8192 --visibility past
  hici info runs/adapter
  hici info owner/model --context 16384 --json > info.json"""

# flags that decide the modules' shapes, and flags that decide how they are used
_SHAPE_FLAGS = ("num_local_slots", "num_global_slots", "num_heads", "bottleneck_dim", "compress_dim", "integrator_dim")
_USE_FLAGS = ("num_segments", "segment_size", "visibility")


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "info", help="modules, parameters, segments, memory", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--preset", metavar="NAME", help="a known architecture instead of a model: llama-2-7b, ...")
    parser.add_argument("--base-model", metavar="NAME", help="base for a hici directory (default: the recorded one)")
    parser.add_argument("--context", type=positive, metavar="T", help="tokens (default: the model's positions)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                        help="of the memory estimate (default bfloat16)")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences at a time (default 1)")
    parser.add_argument("--lora-rank", type=positive, default=8, metavar="R", help="of the estimate (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group = parser.add_argument_group("HiCI config (default: the model's own, else the paper's)")
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    for name in _SHAPE_FLAGS:
        optional = name.endswith("_dim")
        group.add_argument(f"--{name.replace('_', '-')}", type=_positive_or_none if optional else positive,
                           metavar="N|none" if optional else "N", **given)  # fmt: skip
    group.add_argument("--num-segments", type=positive, metavar="N", **given)
    group.add_argument("--segment-size", type=positive, metavar="S", **given)
    group.add_argument("--visibility", choices=("all", "current", "past"), **given)
    group.add_argument("--no-slots", action="store_true", help="segments without slots in the broadcast")


def run(args: argparse.Namespace) -> int:
    """Count, estimate, print."""
    if (args.model is None) == (args.preset is None):
        raise ValueError("give one of MODEL and --preset, and not both, for example `hici info --preset llama-2-7b`")
    expand_home(args)
    if args.preset is not None:
        from hici.presets import load_preset

        name, fields = args.preset, load_preset(args.preset)
        facts = _plain(args, _model_config(fields))
    elif is_hici_directory(args.model):
        name, facts = args.model, _ours(args)
    else:
        name, facts = args.model, _plain(args, _read_config(args.model))
    if args.json:
        import json

        from hici.provenance import provenance

        print(json.dumps({"task": "info", "model": name, **facts, "seed": None, "provenance": provenance()}, indent=2))
    else:
        _print(name, facts)
    return 0


def _plain(args: argparse.Namespace, model_config: Any) -> dict[str, Any]:
    from hici.config import HiCIConfig
    from hici.models.attach import saved_config

    if args.base_model is not None:
        raise ValueError(f"--base-model {args.base_model} is for a hici directory only; drop it")
    config = _changed(args, saved_config(model_config) or HiCIConfig())
    return _summary(args, model_config, config)


def _ours(args: argparse.Namespace) -> dict[str, Any]:
    """A hici directory: its record and the headers of its weights; the base's config where it can be read."""
    from hici.adapters.directory import HICI_FILE, PEFT_FILES, read_record, tensor_shapes
    from hici.config import HiCIConfig
    from hici.rope import config_rope_parameters

    for name in _SHAPE_FLAGS:
        if hasattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} would need other modules than those in {args.model}; drop it, or ask "
                "about the base model instead"
            )
    record = read_record(args.model)
    directory = Path(args.model).expanduser()
    config = _changed(args, HiCIConfig.from_dict(record.hici))
    shapes = tensor_shapes(directory / HICI_FILE)
    trained = {
        "HiCI modules": _count(shapes),
        "LoRA, embeddings, norms": _count(tensor_shapes(directory / PEFT_FILES[1])) if record.peft else 0,
    }
    facts: dict[str, Any] = {
        "directory": {
            "base_model": args.base_model or record.base_model,
            "attention": record.attention,
            "context_length": record.context_length,
            "parameters": trained,
            "made_with": record.made_with,
        }
    }
    if args.context is None:
        args.context = record.context_length
    try:
        model_config = _read_config(args.base_model or record.base_model)
    except ValueError as error:
        return {**facts, **_without_base(args.context, config), "base_not_read": str(error)}
    config_rope_parameters(model_config, record.rope_parameters, record.max_position_embeddings)
    summary = _summary(args, model_config, config)
    if summary["hici_parameters"] != trained["HiCI modules"]:
        raise ValueError(
            f"{directory / HICI_FILE} has {trained['HiCI modules']:,} parameters, but its config on "
            f"{args.base_model or record.base_model} gives {summary['hici_parameters']:,}; give the base that it was "
            "made on with --base-model, or copy the directory again"
        )
    return {**facts, **summary}


def _without_base(context: int, config: Any) -> dict[str, Any]:
    from hici.report.summary import segment_plan

    return {
        "context": context,
        "segments": segment_plan(context, config),
        "visibility": config.visibility if config.use_global or config.use_local else None,
        "hici": config.to_dict(),
    }


def _summary(args: argparse.Namespace, model_config: Any, config: Any) -> dict[str, Any]:
    from hici.report.summary import summarise

    summary = summarise(model_config, config, context=args.context, dtype=args.dtype, batch=args.batch,
                        lora_rank=args.lora_rank)  # fmt: skip
    return summary.to_dict()


def _changed(args: argparse.Namespace, config: Any) -> Any:
    changes = {name: getattr(args, name) for name in (*_SHAPE_FLAGS, *_USE_FLAGS) if hasattr(args, name)}
    if args.no_slots:
        if "visibility" in changes:
            raise ValueError("--visibility with --no-slots: there is no slot to see; drop one of them")
        changes |= {"use_global": False, "use_local": False}
    return config.replace(**changes)


def _model_config(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**fields)


def _read_config(name: str) -> Any:
    """The transformers config of a directory or hub name."""
    from transformers import AutoConfig

    if not name:
        raise ValueError("the directory does not record the name of its base model; give --base-model")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no config of {name!r} ({first}); give a directory with config.json, or a hub name that this machine "
            "can reach, or --preset"
        ) from error


def _positive_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else positive(text)


def _count(shapes: dict[str, list[int]]) -> int:
    import math

    return sum(math.prod(shape) for shape in shapes.values())


def _print(name: str, facts: dict[str, Any]) -> None:
    from hici.report.summary import VISIBILITY, describe_plan
    from hici.report.tables import print_facts

    rows = []
    if "directory" in facts:
        directory = facts["directory"]
        rows += [["base model", directory["base_model"]], ["trained in attention", directory["attention"]],
                 ["trained for", f"{directory['context_length']:,} tokens"]]  # fmt: skip
        rows += [[f"parameters in file: {kind}", f"{count:,}"] for kind, count in directory["parameters"].items()]
    if "base_parameters" in facts:
        rows += [
            ["architecture", f"{facts['model_type']}, {facts['layers']} layers of width {facts['width']:,}"],
            ["base parameters", f"{facts['base_parameters']:,}"],
            ["HiCI parameters", f"{facts['hici_parameters']:,}"],
            ["HiCI parameters a layer", f"{facts['hici_parameters_per_layer']:,}"],
            ["HiCI share of the model with them", f"{facts['hici_percent']:.2f} %"],
            ["rope", facts["rope"]],
        ]
    if facts.get("sliding_window"):
        rows.append(["sliding window", f"{facts['sliding_window']:,} tokens; segments must not be longer"])
    visibility = facts["visibility"]
    rows += [
        ["segments", f"{facts['context']:,} tokens: {describe_plan(facts['segments'])}"],
        [f"visibility {visibility or '-'}", VISIBILITY[visibility] if visibility else "no slots in the broadcast"],
    ]
    notes = [f"No counts for the base: {facts['base_not_read']}"] if "base_not_read" in facts else []
    print_facts(name, rows, notes)
    if "modules" in facts:
        _print_modules(facts)
        _print_memory(facts)


def _print_modules(facts: dict[str, Any]) -> None:
    from hici.report.tables import print_table

    rows = [[module, f"{count:,}"] for module, count in facts["modules"].items()]
    rows.append(["in all", f"{facts['hici_parameters_per_layer']:,}"])
    print_table("HiCI modules of one layer", ["module", "parameters"], rows)


def _print_memory(facts: dict[str, Any]) -> None:
    from hici.report.tables import print_table, size

    rows = []
    for what in ("training", "generation"):
        parts = facts[what]
        rows += [[what if i == 0 else "", part, size(count)] for i, (part, count) in enumerate(parts.items())]
        rows.append(["", "in all", size(sum(parts.values()))])
    title = f"Memory, estimated: {facts['batch']} x {facts['context']:,} tokens, {facts['dtype']}"
    note = (
        f"Training: {facts['trained_parameters']:,} trained parameters (HiCI, LoRA, embeddings, norms), every layer "
        "checkpointed, attention hici. Generation: keys and values of all tokens."
    )
    print_table(title, ["", "part", "memory"], rows, [note])
