"""What the verbs of `hici eval` share: flags, loading, rope, where the result goes, and measuring with a bar."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hici.cli.common import ATTENTIONS, Loaded, add_model_flags, add_segment_flags, hici_facts, load
from hici.processes import local_rank, rank, world_size

RESUME_NOTES = """\
With --out, what is measured is kept as it comes: after a kill the same command goes on, and ends with the same result.
Several processes share the work: torchrun --nproc-per-node 4 -m hici eval ..."""


def add_evaluation_flags(parser: argparse.ArgumentParser, result_name: str, *, picture: bool = True) -> None:
    """MODEL and how it is loaded, its attentions and rope, and where the result goes (`result_name`.json)."""
    add_model_flags(parser)
    add_segment_flags(parser)
    group = parser.add_argument_group("attention and positions")
    group.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["full"], help="default full")
    add_rope_flags(group)
    add_output_flags(parser, result_name, picture=picture)


def add_rope_flags(group: Any) -> None:
    """--rope and --allow-beyond-rope."""
    group.add_argument("--rope", choices=("none", "auto", "linear", "yarn"), default="none", help="extend the rope so "
                       "to the longest context, once, for all contexts of the run; auto: linear, or the kind by which "
                       "the model is scaled already")  # fmt: skip
    group.add_argument("--allow-beyond-rope", action="store_true", help="permit contexts beyond the rope settings")


def add_output_flags(parser: argparse.ArgumentParser, result_name: str, *, picture: bool = True) -> None:
    """--out and --overwrite."""
    output = parser.add_argument_group("output")
    beside = ", and a picture (.png) beside it" if picture else ""
    output.add_argument("--out", metavar="DIR|FILE.json", help=f"JSON{beside}; DIR: {result_name}.json in it")
    output.add_argument("--overwrite", action="store_true", help="measure anew and replace files that exist; given "
                        "again after a kill, it begins anew again")  # fmt: skip


def check_evaluation(args: argparse.Namespace, **once: list[Any]) -> None:
    """What can be refused before anything is loaded. `once`: flags and their values, none of which may come twice."""
    for flag, values in {"attention": args.attention, **once}.items():
        if len(set(values)) != len(values):
            raise ValueError(f"--{flag.replace('_', '-')} {' '.join(map(str, values))} names one twice; name each once")


def result_target(args: argparse.Namespace, result_name: str, *, picture: bool = True) -> Path | None:
    """The result's path from --out, checked; None without --out."""
    from hici.eval.measure import check_target

    if args.out is None:
        if args.overwrite:
            raise ValueError("--overwrite is for --out only; drop it")
        return None
    path = Path(args.out).expanduser()
    target = path if path.suffix == ".json" else path / f"{result_name}.json"
    beside = target.with_suffix(".png")
    check_target(target, *([beside] if picture else []))
    if picture and beside.exists() and not target.exists() and not args.overwrite:  # drawn from another result
        raise ValueError(f"{beside} exists, and nothing is overwritten silently; give another --out or --overwrite")
    return target


def load_for_evaluation(args: argparse.Namespace, longest: int | None) -> Loaded:
    """The model, ready for every --attention, its rope extended to `longest` tokens where --rope says so.

    `args.loaded`: a model that is ready already (`hici eval all`).

    Raises:
        ValueError: see `load`; `longest` beyond the rope without --allow-beyond-rope.
    """
    ready: Loaded | None = getattr(args, "loaded", None)
    if ready is not None:
        return ready._replace(about=ready.about | hici_facts(ready.model, args.attention))
    if world_size() > 1 and args.device in ("auto", "cuda"):
        args.device = f"cuda:{local_rank()}" if _cuda() else "cpu"
    loaded = load(args, args.attention)
    return extend_to(args, loaded._replace(about=loaded.about | _identity(loaded)), longest)


def _identity(loaded: Loaded) -> dict[str, Any]:
    """What tells these very weights from all others, so that no result of others is taken over."""
    from hici.models.fingerprint import weights_checksum
    from hici.models.lookup import get_causal_lm

    return {
        "weights_checksum": weights_checksum(loaded.model, hici_modules=loaded.about["kind"] != "plain"),
        "end_token_id": get_causal_lm(loaded.model).generation_config.eos_token_id,
    }


def extend_to(args: argparse.Namespace, loaded: Loaded, longest: int | None) -> Loaded:
    """The same model, its rope extended to `longest` tokens where --rope says so; what a result says of it too.

    Raises:
        ValueError: `longest` beyond the rope without --allow-beyond-rope.
    """
    from hici.models.lookup import get_causal_lm
    from hici.rope import check_context, extend_rope, far_rope

    config = get_causal_lm(loaded.model).config
    before = config.max_position_embeddings
    extended = False
    if args.rope != "none" and longest is not None and longest > before:
        extend_rope(loaded.model, longest, method=args.rope)
        extended = True
    if longest is not None and not args.allow_beyond_rope:
        check_context(config, longest)
    rope = {
        "extended": far_rope(config.rope_parameters)["rope_type"] if extended else False,
        "positions_before": before,
        "positions": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "allow_beyond_rope": args.allow_beyond_rope,
    }
    replaced = ("rope_parameters", "max_position_embeddings")
    about = {key: value for key, value in loaded.about.items() if key not in replaced}
    return loaded._replace(about=about | {"rope": rope})


class OnlyPlannedError(Exception):
    """A verb has come to where it would measure, and `args.only_plan` is set: nothing was in its way."""


def measure_with_bar(args: argparse.Namespace, plan: Any, target: Path | None, what: str) -> dict[str, Any]:
    """`hici.eval.measure.measure` with a bar on the first process's stderr.

    Raises:
        OnlyPlannedError: with `args.only_plan` (`hici eval all`, which makes all plans before anything is measured).
    """
    if getattr(args, "only_plan", False):
        raise OnlyPlannedError
    from hici.eval.measure import measure
    from hici.report.progress import progress_bar

    if rank() > 0:
        return measure(plan, target, overwrite=args.overwrite)
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        return measure(
            plan,
            target,
            overwrite=args.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def is_first_process() -> bool:
    """Whether this process prints and draws."""
    return rank() == 0


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
