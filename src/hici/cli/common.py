"""What the verbs share: flags for a model and its segments, and loading the model that they name."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NamedTuple

from hici.adapters.open import model_kind, open_model, open_tokenizer
from hici.registry import suggest

ATTENTIONS = ("full", "hici", "hici_s2")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_HELP = "adapter directory (ours or released), directory of a transformers model, or a hub name"

LOADING_NOTES = """\
MODEL is a directory that hici wrote, a released HiCI or LongLoRA adapter (adapter_model.bin + trainable_params.bin;
its context comes from a name that ends like -16k, or from --context-length), or any transformers causal LM. Attention
hici on a plain model has no trained slots, so it needs --no-slots (segments alone, a baseline) and --segment-size or
--num-segments; hici_s2 (shifted sparse attention) needs only the segments."""


class Loaded(NamedTuple):
    """A model ready for use, its tokenizer, and what to say about it in a result."""

    model: Any
    tokenizer: Any
    about: dict[str, Any]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to load it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = parser.add_argument_group("loading")
    add_base_flags(group)
    group.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="default auto: as the weights are stored")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def add_base_flags(group: Any) -> None:
    """What an adapter directory may not tell by itself."""
    group.add_argument("--base-model", metavar="NAME", help="base for an adapter (default: the recorded one)")
    group.add_argument("--context-length", type=positive, metavar="T",
                       help="tokens a released adapter was trained for (default: what its name tells)")  # fmt: skip
    group.add_argument("--num-heads", type=positive, metavar="N",
                       help="heads of a released adapter's HiCI modules, which are in no file (default 8)")  # fmt: skip


def add_segment_flags(parser: argparse.ArgumentParser) -> Any:
    """Segments, visibility and slots, on top of what the directory says."""
    group = parser.add_argument_group("segments (default: as the directory says)")
    group.add_argument("--segment-size", type=positive, metavar="S", help="tokens in a segment")
    group.add_argument("--num-segments", type=positive, metavar="N", help="segments of ceil(tokens / N)")
    group.add_argument("--visibility", choices=("all", "current", "past"), help="what a slot may summarise; "
                       "only past is causal")  # fmt: skip
    group.add_argument("--no-slots", action="store_true", help="segments without slots")
    return group


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return value


def load(args: argparse.Namespace, attentions: list[str]) -> Loaded:
    """The model that `args` name, prepared for every mode of `attentions`, in mode "full", with its tokenizer.

    Raises:
        ValueError: no such model; incomplete weights; flags that do not go with it.
    """
    _check_segment_flags(args, attentions)
    expand_home(args)
    prepare_torch(args)
    kind = model_kind(args.model)
    model = open_model(
        args.model,
        kind,
        attentions,
        base_model=args.base_model,
        context_length=args.context_length,
        num_heads=args.num_heads,
        dtype=None if args.dtype == "auto" else args.dtype,
        device=args.device,
        segment_size=args.segment_size,
        num_segments=args.num_segments,
        visibility=args.visibility,
        slots=not args.no_slots,
    )
    tokenizer = load_tokenizer(args, kind)
    return Loaded(model, tokenizer, _describe(args, model, tokenizer, kind))


def expand_home(args: argparse.Namespace, *names: str) -> None:
    """`~` in names of models: the shell leaves it in quotes and in --flag=~/x, and transformers too."""
    for name in names or ("model", "base_model"):
        if getattr(args, name) is not None:
            setattr(args, name, os.path.expanduser(getattr(args, name)))


def num_heads_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """--num-heads as the `config` of hici.from_pretrained, convert, merge and verify."""
    return None if args.num_heads is None else {"num_heads": args.num_heads}


def prepare_torch(args: argparse.Namespace) -> None:
    """CPU threads, and the check that the device is there."""
    import torch
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # the bar of loading weights fills a log file
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: no such device; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use; "
            "give --device cpu or auto"
        )


def load_tokenizer(args: argparse.Namespace, kind: str) -> Any:
    """The directory's tokenizer, else the base's."""
    return open_tokenizer(args.model, kind, args.base_model)


def _check_segment_flags(args: argparse.Namespace, attentions: list[str]) -> None:
    for mode in attentions:
        if mode not in ATTENTIONS:
            raise ValueError(suggest(mode, ATTENTIONS, "value of --attention"))
    given = [
        flag
        for flag, value in (
            ("--segment-size", args.segment_size),
            ("--num-segments", args.num_segments),
            ("--visibility", args.visibility),
            ("--no-slots", args.no_slots),
        )
        if value
    ]
    if given and all(mode == "full" for mode in attentions):
        raise ValueError(f"{given[0]} changes nothing in attention full; add --attention hici, or drop it")
    if args.visibility and "hici" not in attentions:
        raise ValueError(f"--visibility {args.visibility} changes nothing without --attention hici; drop it")
    if args.visibility and args.no_slots:
        raise ValueError(f"--visibility {args.visibility} with --no-slots: there is no slot to see; drop one of them")


def _describe(args: argparse.Namespace, model: Any, tokenizer: Any, kind: str) -> dict[str, Any]:
    from hici.data.encoder import tokenizer_fingerprint
    from hici.models.fingerprint import base_fingerprint, model_fingerprint
    from hici.models.lookup import get_causal_lm, get_decoder, hici_config, is_attached

    lm = get_causal_lm(model)
    attached = is_attached(model)
    return {
        "path": str(args.model),
        "kind": kind,
        "base_model": lm.config.name_or_path,
        "base_fingerprint": get_decoder(model).hici_attached.base_fingerprint if attached else base_fingerprint(lm),
        "fingerprint": model_fingerprint(model),
        "adapter_sha256": _adapter_hashes(args.model) if kind == "adapter" else None,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "model_type": lm.config.model_type,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,  # without its number, which differs between processes
        "hici": hici_config(model).to_dict() if attached else None,
        "max_position_embeddings": lm.config.max_position_embeddings,
        "rope_parameters": dict(lm.config.rope_parameters),
    }


def _adapter_hashes(name: str) -> dict[str, str]:
    """SHA-256 of every file of weights and settings of an adapter directory."""
    from hici.adapters.hub import find_directory
    from hici.files import file_sha256

    directory = find_directory(name)
    files = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    return {path.name: file_sha256(path) for path in files}
