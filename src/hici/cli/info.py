"""`hici info`: modules, parameters, segments and memory of a model, without loading weights."""

from __future__ import annotations

import argparse
from typing import Any

from hici.adapters.open import model_kind
from hici.cli.common import MODEL_HELP, expand_home, positive

_DESCRIPTION = """\
What HiCI adds to a model, how a context is cut into segments, and how much memory training and generation take.
Only configs and the headers of weight files are read. The memory's formulas are in hici/report/memory.py."""

_EXAMPLES = """\
examples:
  hici info --preset llama-2-7b --context 16384
  hici info --preset qwen3-8b --context 32768 --segment-size 8192 --visibility past
  hici info --preset llama-2-7b --context 65536 --mlp-tile 4096 --optimizer adamw_8bit --quantization 4bit
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
    parser.add_argument("--base-model", metavar="NAME", help="base for an adapter (default: the recorded one)")
    parser.add_argument("--context-length", type=positive, metavar="T",
                        help="tokens a released adapter was trained for (default: what its name tells)")  # fmt: skip
    parser.add_argument("--context", type=positive, metavar="T", help="tokens (default: the model's positions)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                        help="of the memory estimate (default bfloat16)")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences at a time (default 1)")
    parser.add_argument("--lora-rank", type=positive, default=8, metavar="R", help="of the estimate (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    training = parser.add_argument_group("training, for the memory estimate (default: as `hici train`)")
    training.add_argument("--method", choices=("hici", "hici_s2", "full"), default="hici")
    training.add_argument("--mlp-tile", type=positive, metavar="T", help="tokens that go through an MLP at a time")
    training.add_argument("--optimizer", choices=("adamw", "adamw_8bit", "paged_adamw_8bit"), default="adamw")
    training.add_argument("--quantization", choices=("none", "8bit", "4bit"), default="none", help="of the frozen base")
    training.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    training.add_argument("--offload-checkpoints", action="store_true", help="checkpoints in the CPU's memory")
    training.add_argument("--processes", type=positive, default=1, metavar="N",
                          help="that share parameters and optimizer (FSDP2, ZeRO-3): one is shown")  # fmt: skip
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
    elif model_kind(args.model) == "adapter":
        name, facts = args.model, _ours(args)
    else:
        name, facts = args.model, _plain(args, _config(args.model))
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

    for name in ("base_model", "context_length"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is for an adapter only; drop it")
    config = _changed(args, saved_config(model_config) or HiCIConfig())
    return _summary(args, model_config, config)


def _ours(args: argparse.Namespace) -> dict[str, Any]:
    """An adapter directory: its record and the headers of its weights; the base's config where it can be read."""
    from hici.adapters.contents import config_of, read_contents
    from hici.adapters.hub import find_directory
    from hici.adapters.load import base_name
    from hici.adapters.plan import make_plan
    from hici.models.load import load_config
    from hici.rope import config_rope_parameters

    contents = read_contents(find_directory(args.model), args.model, data=False)
    for name in _SHAPE_FLAGS:
        if hasattr(args, name) and (name != "num_heads" or contents.record is not None):
            raise ValueError(
                f"--{name.replace('_', '-')} would need other modules than those in {args.model}; drop it, or ask "
                "about the base model instead"
            )
    if not contents.has_hici:
        raise ValueError(f"{args.model} holds no HiCI modules (a LongLoRA adapter); ask about its base model instead")
    config = _changed(args, config_of(contents, {"num_heads": args.num_heads} if hasattr(args, "num_heads") else None))
    base, record = base_name(contents, args.base_model), contents.record
    facts: dict[str, Any] = {
        "directory": {
            "layout": contents.layout,
            "base_model": base,
            "attention": record.attention if record else None,
            "context_length": record.context_length if record else None,
            "parameters": {
                "HiCI modules": _count(contents.hici),
                "LoRA, embeddings, norms": _count({**contents.lora, **contents.saved}),
            },
            "made_with": record.made_with if record else None,
        }
    }
    try:
        model_config = load_config(base)
    except ValueError as error:
        if args.context is None:
            args.context = _own_context(args, record)
        return {**facts, **_without_base(args.context, config), "base_not_read": str(error)}
    plan = make_plan(contents, model_config, context_length=args.context_length, config=config)
    facts["directory"]["context_length"] = plan.context_length
    if args.context is None:
        args.context = plan.context_length
    config_rope_parameters(model_config, plan.rope_parameters, plan.positions)
    model_config.vocab_size = plan.vocab_size
    return {**facts, **_summary(args, model_config, config)}


