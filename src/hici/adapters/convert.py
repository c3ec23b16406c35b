"""convert: an adapter from the released layout into ours and back, tensor by tensor, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from hici.adapters.base_files import BaseFiles
from hici.adapters.card import adapter_card
from hici.adapters.contents import Contents, read_contents
from hici.adapters.hub import find_directory
from hici.adapters.load import base_name
from hici.adapters.plan import Plan, make_plan
from hici.adapters.record import LAYOUTS, RECORD_FILE, Record
from hici.adapters.write import copy_tokenizer, write_hici, write_released
from hici.config import HiCIConfig
from hici.files import atomic_directory, check_target, write_text
from hici.models.bridge import HICI
from hici.models.fingerprint import fingerprint
from hici.models.load import load_config, meta_model
from hici.provenance import provenance
from hici.registry import suggest


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    base_model: str | Path | None = None,
    context_length: int | None = None,
    config: HiCIConfig | dict[str, Any] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> Path:
    """Write an adapter in the other layout, atomically. Every tensor keeps its bits; its name changes place only.

    The base's config.json is read (for rope and vocabulary), its weights only to take their fingerprint, where they
    are on this machine.

    Args:
        source: an adapter directory, or a hub name.
        target: new or empty, unless `overwrite`.
        to: "hici" (ours) or "released" (`adapter_model.bin` + `trainable_params.bin`, for the published code).
        base_model, context_length, config, revision: as in `hici.from_pretrained`.

    Raises:
        ValueError: all that `from_pretrained` refuses; the layout that it has already; no HiCI modules for "hici";
            LoRA settings that the published code cannot express. Nothing on disk has changed then.
    """
    if to not in LAYOUTS:
        raise ValueError(suggest(str(to), LAYOUTS, "layout"))
    target = Path(target).expanduser()
    check_target(target, overwrite=overwrite, marker=RECORD_FILE)
    contents = read_contents(find_directory(source, revision), str(source))
    if contents.layout == to:
        raise ValueError(f"{source} is in the layout {to!r} already; copy it, or give the other one")
    if not contents.has_hici:
        raise ValueError(f"{source} holds no HiCI modules (a LongLoRA adapter), so our layout has no place for it; "
                         "load it with hici.from_pretrained as it is")  # fmt: skip
    if target.resolve() == contents.directory.resolve():
        raise ValueError(f"{target} is what is read, and cannot be what is written; give another directory")
    name = base_name(contents, base_model)
    plan = make_plan(contents, load_config(name), context_length=context_length, config=config)
    record = _record(plan, name, to)
    write = write_hici if to == "hici" else write_released
    with atomic_directory(target, overwrite=overwrite, marker=RECORD_FILE) as temporary:
        write(temporary, contents.tensors, plan.lora_config(), record)
        copy_tokenizer(contents.directory, temporary)
        write_text(temporary / "README.md", adapter_card(record, target.name))
        _compare(contents, read_contents(temporary))
    return target


def _record(plan: Plan, base: str, to: str) -> Record:
    assert plan.hici is not None  # convert
    old = plan.contents.record
    hici = plan.hici.to_dict()
    whole = plan.modules_to_save if to == "released" else None
    if old is not None:
        return dataclasses.replace(old, hici=hici, layout=to, modules_to_save=whole, made_with=provenance())
    meta = meta_model(load_config(base))
    return Record(
        hici=hici,
        attention=HICI,
        context_length=plan.context_length,
        rope_parameters=plan.rope_parameters,
        max_position_embeddings=plan.positions,
        base_model=str(Path(base).resolve()) if Path(base).is_dir() else base,
        base_model_type=meta.config.model_type,
        base_fingerprint=_fingerprint(base, meta),
        peft=True,
        made_with=provenance(),
        vocab_size=plan.vocab_size if plan.vocab_size != meta.config.vocab_size else None,
        layout=to,
        modules_to_save=whole,
    )


def _fingerprint(base: str, meta: Any) -> str:
    """Of a base's files on this machine; "unknown" where there are none, or where the base is quantised."""
    if not Path(base).is_dir():
        return "unknown"
    try:
        files = BaseFiles(base, meta)
    except ValueError:
        return "unknown"
    tied = getattr(meta, "all_tied_weights_keys", {})
    names = {name: name if name in files else tied.get(name, name) for name in meta.state_dict()}
    if any(source not in files for source in names.values()):
        return "unknown"
    return fingerprint((name, files.get(source)) for name, source in names.items())


def _compare(source: Contents, written: Contents) -> None:
    """Read back before the directory is moved into place."""
    same = source.tensors.keys() == written.tensors.keys() and all(
        torch.equal(tensor, written.tensors[name].reshape(tensor.shape)) and tensor.dtype == written.tensors[name].dtype
        for name, tensor in source.tensors.items()
    )
    if not same:
        raise ValueError(f"what was written differs from {source.directory}, and is thrown away; check the disk")