def _own_context(args: argparse.Namespace, record: Any) -> int:
    from hici.adapters.hub import context_of_name

    context = record.context_length if record is not None else args.context_length or context_of_name(args.model)
    if context is None:
        raise ValueError(f"{args.model} does not tell the context that it was trained for; give --context-length")
    return context


def _without_base(context: int, config: Any) -> dict[str, Any]:
    from hici.report.summary import segment_plan

    return {
        "context": context,
        "segments": segment_plan(context, config),
        "visibility": config.visibility if config.use_global or config.use_local else None,
        "hici": config.to_dict(),
    }


def _summary(args: argparse.Namespace, model_config: Any, config: Any) -> dict[str, Any]:
    from hici.report.memory import Training
    from hici.report.summary import summarise

    training = Training(
        method=args.method,
        gradient_checkpointing=not args.no_checkpointing,
        offload_checkpoints=args.offload_checkpoints,
        mlp_tile=args.mlp_tile,
        optimizer=args.optimizer,
        quantization=args.quantization,
        processes=args.processes,
    )
    summary = summarise(model_config, config, context=args.context, dtype=args.dtype, batch=args.batch,
                        lora_rank=args.lora_rank, training=training)  # fmt: skip
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


def _config(name: str) -> Any:
    from hici.models.load import load_config

    return load_config(name)


def _positive_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else positive(text)


def _count(tensors: dict[str, Any]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _print(name: str, facts: dict[str, Any]) -> None:
    from hici.report.summary import VISIBILITY, describe_plan
    from hici.report.tables import print_facts

    rows = []
    if "directory" in facts:
        directory = facts["directory"]
        context = directory["context_length"]
        rows += [["base model", directory["base_model"]], ["layout", directory["layout"]],
                 ["trained in attention", directory["attention"] or "not recorded"],
                 ["trained for", f"{context:,} tokens" if context else "not recorded"]]  # fmt: skip
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
    for what, key in (("training", "training"), ("generation", "generation"), ("in bounded memory", "bounded")):
        parts = facts[key]
        if parts is None:
            continue
        rows += [[what if i == 0 else "", part, size(count)] for i, (part, count) in enumerate(parts.items())]
        rows.append(["", "in all", size(sum(parts.values()))])
    title = f"Memory, estimated: {facts['batch']} x {facts['context']:,} tokens, {facts['dtype']}"
    generation = "Generation: keys and values of all tokens, the prompt read at once"
    generation += "; in bounded memory: a HiCICache, segment by segment." if facts["bounded"] else "."
    print_table(title, ["", "part", "memory"], rows, [_describe_training(facts), generation])


def _describe_training(facts: dict[str, Any]) -> str:
    from hici.report.tables import size

    how = facts["trained_as"]
    hici = "HiCI, " if how["method"] == "hici" else ""
    parts = [f"Training: {facts['trained_parameters']:,} trained parameters ({hici}LoRA, embeddings, norms)",
             f"attention {how['method']}",
             "every layer checkpointed" if how["gradient_checkpointing"] else "no checkpointing"]  # fmt: skip
    if how["offload_checkpoints"]:
        parts.append(f"checkpoints in the CPU's memory ({size(facts['offloaded'])} there)")
    if how["mlp_tile"]:
        parts.append(f"MLPs in tiles of {how['mlp_tile']:,} tokens")
    parts.append(how["optimizer"])
    if how["quantization"] != "none":
        parts.append(f"base in {how['quantization'].replace('bit', ' bits')}")
    if how["processes"] > 1:
        parts.append(f"on each of {how['processes']} processes that share the parameters")
    return ", ".join(parts) + "."
